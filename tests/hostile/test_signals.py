"""Ctrl-C, SIGTERM and SIGKILL at every moment: what is said about what is left is true, and leavings go."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich import filesize

import ia3
from ia3.cli import boundary
from ia3.cli.app import main
from ia3.files import atomic_folder, atomic_write_text
from ia3.merging import checkpoint, shards

from .harness import bounds, tree

SIGNALS = [signal.SIGINT, signal.SIGTERM]


def _arguments(folders: tuple[Path, Path]) -> list[str]:
    base, adapter = folders
    return ["merge", "--base", str(base), "--adapter", str(adapter), "--out", str(base.parent / "out")]


def _after(function: Callable[..., Any], number: int) -> Callable[..., Any]:
    def call(*arguments: Any, **more: Any) -> Any:
        result = function(*arguments, **more)
        os.kill(os.getpid(), number)
        time.sleep(0)  # where the interpreter looks for it
        return result

    return call


# A moment: after which call of the merge's the signal comes
MOMENTS: dict[str, tuple[Any, str]] = {
    "plan": (checkpoint, "plan_merge"),
    "scratch": (checkpoint, "atomic_folder"),
    "index": (shards.json, "loads"),
    "thread-pool": (shards.torch, "set_num_threads"),
    "copied": (checkpoint, "write_copy"),
    "config": (checkpoint.json, "dumps"),
    "mkdtemp": (__import__("tempfile"), "mkdtemp"),
    "mkdir": (os, "mkdir"),
    "rename": (os, "rename"),
    "rmtree": (__import__("shutil"), "rmtree"),
    "said": (filesize, "decimal"),
}


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_merge(
    moment: str, number: int, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    out, before = folders[0].parent / "out", tree(folders[0].parent)
    place, name = MOMENTS[moment]
    with bounds(seconds=30, nbytes=2 << 30):
        with monkeypatch.context() as patch:
            patch.setattr(place, name, _after(getattr(place, name), number))
            code = main(_arguments(folders))
        said = capsys.readouterr()
        assert code == 128 + number, (code, said)
        assert "Traceback" not in said.err
        (line,) = [line for line in said.err.splitlines() if line.startswith("Interrupted:")]
        if "is whole" in line:
            assert (out / "config.json").exists()
        else:
            assert "was not made" in line or "did not finish" in line
            assert not out.exists()
        # What the signal kept from being removed goes with the next run.
        if not out.exists():
            assert main(_arguments(folders)) == 0
    after = {path: what for path, what in tree(folders[0].parent).items() if path.split("/")[0] != "out"}
    assert after == before
    assert ia3.IA3Config.from_pretrained(folders[1])
    assert len(list(out.iterdir())) == len(list(folders[0].iterdir()))


_WORK = """
import sys, time, pathlib
from ia3.cli.app import main
from ia3.merging import shards, checkpoint
copy = shards._copy_changed
def slow(*arguments):
    copy(*arguments)
    sys.stdout.write("copied\\n")
    sys.stdout.flush()
    time.sleep(60)
shards._copy_changed = slow
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process(number: int, folders: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out, before = folders[0].parent / "out", tree(folders[0].parent)
    command = [sys.executable, "-c", _WORK.replace("60", "600" if number == signal.SIGKILL else "1")]
    process = subprocess.Popen(
        [*command, *_arguments(folders)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "copied\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), err
    assert not out.exists()
    left = [path for path in out.parent.iterdir() if path.name.startswith(".out.")]
    if number == signal.SIGTERM:
        assert "was not made" in err
        assert left == []
    else:
        assert len(left) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(_arguments(folders)) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert (f"{left[0].name}, which a command that was killed had left behind, is removed" in said) if left else True
    after = {path: what for path, what in tree(out.parent).items() if path.split("/")[0] != "out"}
    assert after == before


def _interrupted(number: int, work: Callable[[], object]) -> None:
    with pytest.raises((KeyboardInterrupt, SystemExit)), boundary._terminated_cleanly():
        work()


@pytest.mark.parametrize("number", SIGNALS)
def test_what_a_shell_lets_a_job_ignore_stays_ignored(number: int) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with boundary._terminated_cleanly():
            os.kill(os.getpid(), number)
            time.sleep(0)
            assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("place", ["new", "there"])
def test_a_folder_is_replaced_whole_or_not_at_all(
    place: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    if place == "there":
        out.mkdir()
        for name in "abc":
            (out / name).write_text("old")
    real = os.replace

    def replace(*arguments: Any) -> None:
        real(*arguments)
        os.kill(os.getpid(), number)

    def work() -> None:
        with atomic_folder(out) as folder:
            for name in "abc":
                (folder / name).write_text("new")
            if place == "new":
                os.kill(os.getpid(), number)

    monkeypatch.setattr(os, "replace", replace)
    _interrupted(number, work)
    assert [path.read_text() for path in sorted(out.glob("*"))] == (["old"] * 3 if place == "there" else [])
    assert os.listdir(tmp_path) == (["out"] if place == "there" else [])


@pytest.mark.parametrize("number", SIGNALS)
def test_a_file_is_replaced_whole_or_not_at_all(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").write_text("old")
    monkeypatch.setattr(os, "fsync", _after(os.fsync, number))
    _interrupted(number, lambda: atomic_write_text(tmp_path / "out", "new"))
    assert (tmp_path / "out").read_text() == "old"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("layer", [0, 1, 3, 5])
@pytest.mark.parametrize("change", ["merge", "unmerge", "swap"])
def test_a_merge_in_memory(change: str, layer: int, number: int, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers or none hold the adapter, and unmerging restores every bit."""
    from ia3_kernels.moves import Move

    model.add_adapter("other", ia3.IA3Config(task_type="CAUSAL_LM"))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    if change != "merge":
        model.merge_adapter()
    during = {name: value.clone() for name, value in model.state_dict().items()}
    # What runs each weight is asked twice: of all of them first, then of each before it changes.
    count, weights = 0, len(model.base_model.scaled_layers())
    real: Any = Move.operator

    def interrupted(move: Move) -> str:
        nonlocal count
        count += 1
        if count == weights + layer + 1:
            os.kill(os.getpid(), number)
        name: str = real.fget(move)
        return name

    monkeypatch.setattr(Move, "operator", property(interrupted))
    work = {
        "merge": model.merge_adapter,
        "unmerge": model.unmerge_adapter,
        "swap": lambda: model.base_model.swap_adapter("default", "other"),
    }[change]
    _interrupted(number, work)
    monkeypatch.undo()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in during.items())
    if change != "merge":
        model.unmerge_adapter()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("number", SIGNALS)
def test_answers_that_came_stay(
    number: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ia3.cli import answers

    (tmp_path / "requests").write_text('{"prompt": "a"}\n' * 3)
    monkeypatch.setattr(answers, "generate", _after(lambda *_, **__: [("text", 1)], number))
    given = ["generate", tiny_model, "--requests", tmp_path / "requests", "-o", tmp_path / "out", "--batch-size", 1]
    (tmp_path / "requests").write_text("hello\n" + '{"prompt": "a"}\n' * 3)
    assert main([*map(str, given), "--dtype", "float32", "--device", "cpu"]) == 128 + number
    said = capsys.readouterr().err
    assert re.search("Interrupted: .*did not finish", said)
    assert (tmp_path / "out").read_text().count('"line": 1, "error"') == 1
