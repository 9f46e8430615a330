"""Kills merges before each of their operations on files, then at random moments: `kill_merges.py BASE ADAPTER OUT`.

A process of its own, of one thread, because it forks. What is whole is renamed to `whole-1`, `whole-2`, … beside OUT.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import torch

from ia3.merging.checkpoint import MergePlan, plan_merge, write_merged

RANDOM_KILLS = 10


def _merge(plan: MergePlan, out: Path, steps: int) -> None:
    """Merge, and be killed before the operation with this number; 0: before none."""

    def audit(event: str, arguments: object) -> None:
        nonlocal steps
        if event == "open" or event.startswith(("os.", "shutil.", "tempfile.", "fcntl.")):
            steps -= 1
            if not steps:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    write_merged(plan, out)


def main(base: Path, adapter: Path, out: Path) -> None:
    """Fail with an assertion where a merge ends and leaves nothing."""
    plan, chance = plan_merge(base, adapter, out), random.Random(0)
    duration, kills, whole, tries = 0.0, 0, 0, 0
    while tries < RANDOM_KILLS:
        tries += whole > 0
        start = time.perf_counter()
        child = os.fork()
        if not child:
            try:
                _merge(plan, out, 0 if whole else kills + 1)
            finally:
                os._exit(0)
        if whole:
            time.sleep(chance.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += was_killed
        assert out.exists() or was_killed, "a merge ended and left nothing"
        if out.exists():
            duration = duration or time.perf_counter() - start
            whole += 1
            out.rename(out.with_name(f"whole-{whole}"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    main(*map(Path, sys.argv[1:4]))
