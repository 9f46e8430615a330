"""Make ``ia3_kernels/routes_sm90.json``, by which an H100 or H200 that nobody has tuned chooses its matmuls.

    python -m tools.routes_table

From two runs on one H100 at commit 4577caf (``bench/results``). The first has the library with its pass, Triton and
CUDA beside cuBLAS; the second every tile of the CUDA matmul beside cuBLAS, at more numbers of rows. A product of both
has the first's times, and the second's fastest tile. For one of the second alone, the library with its pass takes as
many times cuBLAS as between the nearest numbers of rows of the first, by the logarithm of rows, for the weight that is
nearest among those with as many inputs: the pass is 1 / inputs of the work.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

from ia3_kernels import routes
from ia3_kernels.launches import FEW_ROWS
from ia3_kernels.routes import Measurement, Measurements, Product

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
TABLE = ROOT / "ia3_kernels" / "routes_sm90.json"
# With more rows than the second run had, the first measured the tile that the matmul then chose by itself.
LARGEST_TILE = "128x256x64 cooperative"


def benchmarked() -> dict[Product, dict[str, float]]:
    """Seconds of each implementation, from the operators' records: ``linear`` is cuBLAS with no scale."""
    found: dict[Product, dict[str, float]] = {}
    for record in json.loads((RESULTS / "nvidia-h100-80gb-hbm3.json").read_text()):
        case = re.fullmatch(r"scaled_linear (\w+) side, .* (\d+)->(\d+), (\d+) rows?", record["case"])
        if case is None or record["suite"] != "operators" or record["dtype"] != "bf16":
            continue
        side, inputs, outputs, rows = case[1], *map(int, case.groups()[1:])
        times = found.setdefault(Product(side, rows, outputs, inputs, 2, False), {})
        if record["impl"] == "linear":
            times["linear"] = record["median_s"]
        elif record["ratio_to"] == "linear":  # of interleaved rounds: a ratio scatters less than a time
            times[record["impl"]] = record["ratio"]
    for times in found.values():
        times |= {impl: times["linear"] * ratio for impl, ratio in times.items() if impl != "linear"}
    return found


def swept() -> dict[Product, tuple[float, dict[str, float]]]:
    """Seconds of cuBLAS, and of each tile of the CUDA matmul that there still is, with an output scale."""
    found = {}
    runs = json.loads((RESULTS / "nvidia-h100-80gb-hbm3-whole-model.json").read_text())
    for shape, figures in runs["hopper_tiles_over_cublas"].items():
        linear = figures["linear us"] * 1e-6
        tiles = {name: linear * ratio for name, ratio in figures.items() if re.fullmatch(r"\d+x\d+x64 \w+", name)}
        found[Product("output", *map(int, shape.split("x")), 2, False)] = linear, tiles
    return found


def _passes_share(product: Product, known: dict[Product, dict[str, float]]) -> float:
    """The library with its pass over cuBLAS, where only other numbers of rows, or outputs, were measured."""
    alike = [other for other in known if other.side == "output" and other.inputs == product.inputs]
    outputs = min((other.outputs for other in alike), key=lambda n: abs(math.log(n / product.outputs)))
    points = {other.rows: known[other]["ours"] / known[other]["linear"] for other in alike if other.outputs == outputs}
    low = max(rows for rows in points if rows <= product.rows)
    high = min(rows for rows in points if rows >= product.rows)
    weight = 0.0 if low == high else math.log(product.rows / low) / math.log(high / low)
    return points[low] * (1 - weight) + points[high] * weight


def measurements() -> Measurements:
    """The table: products, and the times of their routes, to a nanosecond."""
    known, sweep = benchmarked(), swept()
    table = {}
    for product, times in known.items():
        _, tiles = sweep.get(replace(product, side="output"), (0.0, {LARGEST_TILE: 0.0}))
        # The CUDA kernel of few rows is gone; what it took says nothing of the tiles.
        has_cuda = product.rows > FEW_ROWS
        cuda, tile = (times["cuda"], min(tiles, key=lambda name: tiles[name])) if has_cuda else (None, None)
        triton = times["triton"] if product.side == "output" or product.rows <= FEW_ROWS else None
        table[product] = Measurement(times["ours"], triton, None, cuda, tile)
    for product, (linear, tiles) in sweep.items():
        if product not in known:
            tile = min(tiles, key=lambda name: tiles[name])
            table[product] = Measurement(linear * _passes_share(product, known), None, None, tiles[tile], tile)
    return {product: _rounded(measurement) for product, measurement in table.items()}


def _rounded(measurement: Measurement) -> Measurement:
    times = {name: getattr(measurement, name) for name in ("library", "triton", "cuda")}
    return replace(measurement, **{name: round(time, 9) for name, time in times.items() if time is not None})


def facts() -> dict[str, str]:
    """Where the figures are from."""
    record = json.loads((RESULTS / "nvidia-h100-80gb-hbm3.json").read_text())[0]
    return {name: record[name] for name in ("device", "torch", "commit")}


if __name__ == "__main__":
    routes.write(TABLE, facts(), measurements())
