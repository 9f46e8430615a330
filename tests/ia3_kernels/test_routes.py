"""What was measured on a device and how it is chosen by; and launch parameters as pure, total functions."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ia3_kernels import launches, routes, target
from ia3_kernels.launches import Architecture, LinearLaunch
from ia3_kernels.routes import Measurement

LAUNCH = LinearLaunch(128, 128, 64, 1, 8, True, 8, 3)
SHAPE = (512, 1024, 3072)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of a machine whose GPU 0 is an imaginary one."""
    monkeypatch.setenv("IA3_CACHE", str(tmp_path))
    monkeypatch.delenv("IA3_GPU_MATMUL", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["NVIDIA H100 80GB HBM3", "Other"][index])
    routes.of_device.cache_clear()
    yield tmp_path
    routes.of_device.cache_clear()


def _measure(library: float, triton: float, rows: int = SHAPE[0]) -> None:
    key = routes.linear_key(rows, *SHAPE[1:], torch.bfloat16, False)
    routes.write(routes.path_of(0), {key: Measurement(library, triton, LAUNCH)})


def _route(rows: int = SHAPE[0], outputs: int = SHAPE[1], index: int | None = 0) -> routes.Route:
    return routes.linear_route(index, rows, outputs, SHAPE[2], torch.bfloat16, False)


# --- keys and files ----------------------------------------------------------------------------------------------


def test_rows_share_a_key_up_to_a_power_of_two_and_nothing_else_does() -> None:
    def key(
        rows: int = 5, outputs: int = 8, inputs: int = 9, dtype: torch.dtype = torch.bfloat16, t: bool = False
    ) -> str:
        return routes.linear_key(rows, outputs, inputs, dtype, t)

    assert len({key(rows) for rows in (5, 6, 7, 8)}) == 1
    assert len({key(rows) for rows in (0, 1, 2, 3, 5, 9, 17, 4096, 4097)}) == 8  # 0 counts as 1
    others = [key(), key(outputs=9), key(inputs=8), key(outputs=9, inputs=8), key(dtype=torch.float16), key(t=True)]
    assert len(set(others)) == len(others)


