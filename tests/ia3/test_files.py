"""Files are written beside their place and renamed into it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ia3.errors import IA3Error
from ia3.files import atomic_folder, atomic_write_text


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.txt"
    atomic_write_text(path, "größer")
    atomic_write_text(path, "second")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def _fail_halfway(folder: Path) -> None:
    with atomic_folder(folder) as content:
        (content / "a").write_text("new")
        raise KeyError("stop")


def test_a_failure_leaves_everything_as_it_was(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with pytest.raises(KeyError):
        _fail_halfway(folder)
    assert list(tmp_path.iterdir()) == []
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(KeyError):
        _fail_halfway(folder)
    assert (folder / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [folder]


def test_a_folder_keeps_what_it_does_not_replace(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kept").write_text("kept")
    with atomic_folder(folder) as content:
        (content / "sub").mkdir()
        (content / "sub" / "a").write_text("a")
    assert (folder / "kept").exists()
    assert (folder / "sub" / "a").read_text() == "a"


def test_others_may_read_what_was_written(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    with atomic_folder(tmp_path / "folder") as content:
        (content / "a").write_text("a")
    assert (tmp_path / "folder").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(IA3Error, match="may not be written to"):
        atomic_write_text(tmp_path / "file", "x")


def test_a_file_in_the_way_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(IA3Error, match="a file of that name"), atomic_folder(tmp_path / "file"):
        pass
    with pytest.raises(IA3Error, match="is a file"):
        atomic_write_text(tmp_path / "file" / "inner", "x")
    with pytest.raises(IA3Error, match="is a folder"):
        atomic_write_text(tmp_path, "x")
