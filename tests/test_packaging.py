"""What is shipped: the source distribution builds, and the wheel holds every package."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def _build(kind: str, source: Path, out: Path) -> Path:
    """Build ``source`` as pip would without isolation, and without native kernels; returns the distribution."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    environment = os.environ | {"IA3_SKIP_NATIVE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (built,) = out.iterdir()
    return built


def test_what_is_shipped_is_whole(tmp_path: Path) -> None:
    copied = tmp_path / "source"
    kinds = {".h", ".cpp", ".cu", ".cuh", ".py", ".json", ".typed"}
    found = (
        path
        for folder in ("csrc", "ia3_kernels", "python/ia3", "python/ia3_vllm")
        for path in (ROOT / folder).rglob("*")
    )
    shipped = [
        str(path.relative_to(ROOT))
        for path in found
        if path.suffix in kinds and path.parent != ROOT / "ia3_kernels" / "include"
    ]
    for name in [*shipped, "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "README.md", "LICENSE"]:
        if (ROOT / name).is_file():
            (copied / name).parent.mkdir(parents=True, exist_ok=True)
            (copied / name).write_bytes((ROOT / name).read_bytes())
    for folder in ("sdist", "wheel", "unpacked"):
        (tmp_path / folder).mkdir()

    sdist = _build("sdist", copied, tmp_path / "sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    missing = [
        name for name in [*shipped, "CMakeLists.txt"] if (ROOT / name).is_file() and not (unpacked / name).is_file()
    ]
    assert missing == []

    wheel = _build("wheel", unpacked, tmp_path / "wheel")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {
        name.removeprefix("python/") for name in shipped if not name.startswith("csrc/") and (ROOT / name).is_file()
    }
    assert sorted(wanted - inside) == []
