"""What `make` says."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_installing_says_nothing_of_registries() -> None:
    """pip warns of each registry that lacks a package unless it is quiet twice."""
    command = ["make", "--dry-run", "--always-make", "build"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    installs = [line for line in done.stdout.splitlines() if "pip install" in line]
    assert len(installs) == 4
    assert all(line.count("--quiet") == 2 for line in installs)
