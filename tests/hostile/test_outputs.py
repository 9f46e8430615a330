"""Where files are to be written, and disks that take none: nothing is damaged, and nothing left behind."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import ia3
from ia3.cli.app import main
from ia3.cli.finetune import check_output
from ia3.cli.output import json_lines
from ia3.files import atomic_folder, atomic_write_text
from ia3.merging.checkpoint import plan_merge, write_merged

from .harness import NO_FILES, bounds, refused, tree

VECTORS = {"base_model.model.model.layers.0.self_attn.k_proj.ia3_l": torch.ones(16, 1)}


def write_lines(path: Path) -> None:
    with json_lines(path) as write:
        write({"text": "new"})


def write_text(path: Path) -> None:
    atomic_write_text(path, "new")


def write_folder(path: Path) -> None:
    with atomic_folder(path) as folder:
        (folder / "config").write_text("new")
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("new")


WRITERS: list[Callable[[Path], None]] = [write_lines, write_text]


def _others_link(path: Path) -> None:
    """Lay a link as somebody else does in /tmp, where everybody may."""
    path.parent.chmod(0o1777)
    path.symlink_to(path.parent / "victim")
    os.lchown(path, 12345, 12345)


# What lies there -> what is said; "" where it is written to
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (Path.mkdir, "is a folder; name a file"),
    "link-to-folder": (lambda path: path.symlink_to(path.parent), "is a folder; name a file"),
    "cycle": (NO_FILES["cycle"], "leads in a circle"),
    "full": (lambda path: path.symlink_to("/dev/full"), "No space left"),
    "others-link": (_others_link, "is a link that somebody else made"),
    "nothing": (NO_FILES["nothing"], ""),
    "own-link": (lambda path: path.symlink_to(path.parent / "victim"), ""),
    "dangling": (NO_FILES["dangling"], ""),
    "hard-link": (lambda path: path.hardlink_to(path.parent / "victim"), ""),
    "read-only": (lambda path: path.touch(0o400), ""),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("name", PLACES)
def test_a_place(name: str, writer: Callable[[Path], None], tmp_path: Path) -> None:
    make, said = PLACES[name]
    if name == "others-link" and os.geteuid() != 0:
        pytest.skip("only root can lay a link for somebody else")
    (tmp_path / "victim").write_text("old")
    path = tmp_path / "out"
    make(path)
    before = tree(tmp_path)
    if said:
        refused(lambda: writer(path), said)
        assert tree(tmp_path) == before
    else:
        writer(path)
        assert path.is_symlink() == (name in ("nothing", "own-link", "dangling"))
        assert os.path.realpath("/dev/null") == "/dev/null"
        assert not Path("/dev/null").is_file()
        if name != "nothing":
            assert "new" in path.read_text()
        if name == "hard-link":
            assert (tmp_path / "victim").read_text() == "old"
        assert set(os.listdir(tmp_path)) <= {"victim", "out", "there is none"}


NOWHERE = ["file/out", "file/sub/out", "x" * 300, "/proc/there/is/none", "/dev/null/out", "a/" * 3000 + "out"]


@pytest.mark.parametrize("writer", [*WRITERS, write_folder])
@pytest.mark.parametrize("name", NOWHERE, ids=lambda name: name[:20])
def test_a_place_that_cannot_be(name: str, writer: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    before = tree(tmp_path)
    refused(lambda: writer(tmp_path / name), "cannot be made|cannot write|could not take")
    assert tree(tmp_path) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_a_fifo_is_written_to(writer: Callable[[Path], None], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "fifo").read_text()))
    reader.start()
    writer(tmp_path / "fifo")
    reader.join(30)
    assert "new" in read[0]
    assert (tmp_path / "fifo").is_fifo()


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "file": (Path.touch, "a file of that name"),
    "fifo": (NO_FILES["fifo"], "a file of that name"),
    "device": (NO_FILES["device"], "a file of that name"),
    "dangling": (NO_FILES["dangling"], "a file of that name"),
    "cycle": (NO_FILES["cycle"], "a file of that name"),
    "folder-for-file": (lambda path: (path / "config").mkdir(parents=True), "cannot write"),
    "file-for-folder": (lambda path: (path.mkdir(), (path / "sub").touch()), "cannot write"),
    "link-for-folder": (lambda path: (path.mkdir(), (path / "sub").symlink_to("../victim")), "is a link to another"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder(name: str, tmp_path: Path) -> None:
    make, said = FOLDERS[name]
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("old")
    make(tmp_path / "out")
    before = {path: what for path, what in tree(tmp_path).items() if path != "out/config"}
    refused(lambda: write_folder(tmp_path / "out"), said)
    after = {path: what for path, what in tree(tmp_path).items() if path != "out/config"}
    assert after == before


@pytest.mark.parametrize("name", ["file", "fifo", "device", "dangling", "cycle"])
def test_the_folder_of_a_training(name: str, tmp_path: Path) -> None:
    FOLDERS[name][0](tmp_path / "out")
    before = tree(tmp_path)
    if name != "dangling":  # a folder is made where it leads
        refused(lambda: check_output(tmp_path / "out"), "is a file|circle")
    assert tree(tmp_path) == before


# --- disks -----------------------------------------------------------------------------------------------------------


@contextmanager
def file_size(nbytes: int) -> Iterator[None]:
    """Let no file of this process become larger: the system's own error, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [0, 1000, 100_000])
