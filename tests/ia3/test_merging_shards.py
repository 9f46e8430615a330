"""The files of a merge on disk: whatever stops it leaves nothing under the output's name, and the base as it was."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ia3
from ia3.merging import shards
from ia3.merging.checkpoint import plan_merge, write_merged

from .conftest import BY_NAME
from .test_merging_checkpoint import contents, merge, refusal, save_pair

KILLS = Path(__file__).parent / "scripts" / "kill_merges.py"


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"], torch.bfloat16, shard="10KB")
    return base, adapter


def test_where_the_copy_may_go(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    for there in (pair[0], pair[1], tmp_path / "link"):
        assert f"{there} exists" in refusal(capsys, *pair, there)
    assert "inside the base" in refusal(capsys, *pair, pair[0] / "merged")
    assert "cannot write" in refusal(capsys, *pair, pair[1] / "README.md" / "merged")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "1,000 free" in refusal(capsys, *pair, tmp_path / "out")


def test_weights_in_other_formats_are_not_copied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They hold the weights unmerged, and an adapter in a model's folder would be applied a second time."""
    base, adapter, _ = save_pair(tmp_path, BY_NAME["llama"])
    (base / "original").mkdir()
    (base / "original" / "consolidated.pth").write_bytes(b"weights")
    (base / "original" / "params.json").write_text("{}")
    (base / "model.fp16.safetensors").write_bytes(b"weights")
    shutil.copy(adapter / "adapter_config.json", base)
    assert merge(base, adapter, tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "adapter_config.json, model.fp16.safetensors, original/consolidated.pth" in out
    kept = {"config.json", "generation_config.json", "model.safetensors", "original/params.json"}
    assert set(contents(tmp_path / "out")) == kept


def test_a_full_disk_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A limit on the size of files makes writing fail as a full disk does, in the middle of a file."""
    plan = plan_merge(*pair, tmp_path / "out")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(ia3.IA3Error, match=r"cannot write .*out: .*; nothing was changed there"):
            write_merged(plan, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_an_interrupt_leaves_nothing(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", 64)
    calls = []

    def stop(count: int) -> None:
        calls.append(count)
        if len(calls) == 3:
            raise KeyboardInterrupt
        time.sleep(0.005)

    with pytest.raises(KeyboardInterrupt):
        write_merged(plan_merge(*pair, tmp_path / "out"), tmp_path / "out", advance=stop)
    assert len(calls) < 60  # a file has some 150 blocks; the other threads' files are not gone through
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}


def test_what_comes_to_be_there_meanwhile_stays(pair: tuple[Path, Path], tmp_path: Path) -> None:
    plan = plan_merge(*pair, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(ia3.IA3Error, match="cannot write"):
        write_merged(plan, tmp_path / "out")
    assert contents(tmp_path / "out") == {"mine": b"mine"}


# --- killed runs -------------------------------------------------------------------------------------------------


def test_killed_runs_leave_nothing_under_the_outputs_name(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapter = pair
    before = contents(base)
    command = [sys.executable, str(KILLS), *map(str, (base, adapter, tmp_path / "out"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(base) == before
    left = [path for path in tmp_path.iterdir() if path.name.startswith(".out.ia3.")]
    assert len(left) <= 1  # each run removed its predecessor's
    assert merge(base, adapter, tmp_path / "out") == 0
    expected = contents(tmp_path / "out")
    wholes = [path for path in tmp_path.iterdir() if path.name.startswith("whole-")]
    assert wholes
    assert all(contents(path) == expected for path in wholes)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """What a killed merge to ``out`` leaves."""
    folder = tmp_path / ".out.ia3.abc"
    (folder / "content").mkdir(parents=True)
    (folder / "content" / "model.safetensors").write_bytes(b"half")
    (folder / "lock").touch()
    return folder


def test_what_a_killed_run_left_is_removed_and_told(
    scratch: Path, pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert merge(*pair, tmp_path / "out") == 0
    assert f"{scratch}, which a command that was killed had left behind, is removed" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "out"}


def test_the_folder_of_a_run_at_work_stays(scratch: Path, pair: tuple[Path, Path], tmp_path: Path) -> None:
    with open(scratch / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert merge(*pair, tmp_path / "out") == 0
        assert contents(scratch)["content/model.safetensors"] == b"half"


@pytest.mark.parametrize("is_hub", [False, True], ids=["files", "links of a hub's cache"])
def test_untouched_shards_can_be_hard_links(
    is_hub: bool, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapter = pair
    if is_hub:
        (tmp_path / "blobs").mkdir()
        for path in base.glob("*.safetensors"):
            path.rename(tmp_path / "blobs" / path.name)
            path.symlink_to(tmp_path / "blobs" / path.name)
    assert merge(base, adapter, tmp_path / "out") == 0
    assert merge(base, adapter, tmp_path / "linked", "--link") == 0
    same = {}
    for path in sorted(base.iterdir()):
        copy, linked = tmp_path / "out" / path.name, tmp_path / "linked" / path.name
        assert copy.read_bytes() == linked.read_bytes()
        assert not linked.is_symlink()
        assert not copy.samefile(path)
        same[path.name] = linked.samefile(path)
        assert not same[path.name] or copy.read_bytes() == path.read_bytes()
    scaled = ("k_proj", "v_proj", "down_proj")
    unchanged = [
        path.name for path in base.glob("*.safetensors") if not any(name in str([*load_file(path)]) for name in scaled)
    ]
    assert sorted(unchanged) == sorted(name for name, is_same in same.items() if is_same) != []

    def fail(*names: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", fail)
    assert merge(base, adapter, tmp_path / "copied", "--link") == 0
    assert contents(tmp_path / "copied") == contents(tmp_path / "out")
