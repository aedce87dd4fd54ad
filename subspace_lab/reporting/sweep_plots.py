"""plots/ of a sweep: its figure over every key that varies, as lines, bars or a heat map; of a search its history."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_lab.reporting import scores
from subspace_lab.reporting.results import Results
from subspace_lab.reporting.scores import Score
from subspace_lab.sweeps.manifest import Cell, Manifest

FOLDER = "plots"
# Okabe & Ito's colours, distinguishable with any colour vision.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#555555")
_MOST_LINES = 14  # more are told by their best
_MOST_LETTERS = 70  # side by side below bars

Point = tuple[Mapping[str, str], float]  # the values of the keys that vary, and the figure
Settings = tuple[tuple[str, str], ...]


def draw_all(
    cells: Sequence[tuple[Cell, Results]], known: Manifest, sweep_dir: Path, metric: str | None = None
) -> list[Path]:
    """Draw what a sweep has to show and return the files; nothing where less than two cells have a figure.

    Args:
        cells: those with results, in their order.
        known: what sweep.json says.
        sweep_dir: its folder.
        metric: the figure, or None to choose one.
    """
    with_metrics = [(cell, run) for cell, run in cells if run["metrics"]]
    adaptive = known.sweeper.startswith("Optuna")
    objective = next((str(run["objective"]) for _, run in with_metrics if run.get("objective")), None)
    runs = [run for _, run in with_metrics]
    score = scores.choose(runs, metric or (objective if adaptive else None)) if runs else None
    if score is None:
        return []
    points = [(_values(cell, known.swept), value) for cell, run in with_metrics if (value := score.of(run)) is not None]
    if len(points) < 2:
        return []
    folder, title = sweep_dir / FOLDER, f"{runs[0].get('name', '')}: {len(points)} runs"
    stem = _safe(score.metric)
    drawn = []
    if adaptive:
        order = {cell.folder: score.of(run) for cell, run in with_metrics}
        history = [order.get(cell.folder) for cell in known.cells]
        drawn.append(_save(lambda axes: _history(axes, history, score), folder / f"{stem}_history.png", title))
    keys = [key for key in known.swept if key != "seed" and len({values.get(key) for values, _ in points}) > 1]
    numeric = [key for key in keys if all(_number(v[key]) is not None for v, _ in points if key in v)]
    for key in keys:
        others = [other for other in keys if other != key]
        if key not in numeric:
            target = folder / f"{stem}_by_{_safe(key)}.png"
            drawn.append(_save(lambda axes, k=key, o=others: _bars(axes, points, k, o, score), target, title))  # type: ignore[misc]
        elif adaptive:
            target = folder / f"{stem}_vs_{_safe(key)}.png"
            drawn.append(_save(lambda axes, k=key: _scatter(axes, points, k, score), target, title))  # type: ignore[misc]
        else:
            target = folder / f"{stem}_vs_{_safe(key)}.png"
            drawn.append(_save(lambda axes, k=key, o=others: _lines(axes, points, k, o, score), target, title))  # type: ignore[misc]
    if len(numeric) == 2 == len(keys) and not adaptive:
        pair = (numeric[0], numeric[1])
        drawn.append(_save(lambda axes: _heat(axes, points, pair, score), folder / f"{stem}_map.png", title))
    return drawn


def is_geometric(values: Sequence[float]) -> bool:
    """Return whether values are spaced evenly in their logarithm rather than in themselves (two: a factor of 8)."""
    xs = sorted(set(values))
    if xs[0] <= 0:
        return False
    if len(xs) < 3:
        return xs[-1] >= 8 * xs[0]
    logs = [math.log(x) for x in xs]
    return _unevenness(logs) < _unevenness(xs)


def _lines(axes: Any, points: Sequence[Point], key: str, others: Sequence[str], score: Score) -> None:
    """One line for each combination of the other keys; what has no such key is a band across."""
    curves: dict[Settings, dict[float | None, list[float]]] = defaultdict(lambda: defaultdict(list))
    for values, figure in points:
        curves[_rest(values, others)][_number(values.get(key))].append(figure)
    shown = sorted(curves, key=lambda rest: _rank(score, [statistics.fmean(v) for v in curves[rest].values()]))
    for index, rest in enumerate(shown[:_MOST_LINES]):
        colour = _COLOURS[index % len(_COLOURS)]
        dashes = "-" if index < len(_COLOURS) else "--"
        curve, label = curves[rest], _label(rest)
        if None in curve:
            mean, sd = _mean_sd(curve.pop(None))
            axes.axhline(mean, color=colour, lw=1.2, ls=":", label=label)
            axes.axhspan(mean - sd, mean + sd, color=colour, alpha=0.12, lw=0)
            label = ""
        xs = sorted(x for x in curve if x is not None)
        if xs:
            means, sds = zip(*(_mean_sd(curve[x]) for x in xs), strict=True)
            axes.errorbar(
                xs, means, yerr=sds, color=colour, lw=1.6, ls=dashes, marker="o", ms=4, capsize=3, label=label
            )
    _x_axis(axes, [x for curve in curves.values() for x in curve if x is not None], key)
    axes.set(ylabel=score.metric)
    if any(_label(rest) for rest in shown):
        extra = f"the best {_MOST_LINES} of {len(shown)}" if len(shown) > _MOST_LINES else None
        axes.legend(fontsize=8, frameon=False, title=extra)


def _bars(axes: Any, points: Sequence[Point], key: str, others: Sequence[str], score: Score) -> None:
    """Of each value of a key the best combination of the other keys, which is written below."""
    found: dict[str, dict[Settings, list[float]]] = defaultdict(lambda: defaultdict(list))
    for values, figure in points:
        found[values.get(key, "—")][_rest(values, others)].append(figure)
    names, means, sds = [], [], []
    for value, combinations in found.items():
        rest = min(combinations, key=lambda rest: _rank(score, combinations[rest]))
        mean, sd = _mean_sd(combinations[rest])
        names.append("\n".join([value, *(f"{k.rsplit('.', 1)[-1]}={v}" for k, v in rest)]))
        means.append(mean)
        sds.append(sd)
    axes.bar(range(len(names)), means, yerr=sds, capsize=4, width=0.6, color=_COLOURS[0], alpha=0.85)
    crowded = sum(max(map(len, name.split("\n"))) for name in names) > _MOST_LETTERS
    axes.set_xticks(range(len(names)), names, fontsize=8, **({"rotation": 45, "ha": "right"} if crowded else {}))
    low, high = min(m - s for m, s in zip(means, sds, strict=True)), max(m + s for m, s in zip(means, sds, strict=True))
    if low > 0 and low > 0.6 * high:  # differences would not be seen from zero
        axes.set_ylim(low - 0.6 * (high - low or low * 0.1), None)
    best = ", each at its best setting" if others else ""
    axes.set(xlabel=f"{key}{best}", ylabel=score.metric)


def _heat(axes: Any, points: Sequence[Point], keys: tuple[str, str], score: Score) -> None:
    """The mean over seeds at each pair of values."""
    import numpy as np

    cells: dict[tuple[float, float], list[float]] = defaultdict(list)
    for values, figure in points:
        x, y = _number(values.get(keys[0])), _number(values.get(keys[1]))
        if x is not None and y is not None:
            cells[x, y].append(figure)
    xs, ys = sorted({x for x, _ in cells}), sorted({y for _, y in cells})
    grid = np.full((len(ys), len(xs)), np.nan)
    for (x, y), figures in cells.items():
        grid[ys.index(y), xs.index(x)] = statistics.fmean(figures)
    image = axes.imshow(grid, aspect="auto", origin="lower", cmap="viridis_r" if score.lower else "viridis")
    for (i, j), value in np.ndenumerate(grid):
        if np.isfinite(value):
            axes.text(j, i, f"{value:.3g}", ha="center", va="center", fontsize=8, color="w", path_effects=_outline())
    axes.set_xticks(range(len(xs)), [f"{x:g}" for x in xs])
    axes.set_yticks(range(len(ys)), [f"{y:g}" for y in ys])
    axes.set(xlabel=keys[0], ylabel=keys[1])
    axes.figure.colorbar(image, ax=axes, label=score.metric)


def _scatter(axes: Any, points: Sequence[Point], key: str, score: Score) -> None:
    """Every trial, the later the darker."""
    trials = [(x, y, n) for n, (values, y) in enumerate(points) if (x := _number(values.get(key))) is not None]
    xs, ys, numbers = zip(*trials, strict=True)
    shown = axes.scatter(xs, ys, c=numbers, cmap="cividis_r", s=28)
    axes.figure.colorbar(shown, ax=axes, label="trial")
    _x_axis(axes, list(xs), key, ticks=False)
    axes.set(ylabel=score.metric)


def _history(axes: Any, values: Sequence[float | None], score: Score) -> None:
    """Every trial and the best so far; a cross below for what failed or diverged."""
    from matplotlib.ticker import MaxNLocator

    told = [(n, value) for n, value in enumerate(values) if value is not None]
    axes.plot(*zip(*told, strict=True), "o", ms=5, color=_COLOURS[0], label="trial")
    best: list[float] = []
    for _, value in told:
        best.append(value if not best else min(best[-1], value) if score.lower else max(best[-1], value))
    axes.step([n for n, _ in told], best, where="post", color=_COLOURS[1], lw=1.6, label="best so far")
    lost = [n for n, value in enumerate(values) if value is None]
    if lost:
        axes.plot(
            lost, [0.02] * len(lost), "x", color=_COLOURS[6], transform=axes.get_xaxis_transform(), label="failed"
        )
    figures = [value for _, value in told]
    if min(figures) > 0 and max(figures) > 20 * min(figures):
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=score.metric)
    axes.legend(fontsize=8, frameon=False)


def _x_axis(axes: Any, xs: Sequence[float], key: str, *, ticks: bool = True) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    values = sorted(set(xs))
    if values and is_geometric(values):
        axes.set_xscale("log")
    if ticks and len(values) <= 12:
        axes.xaxis.set_major_locator(FixedLocator(values))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.set(xlabel=key)


def _save(draw: Callable[[Any], None], target: Path, title: str) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw(axes)
    if not axes.images:
        axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def _values(cell: Cell, swept: Iterable[str]) -> dict[str, str]:
    typed = dict(text.lstrip("+").partition("=")[::2] for text in cell.overrides)
    return {key: typed[key] for key in swept if key in typed}


def _rest(values: Mapping[str, str], others: Sequence[str]) -> Settings:
    return tuple((key, values[key]) for key in others if key in values)


def _label(rest: Settings) -> str:
    return ", ".join(value if "." not in key else f"{key.rsplit('.', 1)[-1]}={value}" for key, value in rest)


def _rank(score: Score, values: Sequence[float]) -> float:
    means = statistics.fmean(values)
    return means if score.lower else -means


def _mean_sd(values: Sequence[float]) -> tuple[float, float]:
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text is not None else None
    except ValueError:
        return None


def _unevenness(xs: Sequence[float]) -> float:
    gaps = [after - before for before, after in itertools.pairwise(xs)]
    return statistics.pstdev(gaps) / statistics.fmean(gaps)


def _outline() -> list[Any]:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=2, foreground="0.2")]


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=-]+", "_", name)
