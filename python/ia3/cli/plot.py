"""The loss curve as a picture."""

from __future__ import annotations

import io
from collections.abc import Sequence

from .training import History

INK = "#22262e"
TRAIN = "#7a9cc6"
HELD_OUT = "#c4501b"
SMOOTHING = 0.85  # weight of the past in the running mean of the training loss


def loss_curve(history: History, title: str, subtitle: str = "") -> bytes:
    """A PNG (1500 x 900) of the training loss, a running mean of it, and the held-out loss, over the steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke

    figure = Figure(figsize=(10, 6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws to memory; pyplot and its global state stay out
    axes = figure.add_subplot()
    steps = [step for step, _ in history.train]
    losses = [loss for _, loss in history.train]
    axes.plot(steps, losses, color=TRAIN, alpha=0.45, linewidth=1.2, label="train, each step")
    axes.plot(steps, running_mean(losses), color=TRAIN, linewidth=2.4, label="train, running mean")
    if history.held_out:
        held_steps = [step for step, _ in history.held_out]
        held_losses = [loss for _, loss in history.held_out]
        axes.plot(held_steps, held_losses, color=HELD_OUT, linewidth=2.4, marker="o", markersize=7, label="held out")
        for index in (0, -1):
            axes.annotate(
                f"{held_losses[index]:.3f}",
                (held_steps[index], held_losses[index]),
                xytext=(0, 11),
                textcoords="offset points",
                ha="center",
                color=HELD_OUT,
                fontweight="bold",
                path_effects=[withStroke(linewidth=4, foreground="white")],  # readable across the other curves
            )
    axes.set_xlabel("steps", color=INK)
    axes.set_ylabel("loss (nats a token)", color=INK)
    axes.set_title(
        title, loc="left", fontsize=15, fontweight="bold", color=INK, pad=26 if subtitle else 10, parse_math=False
    )
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=10, color=INK, alpha=0.75, parse_math=False)
    axes.grid(axis="y", color=INK, alpha=0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.03, y=0.1)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean, corrected for its start, so that the first value is the first mean."""
    means: list[float] = []
    total = weight = 0.0
    for value in values:
        total = SMOOTHING * total + (1 - SMOOTHING) * value
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        means.append(total / weight)
    return means
