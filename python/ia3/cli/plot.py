"""The loss curve as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

INK, TRAIN, HELD_OUT = "#22262e", "#7a9cc6", "#c4501b"
FEWEST_FOR_A_MEAN = 100  # steps; a mean of fewer lags so far behind that the training loss seems worse than it is


def loss_curve(log: Sequence[dict[str, Any]], title: str, subtitle: str = "") -> bytes:
    """Draw a Trainer's log: training and held-out loss over the steps, perplexity on the right; return a PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")  # without pyplot and its global state
    axes = figure.add_subplot()
    train, held_out = (
        np.array([(entry["step"], entry[name]) for entry in log if name in entry]).reshape(-1, 2).T
        for name in ("loss", "eval_loss")
    )
    axes.plot(*train, color=TRAIN, alpha=0.6, linewidth=1.2, label="train, each step")
    window = len(train[0]) // 20
    if len(train[0]) >= FEWEST_FOR_A_MEAN:
        mean = np.convolve(train[1], np.ones(window) / window, mode="valid")
        middle = train[0][window // 2 :][: len(mean)]  # in the middle of its steps, so that it does not lag
        axes.plot(middle, mean, color=TRAIN, linewidth=2.4, label=f"train, mean of {window} steps")
    if held_out.size:
        ends = f"held out: {held_out[1][0]:.3f} to {held_out[1][-1]:.3f}"  # in the legend: nothing there overprints
        axes.plot(*held_out, color=HELD_OUT, linewidth=2.4, marker="o", markersize=7, label=ends)
    axes.set_xlabel("steps", color=INK)
    axes.set_ylabel("loss (nats a token)", color=INK)
    axes.secondary_yaxis("right", functions=(np.exp, np.log)).set_ylabel("perplexity", color=INK)
    axes.set_title(title, loc="left", fontsize=15, fontweight="bold", color=INK, pad=26, parse_math=False)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=10, color=INK, alpha=0.75, parse_math=False)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.spines["top"].set_visible(False)
    axes.margins(x=0.03, y=0.1)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):  # of an axis that reaches far
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