@given(st.floats(1e-9, 1e3), st.floats(1e-9, 1e3), st.integers(1, 2**20))
def test_what_is_written_is_read(library: float, triton: float, rows: int) -> None:
    entries = {routes.linear_key(rows, 7, 8, torch.float16, True): Measurement(library, triton, LAUNCH)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "device.json"
        routes.write(path, entries)
        assert routes.read(path) == entries
        assert [file.name for file in path.parent.iterdir()] == ["device.json"]


def test_a_device_has_a_file_in_the_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = routes.path_of(0)
    assert path.parent == cache
    assert path.name.startswith(f"nvidia-h100-80gb-hbm3-torch{torch.__version__.split('+')[0]}")
    assert path.name.endswith(f"{target.kernel_sources()}.json")
    assert routes.path_of(1) != path
    monkeypatch.setattr(target, "version", lambda _: "99.0")
    assert routes.path_of(0) != path


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IA3_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert target.cache_folder() == Path("/somewhere/ia3-kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert target.cache_folder() == Path.home() / ".cache" / "ia3-kernels"
    monkeypatch.setenv("IA3_CACHE", "/elsewhere")
    assert target.cache_folder() == Path("/elsewhere")


def _damage() -> dict[str, bytes]:
    launch = {field.name: 16 for field in fields(LinearLaunch)}
    entry = {"library": 1.0, "triton": 2.0, "launch": launch, "cuda": None, "tile": "auto"}
    without = {**entry, "launch": dict.fromkeys([field.name for field in fields(LinearLaunch)][1:], 16)}
    contents = {
        "a number": 3,
        "a list": [entry],
        "no measurements": {"other": {}},
        "a list of measurements": {"measurements": [entry]},
        "no launch": {"measurements": {"k": {name: value for name, value in entry.items() if name != "launch"}}},
        "no tile": {"measurements": {"k": {name: value for name, value in entry.items() if name != "tile"}}},
        "half a launch": {"measurements": {"k": without}},
        "times in words": {"measurements": {"k": {**entry, "triton": "fast"}}},
        "no times": {"measurements": {"k": {**entry, "library": None}}},
    }
    texts = {name: json.dumps(content).encode() for name, content in contents.items()}
    whole = json.dumps({"measurements": {"k": entry}}).encode()
    return {**texts, "empty": b"", "cut off": whole[: len(whole) // 2], "no text": b"\xff\xfe\x00"}


@pytest.mark.parametrize("damage", _damage())
def test_a_damaged_file_is_as_none(cache: Path, damage: str) -> None:
    path = routes.path_of(0)
    path.write_bytes(_damage()[damage])
    assert routes.read(path) == {}
    assert _route()[0] == "library"
    _measure(2.0, 1.0)  # and is replaced
    assert _route()[0] == "triton"


def test_no_file_and_a_folder_in_its_place_are_as_none(cache: Path) -> None:
    assert routes.read(cache / "none.json") == {}
    assert routes.read(cache) == {}


# --- the choice --------------------------------------------------------------------------------------------------


def test_the_library_runs_where_nothing_was_measured(cache: Path) -> None:
    for index in (0, None):
        route = _route(index=index)
        assert (route.name, route.launch) == ("library", None)
        assert "not measured" in route.reason
    _measure(2.0, 1.0)
    assert _route(outputs=4096)[0] == "library"
    assert _route(rows=1024)[0] == "library"
    assert _route(index=1)[0] == "library"


@pytest.mark.parametrize(("library", "triton", "faster"), [(2e-5, 1e-5, "triton"), (1e-5, 2e-5, "library")])
def test_the_faster_runs_where_it_was_measured(cache: Path, library: float, triton: float, faster: str) -> None:
    _measure(library, triton)
    for rows in (257, 512):
        route = _route(rows=rows)
        assert (route.name, route.launch, route.tile) == (faster, LAUNCH, "auto")
        assert route.reason == f"measured: library {library * 1e6:.1f} us, Triton {triton * 1e6:.1f} us"


@pytest.mark.parametrize(("cuda", "fastest"), [(0.5e-5, "cuda"), (1e-5, "triton"), (3e-5, "triton")])
def test_cuda_kernels_run_where_they_were_measured_to_be_the_fastest(cache: Path, cuda: float, fastest: str) -> None:
    key = routes.linear_key(*SHAPE, torch.bfloat16, False)
    routes.write(routes.path_of(0), {key: Measurement(2e-5, 1e-5, LAUNCH, cuda, "128x256x64 cooperative")})
    route = _route()
    assert (route.name, route.tile) == (fastest, "128x256x64 cooperative")
    assert route.reason.endswith(f"Triton 10.0 us, CUDA {cuda * 1e6:.1f} us")


def test_a_tie_goes_to_the_library(cache: Path) -> None:
    _measure(1.0, 1.0)
    assert _route()[0] == "library"


@pytest.mark.parametrize("wanted", ["library", "triton", " Triton ", "cuda"])
@pytest.mark.parametrize("is_measured", [False, True])
def test_a_route_can_be_asked_for(cache: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, is_measured: bool) -> None:
    for kernels in ("triton", "cuda"):
        monkeypatch.setattr(target, f"{kernels}_problem", lambda: None)
    if is_measured:
        _measure(*((2.0, 1.0) if wanted == "library" else (1.0, 2.0)))
    monkeypatch.setenv("IA3_GPU_MATMUL", wanted)
    route = _route()
    assert route.name == wanted.strip().lower()
    assert route.launch == (LAUNCH if is_measured else None)
    assert route.reason == f"asked for by IA3_GPU_MATMUL={route.name}"


@pytest.mark.parametrize("wanted", ["triton", "cuda"])
def test_a_route_that_is_asked_for_and_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch, wanted: str) -> None:
    monkeypatch.setenv("IA3_GPU_MATMUL", wanted)
    monkeypatch.setattr(target, f"{wanted}_problem", lambda: "there is no GPU.")
    with pytest.raises(RuntimeError, match=rf"^IA3_GPU_MATMUL is '{wanted}', but there is no GPU\.$"):
        _route()


def test_another_route_is_an_error(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IA3_GPU_MATMUL", "cublas")
    with pytest.raises(ValueError, match=r"^IA3_GPU_MATMUL is 'cublas'; expected auto, library, triton or cuda\.$"):
        _route()


def test_what_is_measured_in_this_process_counts_at_once(cache: Path) -> None:
    assert _route()[0] == "library"
    _measure(2.0, 1.0)
    assert _route()[0] == "triton"


@pytest.mark.parametrize("changed", ["launches.py", "triton/linear.py", "triton/functions.py"])
def test_measurements_of_other_sources_do_not_count(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    _measure(2.0, 1.0)
    before = routes.path_of(0)
    package = tmp_path_factory.mktemp("package") / "ia3_kernels"
    shutil.copytree(Path(target.__file__).parent, package, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    monkeypatch.setattr(target, "__file__", str(package / "target.py"))
    target.kernel_sources.cache_clear()
    try:
        assert routes.path_of(0) == before
        with (package / changed).open("a", encoding="utf-8") as source:
            source.write("# another\n")
        target.kernel_sources.cache_clear()
        routes.of_device.cache_clear()
        assert routes.path_of(0) != before
        assert _route()[0] == "library"
    finally:
        target.kernel_sources.cache_clear()


# --- launches ----------------------------------------------------------------------------------------------------

ARCHITECTURES = [
    Architecture("cuda", 75, 40),
    Architecture("cuda", 80, 108),
    Architecture("cuda", 86, 84),
    Architecture("cuda", 89, 142),
    Architecture("cuda", 90, 132),
    Architecture("cuda", 100, 148),
    Architecture("cuda", 120, 170),
    Architecture("hip", 94, 304),
    Architecture("cuda", 80, 1),
]
# Few and many, round and odd
sizes = st.one_of(st.integers(1, 70), st.integers(1, 200_000), st.sampled_from([1024, 3072, 4096, 8192, 14336, 2**31]))
element_sizes = st.sampled_from([2, 4])
TRITON_MAX_ELEMENTS = 2**20


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


@given(sizes, sizes, element_sizes, st.booleans())
def test_activation_launches_are_fit_for_any_shape(rows: int, cols: int, element_size: int, is_backward: bool) -> None:
    launch = launches.activation_launch(rows, cols, element_size, is_backward)
    assert launch == launches.activation_launch(rows, cols, element_size, is_backward)
    assert all(map(_is_power_of_two, (launch.BLOCK_M, launch.BLOCK_N, launch.CHUNK, launch.num_warps)))
    assert launch.BLOCK_M * launch.BLOCK_N <= TRITON_MAX_ELEMENTS
    assert launch.CHUNK % launch.BLOCK_M == 0  # or a chunk's last tile would sum rows of the next
    assert launch.BLOCK_N * element_size >= 16


@given(sizes, sizes, element_sizes)
def test_weight_launches_are_fit_for_any_shape(rows: int, cols: int, element_size: int) -> None:
    launch = launches.weight_launch(rows, cols, element_size)
    assert launch == launches.weight_launch(rows, cols, element_size)
    assert all(map(_is_power_of_two, (launch.BLOCK_M, launch.BLOCK_N, launch.num_warps)))
    assert launch.BLOCK_M * launch.BLOCK_N <= TRITON_MAX_ELEMENTS


@given(
    sizes,
    sizes,
    st.one_of(st.just(0), sizes),
    element_sizes,
    st.sampled_from(ARCHITECTURES),
    st.booleans(),
    st.booleans(),
)
def test_matmul_launches_are_fit_for_any_shape(
    rows: int,
    outputs: int,
    inputs: int,
    element_size: int,
    architecture: Architecture,
    is_aligned: bool,
    has_prologue: bool,
) -> None:
    args = (rows, outputs, inputs, element_size, architecture, is_aligned, has_prologue)
    launch = launches.linear_launch(*args)
    assert launch == launches.linear_launch(*args)
    tile = (launch.BLOCK_M, launch.BLOCK_N, launch.BLOCK_K)
    assert all(map(_is_power_of_two, (*tile, launch.SPLIT_K, launch.GROUP_M, launch.num_warps)))
    assert min(tile) >= 16  # what a matmul instruction takes
    sums_per_thread = launch.BLOCK_M * launch.BLOCK_N / (32 * launch.num_warps)
    assert sums_per_thread <= 128  # of 255 registers
    assert not launch.TMA or (is_aligned and architecture.has_tma)
    # Operands of all stages lie in shared memory, but one where pointers are loaded through registers.
    stage = (launch.BLOCK_M + launch.BLOCK_N) * launch.BLOCK_K * element_size
    assert launch.num_stages >= 1
    assert stage * (launch.num_stages - (0 if launch.TMA else 1)) <= architecture.shared_memory
    # Parts of K are worth a program each, and there are no more than fill the device.
    if launch.SPLIT_K > 1:
        assert -(-inputs // launch.BLOCK_K) >= 3 * launch.SPLIT_K
        tiles = -(-rows // launch.BLOCK_M) * -(-outputs // launch.BLOCK_N)
        assert tiles * launch.SPLIT_K <= 2 * architecture.multiprocessors


@pytest.mark.parametrize(
    "change", [{"BLOCK_M": "many"}, {"SPLIT_K": 0}, {"BLOCK_N": -64}, {"TMA": 1}, {"num_warps": True}]
)
def test_a_launch_that_no_kernel_could_have_is_not_read(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "device.json"
    launch = LinearLaunch(64, 64, 64, 1, 8, False, 4, 3)
    routes.write(path, {"key": routes.Measurement(1.0, 2.0, launch)})
    assert routes.read(path)["key"].launch == launch
    content = json.loads(path.read_text())
    content["measurements"]["key"]["launch"] |= change
    path.write_text(json.dumps(content))
    assert routes.read(path) == {}
