"""Where `-o` of a command may lead."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from ia3.cli.finetune import check_output
from ia3.cli.output import json_lines
from ia3.errors import IA3Error
from ia3.files import check_file

LINE = '{"text": "é"}\n'


def write(path: Path) -> None:
    with json_lines(path) as line:
        line({"text": "é"})


def test_a_new_name_and_a_regular_file_are_written(tmp_path: Path) -> None:
    write(tmp_path / "new" / "file")
    assert (tmp_path / "new" / "file").read_text("utf-8") == LINE
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((tmp_path / "new" / "file").stat().st_mode) == 0o666 & ~mask
    (tmp_path / "old").write_text("something long that was there before")
    os.link(tmp_path / "old", tmp_path / "other name")
    write(tmp_path / "old")
    assert (tmp_path / "old").read_text("utf-8") == LINE
    assert "before" in (tmp_path / "other name").read_text()  # replaced, not written over
    assert {path.name for path in tmp_path.iterdir()} == {"new", "old", "other name"}


def test_a_file_is_replaced_at_the_first_line(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("before")
    with json_lines(tmp_path / "old"):
        pass
    assert (tmp_path / "old").read_text() == "before"


def test_devices_and_pipes_are_written_to(tmp_path: Path) -> None:
    write(Path("/dev/null"))
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text("utf-8")), daemon=True)
    reader.start()
    write(pipe)
    reader.join(10)
    assert found == [LINE]
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_ones_own_link_is_followed_and_stays(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to("target")
    write(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text("utf-8") == LINE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make what belongs to somebody else")
def test_somebody_elses_link_where_all_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("before")
    (tmp_path / "link").symlink_to("target")
    os.chown(tmp_path / "link", 12345, 12345, follow_symlinks=False)
    check_file(tmp_path / "link")  # nobody but the owner writes here, who may do what they like
    tmp_path.chmod(0o1777)
    with pytest.raises(IA3Error, match="a link that somebody else made"):
        write(tmp_path / "link")
    assert (tmp_path / "target").read_text() == "before"
    with pytest.raises(IA3Error, match="a link that somebody else made"):
        check_output(tmp_path / "link")


def test_what_cannot_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "file" / "below" / "it", "is a file")):
        with pytest.raises(IA3Error, match=said):
            check_file(path)
    monkeypatch.setattr(os, "access", lambda *_: False)
    for path in (tmp_path / "new" / "file", Path("/dev/null")):
        with pytest.raises(IA3Error, match="may not be written to"):
            check_file(path)


def test_a_full_device_is_a_sentence() -> None:
    with pytest.raises(IA3Error, match="/dev/full could not take the answers: No space left"):
        write(Path("/dev/full"))


def test_what_has_no_utf8_is_json_all_the_same(tmp_path: Path) -> None:
    with json_lines(tmp_path / "file") as line:
        line({"text": "\ud83d"})
    assert (tmp_path / "file").read_bytes() == b'{"text": "\\ud83d"}\n'
