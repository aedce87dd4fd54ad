"""transfer_vs_k.png: test accuracy, probe accuracy and intra-class angle over the dimension k of class subspaces."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from subspace_lab.reporting import grouping
from subspace_lab.reporting.results import Results

# Okabe & Ito's colours, distinguishable with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_PANELS = (
    ("test/accuracy", "test accuracy"),
    ("probe/accuracy", "probe accuracy"),
    ("features/intra_class_angle", "intra-class angle (degrees)"),
)
NEEDED = "features/intra_class_angle"
FILE = "transfer_vs_k.png"

Curve = dict[float, list[Results]]


def draw_all(runs: Sequence[Results], folder: Path) -> list[Path]:
    """Draw one PNG for each task of which there are runs with class subspaces and figures of their features.

    Args:
        runs: all that were found; those without such figures are left out.
        folder: where the files go: transfer_vs_k.png, for several tasks transfer_vs_k_<model>_<data>[_<number>].png.

    Returns:
        The files.
    """
    tasks: dict[grouping.Key, list[Results]] = defaultdict(list)
    for results in runs:
        if results["metrics"].get(NEEDED) is not None and results.get("status") == "completed":
            tasks[grouping.group_of(results).task].append(results)
    tasks = {task: found for task, found in tasks.items() if any(_k(results) for results in found)}
    drawn: list[Path] = []
    for (model, data, *_), found in tasks.items():
        target = folder / (FILE if len(tasks) == 1 else FILE.replace(".png", f"_{model}_{data}.png"))
        if target in drawn:
            target = target.with_stem(f"{target.stem}_{len(drawn) + 1}")
        drawn.append(draw(found, target, f"{model}, {data}"))
    return drawn


def draw(runs: Sequence[Results], target: Path, title: str) -> Path:
    """Draw the runs of one task: mean ± sample sd over seeds; methods without k are bands.

    Args:
        runs: results with feature figures.
        target: the file; its folder is made.
        title: above the plots.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    curves = _curves(runs)
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    ks = sorted({k for curve in curves.values() for k in curve if k})
    for axes, (metric, label) in zip(figure.subplots(1, len(_PANELS)), _PANELS, strict=True):
        for (name, curve), colour in zip(curves.items(), _COLOURS * len(curves), strict=False):
            points = [(k, *found) for k in sorted(curve) if (found := _mean_sd(curve[k], metric))]
            if not points:
                continue
            if points[0][0]:
                x, y, sd = zip(*points, strict=True)
                axes.errorbar(x, y, yerr=sd, color=colour, lw=1.6, marker="o", ms=4, capsize=3, label=name)
            else:
                _, mean, spread = points[0]
                axes.axhline(mean, color=colour, lw=1.2, ls="--", label=name)
                axes.axhspan(mean - spread, mean + spread, color=colour, alpha=0.12, lw=0)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ks))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set(xlabel="k, dimension of a class", ylabel=label, xlim=(ks[0] / 1.3, ks[-1] * 1.3))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[-1].legend(fontsize=8, framealpha=0.9, edgecolor="none")
    figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def _curves(runs: Sequence[Results]) -> dict[str, Curve]:
    """From a label to the runs at each k (0: a method without); settings other than k make further curves."""
    labels = [(results, grouping.group_of(results)) for results in runs]
    others = [
        grouping.Group(
            group.columns,
            (("optimizer", group.columns[1]), *(entry for entry in group.settings if entry[0] != "method.k")),
        )
        for _, group in labels
    ]
    curves: dict[str, Curve] = defaultdict(lambda: defaultdict(list))
    for (results, group), words in zip(labels, grouping.differences(others), strict=True):
        curves[f"{group.columns[0]} {words}".rstrip()][_k(results)].append(results)
    return curves


def _k(results: Results) -> float:
    return float(results["metrics"].get("subspace/k") or 0)


def _mean_sd(runs: Sequence[Results], metric: str) -> tuple[float, float] | None:
    values = [float(value) for results in runs if (value := results["metrics"].get(metric)) is not None]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0
