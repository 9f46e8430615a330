"""Merging in place, stopped at every step: the weights are the original's or the merged ones' again, never between."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import ia3
from ia3.cli import main
from ia3.streaming import patch
from ia3.streaming.journal import Disk
from ia3.streaming.state import BLOCK_NAME, JOURNAL_NAME, KEPT_NAME, SCRATCH_NAME

from .test_streaming_merge import contents

# Two blocks for most tensors.
BLOCK_BYTES = 2048
OWN_FILES = (BLOCK_NAME, JOURNAL_NAME, KEPT_NAME, SCRATCH_NAME)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint of two shards, and an adapter with every kind of block: rows, columns, a bias, a whole head."""
    where = tmp_path_factory.mktemp("pair")
    base, adapter = where / "base", where / "adapter"
    base.mkdir()
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)
    shapes = {"a.k": (24, 64), "a.o": (64, 24), "b.k": (24, 64), "b.o": (64, 24)}
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    weights |= {
        "a.k.bias": torch.randn(24, generator=generator),
        "head.weight": torch.randn(3, 64, generator=generator),
    }
    weights = {name: weight.to(torch.bfloat16) for name, weight in weights.items()}
    weights["a.k.weight"][0, :4] = torch.tensor([0.0, -0.0, float("inf"), float("nan")])
    places = {name: f"model-0000{1 + name.startswith('b')}-of-00002.safetensors" for name in weights}
    for file in sorted(set(places.values())):
        save_file({name: weights[name] for name in weights if places[name] == file}, base / file)
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    (base / "config.json").write_text("{}")
    config = ia3.IA3Config(target_modules=["k", "o"], feedforward_modules=["o"], modules_to_save=["head"])
    (adapter / "adapter_config.json").write_text(config.to_json())
    vectors = {
        f"base_model.model.{name}.ia3_l": 1
        + 0.3 * torch.randn((1, 24) if name.endswith("o") else (24, 1), generator=generator)
        for name in shapes
    }
    vectors["base_model.model.b.k.ia3_l"][5] = 0.0
    vectors["base_model.model.head.weight"] = torch.randn(3, 64, generator=generator)
    save_file(vectors, adapter / "adapter_model.safetensors")
    return base, adapter


