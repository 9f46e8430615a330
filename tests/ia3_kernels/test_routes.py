"""Which matmul a GPU runs, by what was measured where; and launch parameters as pure, total functions."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ia3_kernels import launches, matmul, routes, target
from ia3_kernels.launches import Architecture, LinearLaunch
from ia3_kernels.routes import Measurement, Product, Route
from tools import routes_table

LAUNCH = LinearLaunch(128, 128, 64, 1, 8, True, 8, 3)
PRODUCT = Product("output", 512, 1024, 3072, 2, False)
BOTH = frozenset({"triton", "cuda"})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The cache folder of a machine with two imaginary GPUs: 0, for which the package has no figures; 1, an H100."""
    monkeypatch.setenv("IA3_CACHE", str(tmp_path))
    monkeypatch.delenv("IA3_GPU_MATMUL", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ["NVIDIA A100", "NVIDIA H100"][index])
    monkeypatch.setattr(target, "architecture", lambda index: Architecture("cuda", [80, 90][index], 108))
    routes.tuned.cache_clear()
    yield tmp_path
    routes.tuned.cache_clear()


def _tune(product: Product = PRODUCT, index: int = 0, **times: Any) -> None:
    measured = Measurement(**{"launch": LAUNCH if "triton" in times else None, **times})
    routes.write(routes.path_of(index), routes.identity(index), {product: measured})


def _route(product: Product = PRODUCT, index: int | None = 0, is_captured: bool = True, **options: Any) -> Route:
    return routes.linear_route(index, product, BOTH, is_captured, **options)


# --- files -------------------------------------------------------------------------------------------------------

times = st.one_of(st.none(), st.floats(1e-9, 1e3))


@settings(deadline=None)
@given(st.floats(1e-9, 1e3), times, times, st.integers(1, 2**20), st.sampled_from(["input", "output"]), st.booleans())
def test_what_is_written_is_read(
    library: float, triton: float | None, cuda: float | None, rows: int, side: str, is_transposed: bool
) -> None:
    measured = Measurement(library, triton, LAUNCH if triton else None, cuda, "a tile" if cuda else None)
    entries = {Product(side, rows, 7, 8, 2, is_transposed): measured, PRODUCT: measured}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "new" / "device.json"
        routes.write(path, {"device": "none"}, entries)
        assert routes.read(path) == entries
        assert [file.name for file in path.parent.iterdir()] == ["device.json"]


