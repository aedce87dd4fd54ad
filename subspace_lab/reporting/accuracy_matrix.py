"""accuracy_matrix.png and the same on the terminal: accuracy on task j after learning task i."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

FILE = "accuracy_matrix.png"
#: the word for what a head means, by which tables are kept apart: their figures are not comparable
INCREMENTAL = {"task": "task-incremental", "class": "class-incremental", "single": "domain-incremental"}
_NUMBERED = 10  # tasks up to which every cell shows its number


def draw(section: Mapping[str, Any], target: Path, title: str) -> Path:
    """Draw the heat map of a run's accuracies.

    Args:
        section: `continual` of results.json.
        target: the file; its folder is made.
        title: above the plot.
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names, matrix = section["tasks"], section["accuracy_matrix"]
    cells = np.full((len(matrix), len(names)), np.nan)
    for i, row in enumerate(matrix):
        cells[i, : len(row)] = [np.nan if value is None else value for value in row]
    side = 1.6 + 0.45 * min(len(names), 20)
    figure = Figure(figsize=(side + 1.2, 1.6 + 0.45 * min(len(matrix), 20)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    image = axes.imshow(cells, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    if len(names) <= _NUMBERED:
        for (i, j), value in np.ndenumerate(cells):
            if np.isfinite(value):
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", color="w" if value < 0.6 else "k")
    rows = names if len(matrix) == len(names) else ["all"]
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", fontsize=8)
    axes.set_yticks(range(len(matrix)), rows, fontsize=8)
    axes.set(xlabel="accuracy on task", ylabel="after learning")
    figure.colorbar(image, ax=axes, label=f"{section['part']} accuracy")
    figure.suptitle(title, fontsize=10)
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def table(section: Mapping[str, Any]) -> Table:
    """Return the accuracies in percent, a row for each task learnt, with the ranks of what is protected after it."""
    from rich import box
    from rich.table import Table

    names, matrix, ranks = section["tasks"], section["accuracy_matrix"], section["ranks"]
    if len(names) > _NUMBERED and len(matrix) == len(names):
        return _ends(section)
    shown = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True, max_width=16)
    for number in range(len(names)):
        shown.add_column(str(number + 1), justify="right", no_wrap=True)
    with_ranks = any(ranks)
    if with_ranks:
        shown.add_column("ranks", no_wrap=True)
    for i, row in enumerate(matrix):
        cells = [f"{100 * value:.1f}" for value in row] + [""] * (len(names) - len(row))
        name = names[i] if len(matrix) == len(names) else "all"
        shown.add_row(name, *cells, *([_ranks(ranks[i], section["dimensions"])] if with_ranks else []))
    return shown


def headline(section: Mapping[str, Any]) -> str:
    """Return what `table` shows, in words."""
    what = f"{section['part']} accuracy in %, {INCREMENTAL[section['head']]}"
    long = len(section["tasks"]) > _NUMBERED and len(section["accuracy_matrix"]) == len(section["tasks"])
    return what if long else f"{what}: on task (column) after learning task (row)"


def _ends(section: Mapping[str, Any]) -> Table:
    """Of a sequence too long for a matrix on the terminal: each task when it was learnt, and in the end."""
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD)
    for column in ("task", "when learnt", "in the end", "change"):
        shown.add_column(column, justify="left" if column == "task" else "right")
    last = section["accuracy_matrix"][-1]
    for name, row, end in zip(section["tasks"], section["accuracy_matrix"], last, strict=True):
        shown.add_row(name, f"{100 * row[-1]:.1f}", f"{100 * end:.1f}", f"{100 * (end - row[-1]):+.1f}")
    return shown


def _ranks(ranks: Mapping[str, int], dimensions: Mapping[str, int], most: int = 3) -> str:
    told = [f"{rank}/{dimensions[name]}" if name in dimensions else str(rank) for name, rank in ranks.items()]
    return " ".join(told[:most]) + (" …" if len(told) > most else "")


def kinds(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what distinguishes runs whose figures must not share a table: "" for what is no sequence of tasks."""
    return [INCREMENTAL[run["continual"]["head"]] if run.get("continual") else "" for run in runs]