@pytest.fixture(scope="module")
def states(pair: tuple[Path, Path]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The files' contents before a merge and after one, without what the merge keeps."""
    base, adapter = pair
    folder = base.parent / "merged"
    shutil.copytree(base, folder)
    patch.merge_in_place(folder, adapter, block_bytes=BLOCK_BYTES)
    return contents(base), weights_of(folder)


def weights_of(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name not in OWN_FILES}


class PowerLoss(BaseException):
    """The machine stopped."""


class QuickDisk(Disk):
    """A disk that nobody waits for: what is lost, these tests decide."""

    def sync(self, file: int) -> None:
        pass

    def _sync_folder(self, folder: Path) -> None:
        pass


class LossyDisk(QuickDisk):
    """A disk that stops at one of its operations, and then has lost part of what was not forced to it.

    What was written since a file's last ``sync`` is lost sector by sector, by chance; the operation at which the disk
    stops, if it writes, is done in part.
    """

    SECTOR = 64

    def __init__(self, last: float, seed: int) -> None:
        self.steps, self._last, self._chance = 0, last, random.Random(seed)
        self._pending: dict[int, tuple[int, list[tuple[int, bytes, int | None]]]] = {}

    def _step(self) -> bool:
        """Whether this operation is the one that fails."""
        self.steps += 1
        if self.steps > self._last:
            raise PowerLoss
        return self.steps == self._last

    def _stop(self) -> None:
        for file, writes in self._pending.values():
            for start, old, size in reversed(writes):
                for place in range(0, len(old), self.SECTOR):
                    if self._chance.random() < 0.5:
                        os.pwrite(file, old[place : place + self.SECTOR], start + place)
                if size is not None and self._chance.random() < 0.5:
                    os.ftruncate(file, size)
            os.close(file)
        raise PowerLoss

    def create(self, path: Path) -> None:
        if self._step():
            self._stop()
        super().create(path)

    def write(self, file: int, data: memoryview | bytes, start: int) -> None:
        stops = self._step()
        size = os.fstat(file).st_size
        view = memoryview(data)
        if stops:
            view = view[: self._chance.randrange(len(view) + 1)]
        key = os.fstat(file).st_ino
        if key not in self._pending:
            self._pending[key] = (os.open(f"/proc/self/fd/{file}", os.O_RDWR), [])
        old = os.pread(file, len(view), start)
        grown = start + len(view) > size  # that, too, can be lost
        self._pending[key][1].append((start, old.ljust(len(view), b"\0"), size if grown else None))
        super().write(file, view, start)
        if stops:
            self._stop()

    def sync(self, file: int) -> None:
        if self._step():
            self._stop()
        held = self._pending.pop(os.fstat(file).st_ino, None)
        if held:
            os.close(held[0])

    def truncate(self, file: int, size: int) -> None:
        if self._step():
            self._stop()
        super().truncate(file, size)

    def rename(self, old: Path, new: Path) -> None:
        if self._step():
            self._stop()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        if self._step():
            self._stop()
        super().remove(path)


def run(operation: Callable[[Disk], object], disk: Disk) -> bool:
    """Whether the operation came to its end."""
    try:
        operation(disk)
    except PowerLoss:
        return False
    except ia3.IA3Error as error:  # undoing after the error met the same stopped disk
        if not isinstance(error.__cause__, PowerLoss):
            raise
        return False
    return True


def steps_of(operation: Callable[[Disk], object]) -> int:
    disk = LossyDisk(float("inf"), 0)
    operation(disk)
    return disk.steps


def prepare(folder: Path, state: dict[str, bytes]) -> None:
    """Make the folder hold exactly these files."""
    for path in folder.iterdir():
        if path.name not in state:
            path.unlink()
    for name, data in state.items():
        (folder / name).write_bytes(data)


def unmerge_if_merged(folder: Path) -> None:
    """What a user does after a crash who wants the original; there may be nothing to undo."""
    is_merged = (folder / JOURNAL_NAME).exists() or (folder / KEPT_NAME).exists()
    with contextlib.nullcontext() if is_merged else pytest.raises(ia3.IA3Error, match="no adapter is merged"):
        patch.unmerge(folder, disk=QuickDisk())


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("way", ["undo", "finish"])
def test_a_merge_stopped_at_any_step(
    way: str, seed: int, pair: tuple[Path, Path], states: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    adapter, (original, merged), folder = pair[1], states, tmp_path

    def merge(disk: Disk) -> object:
        return patch.merge_in_place(folder, adapter, disk=disk, block_bytes=BLOCK_BYTES)

    prepare(folder, original)
    count = steps_of(merge)
    assert count > 50
    for last in range(1, count + 1):
        prepare(folder, original)
        assert not run(merge, LossyDisk(last, seed * 1000 + last))
        if way == "undo":
            unmerge_if_merged(folder)
            assert contents(folder) == original, last
        elif not (folder / KEPT_NAME).exists():
            merge(QuickDisk())
            assert weights_of(folder) == merged, last
            patch.unmerge(folder, disk=QuickDisk())
            assert contents(folder) == original, last


@pytest.mark.parametrize("seed", range(2))
def test_an_undoing_stopped_at_any_step(
    seed: int, pair: tuple[Path, Path], states: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    original, folder = states[0], tmp_path
    prepare(folder, original)
    patch.merge_in_place(folder, pair[1], disk=QuickDisk(), block_bytes=BLOCK_BYTES)
    whole = contents(folder)
    count = steps_of(lambda disk: patch.unmerge(folder, disk=disk))
    assert contents(folder) == original
    for last in range(1, count + 1):
        prepare(folder, whole)
        assert not run(lambda disk: patch.unmerge(folder, disk=disk), LossyDisk(last, seed * 1000 + last))
        unmerge_if_merged(folder)
        assert contents(folder) == original, last


def test_recoveries_stopped_again_and_again(
    pair: tuple[Path, Path], states: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    adapter, (original, merged), folder = pair[1], states, tmp_path
    chance = random.Random(0)
    stops = 0
    for _ in range(40):
        prepare(folder, original)
        done = False
        while not done:
            is_undone = chance.random() < 0.3
            if is_undone and not any((folder / name).exists() for name in (JOURNAL_NAME, KEPT_NAME)):
                continue
            if (folder / KEPT_NAME).exists() and not is_undone:
                continue
            disk = LossyDisk(chance.randrange(1, 120), chance.randrange(1 << 30))
            if is_undone:
                done = run(lambda disk: patch.unmerge(folder, disk=disk), disk)
            else:
                done = run(lambda disk: patch.merge_in_place(folder, adapter, disk=disk, block_bytes=BLOCK_BYTES), disk)
            stops += not done
        assert weights_of(folder) == (original if is_undone else merged)
    assert stops > 20


def test_an_error_undoes_what_was_done(
    pair: tuple[Path, Path], states: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    """A full disk, and Ctrl-C: both leave the folder as it was."""

    class Failing(QuickDisk):
        def __init__(self, error: BaseException) -> None:
            self.left, self.error = 40, error

        def write(self, file: int, data: memoryview | bytes, start: int) -> None:
            self.left -= 1
            if self.left == 0:
                super().write(file, data[: len(data) // 2], start)
                raise self.error
            super().write(file, data, start)

    prepare(tmp_path, states[0])
    with pytest.raises(ia3.IA3Error, match=r"No space left on device\); its weights are as they were"):
        patch.merge_in_place(
            tmp_path, pair[1], disk=Failing(OSError(28, "No space left on device")), block_bytes=BLOCK_BYTES
        )
    assert contents(tmp_path) == states[0]
    with pytest.raises(KeyboardInterrupt):
        patch.merge_in_place(tmp_path, pair[1], disk=Failing(KeyboardInterrupt()), block_bytes=BLOCK_BYTES)
    assert contents(tmp_path) == states[0]


def interrupted(pair: tuple[Path, Path], states: tuple[dict[str, bytes], dict[str, bytes]], folder: Path) -> None:
    """Leave a half-merged checkpoint in the folder."""
    prepare(folder, states[0])
    disk = LossyDisk(60, 0)
    assert not run(lambda disk: patch.merge_in_place(folder, pair[1], disk=disk, block_bytes=BLOCK_BYTES), disk)
    assert (folder / JOURNAL_NAME).exists()


def test_other_commands_say_that_a_merge_was_interrupted(
    pair: tuple[Path, Path],
    states: tuple[dict[str, bytes], dict[str, bytes]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    interrupted(pair, states, folder)
    before = contents(folder)
    out = str(tmp_path / "out")
    for command in (
        ["generate", str(folder), "--prompt", "a"],
        ["finetune", str(folder), "data", "--output", out],
        ["merge", "--base", str(folder), "--adapter", str(pair[1]), "--out", out],
    ):
        assert main(command) == 2
        assert "was interrupted" in capsys.readouterr().err
    assert contents(folder) == before


def test_another_adapter_undoes_the_interrupted_one_first(
    pair: tuple[Path, Path], states: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    folder, other = tmp_path / "model", tmp_path / "other"
    folder.mkdir()
    shutil.copytree(pair[1], other)
    vectors = load_file(other / "adapter_model.safetensors")
    save_file({name: vector * 2 for name, vector in vectors.items()}, other / "adapter_model.safetensors")
    prepare(folder, states[0])
    patch.merge_in_place(folder, other)
    expected = weights_of(folder)
    interrupted(pair, states, folder)
    said: list[str] = []
    patch.merge_in_place(folder, other, say=said.append)
    assert said == ["an interrupted merge is undone first"]
    assert weights_of(folder) == expected
    patch.unmerge(folder, disk=QuickDisk())
    assert contents(folder) == states[0]


def test_two_processes_do_not_merge_at_once(
    pair: tuple[Path, Path], states: tuple[dict[str, bytes], dict[str, bytes]], tmp_path: Path
) -> None:
    prepare(tmp_path, states[0])

    class Second(QuickDisk):
        def rename(self, old: Path, new: Path) -> None:
            with pytest.raises(ia3.IA3Error, match="another process"):
                patch.merge_in_place(tmp_path, pair[1])
            super().rename(old, new)

    patch.merge_in_place(tmp_path, pair[1], disk=Second())
    assert weights_of(tmp_path) == states[1]


def test_killed_at_every_step_and_at_random(pair: tuple[Path, Path], tmp_path: Path) -> None:
    script = Path(__file__).parent / "scripts" / "kill_merges.py"
    arguments = [*map(str, pair), str(tmp_path / "model")]
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 70