@pytest.mark.parametrize("kind", ["text", "lines", "folder", "merge", "save", "evict"])
def test_a_file_that_may_not_grow(kind: str, nbytes: int, folders: tuple[Path, Path], model: Any) -> None:
    base, adapter = folders
    out = base.parent / "out"
    large = "x" * 200_000
    bank: Any = None
    if kind in ("save", "evict") and nbytes:
        pytest.skip("an adapter is smaller")
    if kind == "evict":
        bank = ia3.AdapterBank(model, 1, folder=base.parent / "evicted")
        bank.load("a", VECTORS)

    def write() -> None:
        if kind == "text":
            atomic_write_text(out, large)
        elif kind == "lines":
            with json_lines(out) as line:
                line({"text": large})
        elif kind == "folder":
            with atomic_folder(out) as folder:
                (folder / "a").write_text(large)
        elif kind == "merge":
            write_merged(plan_merge(base, adapter, out), out)
        elif kind == "save":
            model.save_pretrained(out)
        else:
            bank.load("b", VECTORS)

    before = tree(base.parent)
    with file_size(nbytes):
        refused(write, "File too large|file size")
    if kind != "lines":  # whose lines are written as they come
        assert tree(base.parent) == before
    if bank is not None:
        assert list(bank) == ["a"]
        assert bank.report().resident == 1


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT, errno.EACCES])
@pytest.mark.parametrize("call", ["rename", "mkdir", "fsync"])
def test_a_call_that_fails(call: str, error: int, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = folders
    out = base.parent / "out"
    real = getattr(os, call)

    def failing(*arguments: Any, **more: Any) -> Any:
        if "out" in str(arguments[0]) or call == "fsync":
            raise OSError(error, os.strerror(error))
        return real(*arguments, **more)

    plan = plan_merge(base, adapter, out)
    before = tree(base.parent)
    monkeypatch.setattr(os, call, failing)
    attack = (lambda: atomic_write_text(out, "new")) if call == "fsync" else lambda: write_merged(plan, out)
    refused(attack, f"cannot write .*{os.strerror(error)}")
    monkeypatch.undo()
    assert tree(base.parent) == before


def test_what_is_said_of_a_name_with_control_characters(
    folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = folders
    (base / "\x1b]0;owned\x07.bin").write_bytes(b"")
    out = base.parent / "out\x1b[31m"
    with bounds(seconds=5):
        assert main(["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(out)]) == 0
    said = "".join(capsys.readouterr())
    assert "\x1b]0" not in said
    assert r"\x1b]0;owned" in said
    assert r"out\x1b[31m" in said