def test_a_device_has_a_file_in_the_cache_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = routes.path_of(0)
    assert path.parent == cache
    assert path.name.startswith(f"nvidia-a100-torch{torch.__version__.split('+')[0]}")
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
    launch = {field.name: 16 for field in fields(LinearLaunch)} | {"TMA": False}
    entry = asdict(PRODUCT) | asdict(Measurement(1.0, 2.0)) | {"launch": launch}

    def file(*entries: Any) -> Any:
        return {"of": routes.identity(0), "measurements": list(entries)}

    contents = {
        "a number": 3,
        "a list": [entry],
        "no measurements": {"of": {}},
        "of nothing": {"measurements": [entry]},
        "of an earlier format": {"measurements": {"scaled_linear bfloat16": entry}},
        "entries that are words": file("fast"),
        **{f"no {name}": file({key: value for key, value in entry.items() if key != name}) for name in entry},
        "half a launch": file({**entry, "launch": {"TMA": False}}),
        "times in words": file({**entry, "triton": "fast"}),
        "no time of the library": file({**entry, "library": None}),
        "a negative time": file({**entry, "cuda": -1.0}),
        "no end of a time": file({**entry, "library": math.inf}),
        "another side": file({**entry, "side": "both"}),
        "rows in words": file({**entry, "rows": "many"}),
        "no outputs at all": file({**entry, "outputs": 0}),
    }
    for name, value in {"BLOCK_M": "many", "SPLIT_K": 0, "BLOCK_N": -64, "TMA": 1, "num_warps": True}.items():
        contents[f"{name} is {value}"] = file({**entry, "launch": {**launch, name: value}})
    texts = {name: json.dumps(content).encode() for name, content in contents.items()}
    whole = json.dumps(file(entry)).encode()
    return {**texts, "empty": b"", "cut off": whole[: len(whole) // 2], "no text": b"\xff\xfe\x00"}


def test_damaged_files_are_ignored_and_doctor_says_so(cache: Path) -> None:
    path = routes.path_of(0)
    for name, content in _damage().items():
        path.write_bytes(content)
        routes.tuned.cache_clear()
        assert _route().name == "library", name
        said = routes.report(0)[path]
        assert said.startswith("ignored, because it cannot be read"), (name, said)
        assert said.endswith("run ia3 tune again")
        _tune(library=2.0, triton=1.0)  # and is replaced
        assert _route().name == "triton", name
        assert routes.report(0)[path] == "used: 1 products"


def test_no_file_and_a_folder_in_its_place(cache: Path) -> None:
    assert routes.tuned(0) == {}
    assert routes.report(0) == {}
    routes.path_of(0).mkdir()
    routes.tuned.cache_clear()
    assert routes.tuned(0) == {}
    assert "cannot be read (OSError: it is no file" in routes.report(0)[routes.path_of(0)]


@pytest.mark.parametrize("fact", ["device", "torch", "Triton", "kernels"])
def test_a_file_of_another_device_or_version_is_ignored_and_doctor_says_so(cache: Path, fact: str) -> None:
    here = routes.identity(0)
    routes.write(routes.path_of(0), here | {fact: "of old"}, {PRODUCT: Measurement(2.0, 1.0, LAUNCH)})
    assert _route().name == "library"
    said = f"ignored, because it was measured with {fact} of old, and here is {here[fact]}"
    assert routes.report(0) == {routes.path_of(0): said}


@pytest.mark.parametrize("changed", ["launches.py", "triton/linear.py", "triton/functions.py"])
def test_measurements_of_other_sources_do_not_count(
    cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    _tune(library=2.0, triton=1.0)
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
        routes.tuned.cache_clear()
        assert routes.path_of(0) != before
        assert _route().name == "library"
    finally:
        target.kernel_sources.cache_clear()


# --- the choice --------------------------------------------------------------------------------------------------


def test_the_library_runs_where_nothing_was_measured(cache: Path) -> None:
    for index in (0, None):
        route = _route(index=index)
        assert (route.name, route.launch, route.tile) == ("library", None, None)
        assert "not measured" in route.reason
    _tune(library=2.0, triton=1.0)
    assert _route(index=1).name == "library"


@pytest.mark.parametrize(
    "other", [{"outputs": 1025}, {"inputs": 3064}, {"element_size": 4}, {"is_transposed": True}, {"side": "input"}]
)
def test_tuning_answers_for_the_same_weight_only(cache: Path, other: dict[str, Any]) -> None:
    _tune(library=2.0, cuda=1.0, tile="t")
    assert _route().name == "cuda"
    assert _route(replace(PRODUCT, **other)).name == "library"


@pytest.mark.parametrize(
    ("measured", "rows", "is_known"),
    [
        *[(512, 128, True), (512, 127, False), (512, 2048, True), (512, 2049, False), (4, 1, True), (4, 16, True)],
        *[(16, 17, False), (17, 16, False), (64, 17, True)],  # kernels of few rows are others
    ],
)
def test_tuning_answers_for_a_similar_number_of_rows(cache: Path, measured: int, rows: int, is_known: bool) -> None:
    _tune(replace(PRODUCT, rows=measured), library=2.0, triton=1.0)
    route = _route(replace(PRODUCT, rows=rows))
    assert route.name == ("triton" if is_known else "library")
    if is_known:
        assert route.launch == LAUNCH
        assert route.reason == f"measured by ia3 tune, rows {measured}: library 2000000.0 us, Triton 1000000.0 us"


def test_the_nearest_number_of_rows_answers(cache: Path) -> None:
    entries = {
        replace(PRODUCT, rows=64): Measurement(1e-5, 2e-5, LAUNCH),
        replace(PRODUCT, rows=256): Measurement(2e-5, 1e-5, LAUNCH),
    }
    routes.write(routes.path_of(0), routes.identity(0), entries)
    names = {rows: _route(replace(PRODUCT, rows=rows)).name for rows in (20, 64, 127, 129, 256, 1000)}
    assert names == dict.fromkeys((20, 64, 127), "library") | dict.fromkeys((129, 256, 1000), "triton")


@pytest.mark.parametrize(
    ("triton", "cuda", "fastest"),
    [(2e-5, None, "library"), (0.5e-5, None, "triton"), (0.5e-5, 0.4e-5, "cuda"), (1e-5, 1e-5, "library")],
)
def test_the_fastest_runs_and_the_library_where_another_is_as_fast(
    triton: float, cuda: float | None, fastest: str
) -> None:
    measured = Measurement(1e-5, triton, LAUNCH, cuda, "t")
    assert measured.fastest(BOTH, is_captured=True) == fastest
    assert measured.fastest((), is_captured=True) == "library"
    assert measured.fastest({"triton"}, is_captured=True) == ("triton" if triton < 1e-5 else "library")


def test_triton_is_not_launched_for_less_than_a_launch_costs_but_in_a_graph(cache: Path) -> None:
    _tune(library=3e-5, triton=2e-5)
    assert _route(is_captured=True).name == "triton"
    assert _route(is_captured=False).name == "library"
    _tune(library=3e-4, triton=2e-4)
    assert _route(is_captured=False).name == "triton"
    _tune(library=3e-4, triton=2e-5, cuda=2e-4, tile="t")  # 100 us of the host, still
    assert _route(is_captured=False).name == "triton"


@pytest.mark.parametrize("rows", [16, 512])
def test_scaled_inputs_and_adapters_take_triton_with_few_rows_only(cache: Path, rows: int) -> None:
    for product, has_adapters in ((PRODUCT, True), (replace(PRODUCT, side="input"), False)):
        product = replace(product, rows=rows)
        _tune(product, library=2.0, triton=1.0)
        route = _route(product, has_adapters=has_adapters)
        assert route.name == ("triton" if rows == 16 else "library")
        assert route.launch == (None if has_adapters else LAUNCH)  # which was measured with one scale for all rows


@pytest.mark.parametrize("wanted", ["library", "triton", " Triton ", "cuda"])
@pytest.mark.parametrize("is_tuned", [False, True])
@pytest.mark.parametrize("is_captured", [False, True])
def test_a_route_can_be_asked_for(
    cache: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, is_tuned: bool, is_captured: bool
) -> None:
    for kernels in ("triton", "cuda"):
        monkeypatch.setattr(target, f"{kernels}_problem", lambda: None)
    if is_tuned:
        _tune(library=2e-5, triton=1e-5, cuda=1.5e-5, tile="t")
    monkeypatch.setenv("IA3_GPU_MATMUL", wanted)
    route = _route(is_captured=is_captured)
    assert (route.name, route.reason) == (wanted.strip().lower(), f"asked for by IA3_GPU_MATMUL={route.name}")
    assert (route.launch, route.tile) == ((LAUNCH, "t") if is_tuned else (None, None))


def test_a_route_that_does_not_take_the_product_leaves_it_to_the_library(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, "triton_problem", lambda: None)
    monkeypatch.setenv("IA3_GPU_MATMUL", "triton")
    route = _route(has_adapters=True)
    assert route.name == "library"
    assert route.reason == "asked for by IA3_GPU_MATMUL=triton, which does not take this product"


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


def test_lengths_that_change_share_a_choice() -> None:
    assert [routes.counted(rows) for rows in range(17)] == list(range(17))
    assert [routes.counted(rows) for rows in (17, 20, 21, 500, 513, 4096, 4097)] == [20, 20, 24, 512, 640, 4096, 5120]
    x, weight = torch.empty(3, 171, 64), torch.empty(8, 64)
    assert matmul.product_of(x, weight, "output") == Product("output", 640, 8, 64, 4, False)
    assert matmul.product_of(x[:1, 0], torch.empty(64, 8).t(), "input") == Product("input", 1, 8, 64, 4, True)


# --- the package's figures ---------------------------------------------------------------------------------------


def test_an_h100_that_nobody_tuned_goes_by_the_figures_of_one(cache: Path) -> None:
    names = {rows: _route(replace(PRODUCT, rows=rows), index=1).name for rows in (1, 16, 17, 512, 4096, 16384)}
    assert names == dict.fromkeys((1, 16), "triton") | dict.fromkeys((17, 512), "library") | dict.fromkeys(
        (4096, 16384), "cuda"
    )
    eager = {rows: _route(replace(PRODUCT, rows=rows), index=1, is_captured=False).name for rows in (1, 16, 4096)}
    assert eager == {1: "library", 16: "library", 4096: "cuda"}
    route = _route(replace(PRODUCT, rows=4000, outputs=1000), index=1)
    assert route.reason.startswith("nearest of the package's figures, rows 4096, 1024 x 3072: library 41.5 us, ")
    for other in ({"is_transposed": True}, {"element_size": 4}):  # of which there are no figures
        assert _route(replace(PRODUCT, **other), index=1).name == "library"


def test_tuning_comes_before_the_package_s_figures(cache: Path) -> None:
    product = replace(PRODUCT, rows=4096)
    assert _route(product, index=1).name == "cuda"
    _tune(product, index=1, library=1.0, cuda=2.0, tile="t")
    route = _route(product, index=1)
    assert (route.name, route.tile) == ("library", "t")
    assert route.reason.startswith("measured by ia3 tune, rows 4096")
    assert _route(replace(product, outputs=3072), index=1).name == "cuda"


def test_the_table_is_what_its_tool_makes_of_the_records(tmp_path: Path) -> None:
    routes.write(tmp_path / "made.json", routes_table.facts(), routes_table.measurements())
    assert (tmp_path / "made.json").read_text() == routes_table.TABLE.read_text(), (
        "ia3_kernels/routes_sm90.json is not of bench/results; type: python -m tools.routes_table"
    )


def _over_cublas(is_left_out: Callable[[Product, Product], bool]) -> dict[Product, float]:
    """Time of the default route over cuBLAS without a scale, in CUDA graphs, for each product that was measured whole.

    is_left_out: which figures the choice for a product must do without.
    """
    table, known = routes.shipped(90), routes_table.benchmarked()
    ratios = {}
    for product, seconds in known.items():
        if product.side != "output":
            continue
        figures = {other: entry for other, entry in table.items() if not is_left_out(product, other)}
        answer = routes.nearest(product, figures)
        assert answer is not None
        name = figures[answer].fastest(BOTH, is_captured=True)
        ratios[product] = getattr(table[product], name) / seconds["linear"]
    assert len(ratios) == 36
    return ratios


def _mean(ratios: dict[Product, float]) -> float:
    return math.exp(sum(map(math.log, ratios.values())) / len(ratios))


def test_the_default_route_costs_nothing_over_cublas_on_average() -> None:
    ratios = _over_cublas(lambda product, other: False)
    assert _mean(ratios) <= 1.00  # 0.995
    assert max(ratios.values()) <= 1.16  # 1.155: 512 rows of 1024 x 3072, where the library with its pass is the best


@pytest.mark.parametrize(
    "is_left_out",
    [
        lambda product, other: other == product,
        lambda product, other: (other.outputs, other.inputs) == (product.outputs, product.inputs),
        lambda product, other: other.rows == product.rows,
    ],
    ids=["this product", "this weight", "these rows"],
)
def test_the_nearest_of_the_other_figures_chooses_nearly_as_well(
    is_left_out: Callable[[Product, Product], bool],
) -> None:
    """Products that nobody measured: looser, since 4096 x 4096 at 512 rows is CUDA's and 3072 x 3072 the library's."""
    ratios = _over_cublas(is_left_out)
    assert _mean(ratios) <= 1.01  # 0.999, 0.999, 1.005
    assert max(ratios.values()) <= 1.25  # 1.244


def test_every_tile_is_the_fastest_of_all_routes_for_some_figure() -> None:
    """One that is not would be built for nothing."""
    header = (Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "hopper_linear.h").read_text()
    won = {entry.tile for entry in routes.shipped(90).values() if entry.fastest(BOTH, is_captured=False) == "cuda"}
    assert won
    assert {name for name in won if name is not None} == set(re.findall(r'{"(\d+x\d+x64 \S+)"', header))


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
)
def test_matmul_launches_are_fit_for_any_shape(
    rows: int,
    outputs: int,
    inputs: int,
    element_size: int,
    architecture: Architecture,
    is_aligned: bool,
) -> None:
    args = (rows, outputs, inputs, element_size, architecture, is_aligned)
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
