"""accuracy_vs_d.png: every seed's accuracy over d, the fit, the baseline, the thresholds and where they are passed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Okabe & Ito's colours, distinguishable with any colour vision.
_CURVE = "#0072B2"
_BASELINE = "#555555"
_DEFINITIONS = {"own": "#D55E00", "global": "#009E73"}


def draw(search: Mapping[str, Any], target: Path, title: str) -> Path:
    """Draw the curve of a dimension search into one PNG.

    Args:
        search: the `search` section of results.json.
        target: the file; its folder is made.
        title: above the plot.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    points = search["points"]
    ds = [point["d"] for point in points]
    axes.set_xscale("log")
    seeds = [(point["d"], value) for point in points for value in point["values"]]
    axes.plot(*zip(*seeds, strict=True), "o", ms=4, mfc="none", color=_CURVE, alpha=0.6, label="seeds")
    axes.plot(ds, [point["mean"] for point in points], "o", ms=5, color=_CURVE, label="mean")
    axes.plot(ds, [point["fit"] for point in points], lw=1.6, color=_CURVE, label="non-decreasing fit")
    values = search["baseline"]["values"]
    axes.axhspan(min(values), max(values), color=_BASELINE, alpha=0.2, lw=0)
    axes.axhline(search["baseline"]["mean"], color=_BASELINE, lw=1, label=f"all {search['D']:,} weights")
    for name, found in search["definitions"].items():
        colour = _DEFINITIONS[name]
        label = f"{search['name']}, {name} baseline: {found['text']} {found['interval']}"
        axes.axhline(found["threshold"], color=colour, lw=1, ls="--", label=label)
        if found["value"] is not None:
            axes.axvline(found["value"], color=colour, lw=1, ls="-" if name == "global" else "--")
        # An open end of the interval reaches to the edge of what was tried.
        axes.axvspan(found["low"] or ds[0], found["high"] or ds[-1], color=colour, alpha=0.12, lw=0)
    if len(ds) == 1:
        axes.set_xlim(ds[0] / 2, ds[0] * 2)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set(xlabel="d, trained numbers", ylabel=search["metric"])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, loc="lower right", framealpha=0.9, edgecolor="none")
    figure.suptitle(title)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target
