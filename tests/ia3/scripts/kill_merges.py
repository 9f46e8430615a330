"""Kills merges in place at every step and at random moments: `kill_merges.py BASE ADAPTER SCRATCH`; prints how many.

A process of its own, of one thread, because it forks. It exits with an assertion if a file is not whole after recovery.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch

from ia3.streaming import patch
from ia3.streaming.journal import Disk
from ia3.streaming.state import JOURNAL_NAME, KEPT_NAME, SCRATCH_NAME

BLOCK_BYTES = 2048
RANDOM_KILLS = 20


class UnforcedDisk(Disk):
    """Forces nothing to the disk: a killed process loses nothing that it wrote."""

    def sync(self, file: int) -> None:
        pass

    def _sync_folder(self, folder: Path) -> None:
        pass


class KillingDisk(UnforcedDisk):
    """Kills its process at the operation with this number; in the middle of it, if it writes."""

    def __init__(self, last: int) -> None:
        self._left = last

    def _is_last(self) -> bool:
        self._left -= 1
        return self._left == 0

    def create(self, path: Path) -> None:
        if self._is_last():
            _die()
        super().create(path)

    def write(self, file: int, data: memoryview | bytes, start: int) -> None:
        if self._is_last():
            os.pwrite(file, data[: len(data) // 2], start)
            _die()
        super().write(file, data, start)

    def sync(self, file: int) -> None:
        if self._is_last():
            _die()

    def rename(self, old: Path, new: Path) -> None:
        if self._is_last():
            _die()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        if self._is_last():
            _die()
        super().remove(path)


def _die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("a process outlived SIGKILL")


def main(base: Path, adapter: Path, folder: Path) -> int:
    """Returns how many merges were killed."""

    def weights() -> dict[str, bytes]:
        own = (JOURNAL_NAME, KEPT_NAME, SCRATCH_NAME)
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in own}

    def renew() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(base, folder)

    def merge(disk: Disk) -> None:
        patch.merge_in_place(folder, adapter, disk=disk, block_bytes=BLOCK_BYTES)

    def merge_in_child(disk: Disk, delay: float | None = None) -> bool:
        """Whether the child was killed."""
        renew()
        child = os.fork()
        if not child:
            try:
                merge(disk)
            finally:
                os._exit(0)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])

    def recover(finishes: bool) -> None:
        if finishes and not (folder / KEPT_NAME).exists():
            merge(UnforcedDisk())
            assert weights() == merged, "a merge that was finished is not the merge"
        elif (folder / JOURNAL_NAME).exists() or (folder / KEPT_NAME).exists():
            patch.unmerge(folder, disk=UnforcedDisk())
            assert weights() == original, "a merge that was undone is not undone"
        else:
            assert weights() == original, "weights changed without a journal"

    renew()
    original = weights()
    start = time.perf_counter()
    merge(UnforcedDisk())
    duration = time.perf_counter() - start
    merged = weights()
    assert merged != original
    kills = 0
    while merge_in_child(KillingDisk(kills + 1)):
        kills += 1
        recover(finishes=kills % 2 == 0)
    chance = random.Random(0)
    for index in range(RANDOM_KILLS):
        kills += merge_in_child(UnforcedDisk(), chance.uniform(0, 1.2 * duration))
        recover(finishes=index % 2 == 0)
    return kills


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(main(*map(Path, sys.argv[1:4])))
