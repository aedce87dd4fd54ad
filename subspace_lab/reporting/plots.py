"""loss.png: training loss and validation perplexity or accuracy per step, for a method and what it is compared with."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from subspace_lab.reporting.results import CURVES_FILE

# Okabe & Ito's colours, distinguishable with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")

Curve = tuple[list[int], list[float]]


def read_curve(run_dir: Path, name: str) -> Curve:
    """Return (steps, values) of one column of a run's metrics.csv; empty if it has none."""
    file = run_dir / CURVES_FILE
    if not file.is_file():
        return [], []
    with file.open(newline="") as lines:
        points = {int(row["step"]): float(row[name]) for row in csv.DictReader(lines) if row.get(name)}
    return list(points), list(points.values())


def draw_loss(runs: Sequence[tuple[str, Path]], target: Path, title: str) -> Path | None:
    """Draw training loss (left) and validation figure (right) of some runs into one PNG.

    The figure is perplexity on a logarithmic axis or, where no run has one, accuracy on a linear one.

    Args:
        runs: (label, run folder); runs without metrics.csv are left out.
        target: the file; its folder is made.
        title: above the plots.

    Returns:
        The file, or None if no run has anything to draw.
    """
    perplexities = [read_curve(run, "val/perplexity") for _, run in runs]
    accuracies = [read_curve(run, "val/accuracy") for _, run in runs]
    is_accuracy = not any(steps for steps, _ in perplexities) and any(steps for steps, _ in accuracies)
    figures = accuracies if is_accuracy else perplexities
    curves = [
        (label, train, points)
        for (label, run), points in zip(runs, figures, strict=True)
        if (train := read_curve(run, "train/loss"))[0] or points[0]
    ]
    if not curves:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    loss, right = figure.subplots(1, 2)
    for (label, train, validation), colour in zip(curves, _COLOURS * len(curves), strict=False):
        loss.plot(*train, color=colour, lw=0.8, alpha=0.25)
        loss.plot(train[0], smooth(train[1]), color=colour, lw=1.8, label=label)
        right.plot(*validation, color=colour, lw=1.8, marker="o", ms=4, label=label)
    loss.set(xlabel="step", ylabel=f"training loss (nats per {'example' if is_accuracy else 'token'})")
    if is_accuracy:
        right.set(xlabel="step", ylabel="validation accuracy")
    else:
        _perplexity_axis(right)
    for axes in (loss, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def _perplexity_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

    axes.set(xlabel="step", ylabel="validation perplexity", yscale="log")
    # Within a decade a logarithmic locator finds one or two places: take round numbers, as on a linear axis.
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if high > 20 * low else MaxNLocator(8))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def smooth(values: Sequence[float]) -> list[float]:
    """Return the bias-corrected exponential moving average of a curve, over about a twentieth of its length."""
    smoothed, mean = [], 0.0
    weight = 1 - min(1.0, 20 / max(1, len(values)))
    for index, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        smoothed.append(mean / (1 - weight**index))
    return smoothed
