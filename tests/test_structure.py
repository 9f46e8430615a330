"""The house keeps its order: imports and includes go one way, and the core knows no framework."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def _order(package: str) -> tuple[str, ...]:
    """Return the names of a package in the order of docs/architecture.md: each may import those before it."""
    block = (ROOT / "docs" / "architecture.md").read_text().split("```")[1]
    found = re.search(rf"^{package} +((?:.*\n)(?: +.*\n)*)", block, re.MULTILINE)
    assert found is not None, f"docs/architecture.md has no order for {package}"
    return tuple(found.group(1).split())


KERNELS_ORDER = _order("ia3_kernels")
IA3_ORDER = _order("ia3")
VLLM_ORDER = _order("ia3_vllm")
CSRC_ORDER = _order("csrc")


def _imports(path: Path) -> Iterator[str]:
    """Absolute names of what a module imports, wherever in the file it does."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    package = tuple(part for part in package if part != "python")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *(node.module or "").split("."))).strip(".")
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _modules(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no modules"
    return found


def _is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_ia3_kernels_knows_torch_and_nothing_above_it() -> None:
    for path in _modules("ia3_kernels"):
        for name in _imports(path):
            for above in ("transformers", "peft", "ia3", "ia3_vllm", "bench", "tests"):
                assert not _is_within(name, above), f"{path.relative_to(ROOT)} imports {name}"


def test_ia3_kernels_imports_go_one_way() -> None:
    for path in _modules("ia3_kernels"):
        parts = path.relative_to(ROOT / "ia3_kernels").with_suffix("").parts
        rank = KERNELS_ORDER.index(parts[0])
        for name in _imports(path):
            if not name.startswith("ia3_kernels."):
                continue
            first = name.split(".")[1]
            if first in KERNELS_ORDER and first != parts[0]:
                assert KERNELS_ORDER.index(first) < rank, f"{path.relative_to(ROOT)} imports {name}"


def test_ia3_imports_go_one_way() -> None:
    for package, order in (("ia3", IA3_ORDER), ("ia3_vllm", VLLM_ORDER)):
        for path in _modules(f"python/{package}"):
            parts = path.relative_to(ROOT / "python" / package).with_suffix("").parts
            rank = order.index(parts[0])
            for name in _imports(path):
                first = name.split(".")[1] if name.startswith(f"{package}.") else ""
                if first in order and first != parts[0] and parts[0] != "__init__":
                    assert order.index(first) < rank, f"{path.relative_to(ROOT)} imports {name}"


def test_ia3_knows_no_plugin_and_no_engine() -> None:
    for path in _modules("python/ia3"):
        for name in _imports(path):
            assert not any(_is_within(name, above) for above in ("ia3_vllm", "vllm")), f"{path} imports {name}"


def test_no_modules_import_each_other() -> None:
    for folder, package in (("ia3_kernels", "ia3_kernels"), ("python/ia3", "ia3"), ("python/ia3_vllm", "ia3_vllm")):
        root = ROOT / folder
        names = {".".join((package, *path.relative_to(root).with_suffix("").parts)) for path in _modules(folder)}
        graph = {}
        for path in _modules(folder):
            own = ".".join((package, *path.relative_to(root).with_suffix("").parts))
            graph[own] = {name for name in _imports(path) if name in names and name != own}
        done: set[str] = set()

        def visit(name: str, above: tuple[str, ...], graph: Any = graph, done: Any = done) -> None:
            assert name not in above, " imports ".join((*above[above.index(name) :], name))
            if name not in done:
                for other in sorted(graph[name]):
                    visit(other, (*above, name))
                done.add(name)

        for name in sorted(names):
            visit(name, ())


def test_ia3_uses_the_operators_and_no_kernel_file() -> None:
    for path in (*_modules("python/ia3"), *_modules("python/ia3_vllm")):
        for name in _imports(path):
            for hidden in ("ia3_kernels._C", "ia3_kernels.backends.native", "ia3_kernels.autograd", "bench", "tests"):
                assert not _is_within(name, hidden), f"{path.relative_to(ROOT)} imports {name}"


def test_the_page_names_every_room_and_no_other() -> None:
    python = (("ia3_kernels", KERNELS_ORDER), ("python/ia3", IA3_ORDER), ("python/ia3_vllm", VLLM_ORDER))
    for folder, order in (*python, ("csrc", CSRC_ORDER)):
        there = {
            path.stem
            for path in (ROOT / folder).iterdir()
            if path.suffix == ".py" or (path.is_dir() and path.name != "__pycache__")
        }
        assert there - {"backends"} == set(order) - {"backends"}, folder
    page = (ROOT / "docs" / "architecture.md").read_text()
    assert page.count("\n") <= 120, "two screens"
    names = re.findall(r"`([\w/]+\.(?:py|cpp|h|cu))`", page)
    sources = [
        *ROOT.glob("csrc/**/*"),
        *ROOT.glob("ia3_kernels/**/*"),
        *ROOT.glob("python/**/*"),
        *ROOT.glob("*/*"),
    ]
    for name in names:
        assert any(str(path).endswith("/" + name) for path in (*sources, *ROOT.glob("bench/**/*"))), name


def test_nothing_imports_bench() -> None:
    for folder in ("ia3_kernels", "python/ia3", "python/ia3_vllm"):
        for path in _modules(folder):
            assert not any(_is_within(name, "bench") for name in _imports(path)), path


def test_includes_go_one_way_and_the_core_knows_no_torch() -> None:
    sources = [path for kind in ("*.h", "*.cpp", "*.cu", "*.cuh") for path in (ROOT / "csrc").rglob(kind)]
    assert sources
    for path in sources:
        folder = path.relative_to(ROOT / "csrc").parts[0]
        for include in re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()):
            if folder != "torch":
                assert not include.startswith(("torch/", "ATen/", "c10/", "pybind11/")), f"{path} includes {include}"
            match = re.match(r"\.\./(\w+)/", include)
            if match:
                other = match.group(1)
                assert CSRC_ORDER.index(other) < CSRC_ORDER.index(folder), f"{path} includes {include}"
                assert not (folder == "cuda" and other == "cpu"), f"{path} includes {include}"


def test_every_native_source_is_in_the_build() -> None:
    listed = (ROOT / "CMakeLists.txt").read_text()
    for path in (ROOT / "csrc").rglob("*.cpp"):
        assert str(path.relative_to(ROOT)) in listed, f"CMakeLists.txt does not list {path.relative_to(ROOT)}"
