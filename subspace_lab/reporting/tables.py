"""Tables on the terminal: runs side by side, means over seeds, ours beside published figures."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_lab.reporting.results import Results

if TYPE_CHECKING:
    from rich.table import Table

Kind = str

# (metric, label, how to write it), in the order of the rows of a comparison.
ROWS: tuple[tuple[str, str, Kind], ...] = (
    ("val/perplexity", "validation perplexity", "figure"),
    ("val/bits_per_byte", "bits per byte", "figure"),
    ("val/accuracy", "validation accuracy", "figure"),
    ("test/accuracy", "test accuracy", "figure"),
    ("train/accuracy", "training accuracy", "figure"),
    ("val/return", "validation return", "figure"),
    ("test/return", "test return", "figure"),
    ("train/tokens_per_second", "tokens/s", "count"),
    ("train/examples_per_second", "examples/s", "count"),
    ("optimizer/state_bytes", "optimizer state", "bytes"),
    ("subspace/refresh_share", "share of time in refreshes", "share"),
    ("subspace/captured_energy", "captured gradient energy", "share"),
)


def write_number(value: Any, kind: Kind) -> str:
    """Return a metric as text; an em dash where there is none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "—"
    if kind == "bytes":
        return write_bytes(float(value))
    if kind == "share":
        return f"{100 * float(value):.1f} %"
    if kind == "count":
        return f"{float(value):,.0f}"
    return f"{float(value):.4g}" if abs(float(value)) >= 1000 else f"{float(value):.3f}"


def write_bytes(size: float) -> str:
    """Return a size in B, KB, MB or GB (powers of 1000, as papers count)."""
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def comparison(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> Table:
    """Return a table with one column per run.

    Args:
        runs: (column title, flat metrics); a metric that no run has gets no row.
    """
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for name, _ in runs:
        table.add_column(name, justify="right")
    for metric, label, kind in ROWS:
        values = [metrics.get(metric) for _, metrics in runs]
        if any(value is not None for value in values):
            table.add_row(label, *(write_number(value, kind) for value in values))
    return table


def summary(runs: Sequence[tuple[Path, Results]]) -> Table:
    """Return a table of runs grouped by everything but the seed: mean ± sample sd over seeds, best first.

    The best (lowest validation perplexity, or highest accuracy) is marked among runs of the same model, data and
    length.
    """
    from rich import box
    from rich.table import Table

    groups: dict[tuple[str, ...], list[Results]] = defaultdict(list)
    for _, results in runs:
        groups[group_key(results)].append(results)
    table = Table(title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("method", "optimizer", "model", "data", "steps", "status"):
        table.add_column(column)
    shown = [row for row in ROWS if any(row[0] in r["metrics"] for _, r in runs)]
    table.add_column("seeds", justify="right")
    for _, label, _ in shown:
        table.add_column(label, justify="right")
    best: dict[tuple[str, ...], tuple[float, tuple[str, ...]]] = {}
    for key, members in groups.items():
        task, score = key[2:5], _score(members)
        if score is not None and (task not in best or score < best[task][0]):
            best[task] = (score, key)
    winners = {key for _, key in best.values()}
    ordered = sorted(groups, key=lambda k: (k[2:5], score if (score := _score(groups[k])) is not None else math.inf))
    for key in ordered:
        members = groups[key]
        cells = [_mean_sd([m["metrics"].get(metric) for m in members], kind) for metric, _, kind in shown]
        style = "bold" if key in winners and len(groups) > 1 else None
        seeds = len({m.get("seed") for m in members})
        table.add_row(*key, str(seeds), *cells, style=style)
    return table


def group_key(results: Results) -> tuple[str, ...]:
    """Return (method, optimizer, model, data, steps, status): runs that share it are averaged."""
    choices = results.get("choices", {})
    return (
        str(results.get("method", "?")),
        str(choices.get("optimizer", "?")),
        str(choices.get("model", "?")),
        str(choices.get("data", "?")),
        str(results.get("timing", {}).get("steps", "?")),
        str(results.get("status", "?")),
    )


def _score(members: Sequence[Results]) -> float | None:
    for metric, sign in (("val/perplexity", 1.0), ("val/accuracy", -1.0)):
        values = [m["metrics"][metric] for m in members if isinstance(m["metrics"].get(metric), (int, float))]
        if values:
            return sign * statistics.fmean(values)
    return None


def _mean_sd(values: Sequence[Any], kind: Kind) -> str:
    numbers = [float(v) for v in values if isinstance(v, (int, float))]
    if not numbers:
        return "—"
    mean = write_number(statistics.fmean(numbers), kind)
    if len(numbers) < 2 or kind == "bytes":
        return mean
    deviation = statistics.stdev(numbers)
    return f"{mean} ± {write_number(deviation, kind)}"


def beside_published(metrics: Mapping[str, Any], published: Mapping[str, Any]) -> Table:
    """Return ours beside a published entry (see `reporting.published`)."""
    from rich import box
    from rich.table import Table

    table = Table(title=f"beside {published['source']}", title_justify="left", box=box.SIMPLE_HEAD)
    for column, side in (
        ("", "left"),
        ("published", "right"),
        ("this run", "right"),
        ("difference", "right"),
    ):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    for name, theirs in published["metrics"].items():
        ours = metrics.get(name)
        low, high = theirs if isinstance(theirs, (list, tuple)) else (theirs, theirs)
        kind = "count" if name.startswith("d_int") else "figure"
        printed = write_number(low, kind) + (f" – {write_number(high, kind)}" if high != low else "")
        difference = "—"
        if isinstance(ours, (int, float)):
            nearest = min(max(float(ours), low), high)  # inside a range there is no difference
            difference = f"{100 * (float(ours) / nearest - 1):+.1f} %"
        table.add_row(name, printed, write_number(ours, kind), difference)
    return table
