"""Tables on the terminal: runs side by side, means over seeds, ours beside published figures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_lab.reporting import grouping, scores
from subspace_lab.reporting.results import Results
from subspace_lab.reporting.scores import Score

if TYPE_CHECKING:
    from rich.table import Table

Kind = str
Groups = Mapping[grouping.Group, Sequence[Results]]

# (metric, label, how to write it), in the order of the rows of a comparison.
ROWS: tuple[tuple[str, str, Kind], ...] = (
    ("val/perplexity", "validation perplexity", "figure"),
    ("val/bits_per_byte", "bits per byte", "figure"),
    ("val/accuracy", "validation accuracy", "figure"),
    ("test/accuracy", "test accuracy", "figure"),
    ("final_accuracy", "final accuracy", "figure"),
    ("average_incremental_accuracy", "average incremental accuracy", "figure"),
    ("backward_transfer", "backward transfer", "figure"),
    ("forgetting", "forgetting", "figure"),
    ("forgetting_since_learned", "forgetting since learned", "figure"),
    ("learning_accuracy", "learning accuracy", "figure"),
    ("robust_final_accuracy", "robust final accuracy", "figure"),
    ("merged/accuracy", "merged accuracy", "figure"),
    ("merged/normalized_accuracy", "merged ÷ experts", "figure"),
    ("merged/worst_normalized_accuracy", "worst task ÷ expert", "figure"),
    ("base/accuracy", "base accuracy", "figure"),
    ("experts/accuracy", "experts' accuracy", "figure"),
    ("merge/scale", "λ", "figure"),
    ("merge/seconds", "merging s", "figure"),
    ("train/accuracy", "training accuracy", "figure"),
    ("probe/accuracy", "probe accuracy", "figure"),
    ("features/intra_class_angle", "intra-class angle, °", "figure"),
    ("features/class_separation", "class separation R²", "figure"),
    ("features/sparsity", "feature sparsity", "share"),
    ("features/rankme", "feature rank (RankMe)", "figure"),
    ("val/return", "validation return", "figure"),
    ("test/return", "test return", "figure"),
    ("train/tokens_per_second", "tokens/s", "count"),
    ("train/examples_per_second", "examples/s", "count"),
    ("train/seconds", "training s", "count"),
    ("task_end/seconds", "task ends s", "count"),
    ("clients/seconds", "clients s", "count"),
    ("server/seconds", "server s", "figure"),
    ("communication/up_bytes", "bytes from clients", "bytes"),
    ("communication/down_bytes", "bytes to clients", "bytes"),
    ("subspace/basis_bytes", "kept of old tasks", "bytes"),
    ("optimizer/state_bytes", "optimizer state", "bytes"),
    ("subspace/refresh_share", "share of time in refreshes", "share"),
    ("subspace/captured_energy", "captured gradient energy", "share"),
)


def rows_of(metrics: Iterable[Mapping[str, Any]]) -> list[tuple[str, str, Kind]]:
    """Return the rows of `ROWS` that any of these flat metrics has, and one for each probe where there are several."""
    names = dict.fromkeys(name for found in metrics for name, value in found.items() if value is not None)
    probes = [name for name in names if name.startswith("probe/") and name.count("/") > 1]
    rows = []
    for row in ROWS:
        if row[0] in names:
            rows.append(row)
        if row[0] == "probe/accuracy" and len(probes) > 1:
            rows += [(name, f"probe {name.split('/')[1]}", "figure") for name in probes]
    return rows


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
    for metric, label, kind in rows_of(metrics for _, metrics in runs):
        table.add_row(label, *(write_number(metrics.get(metric), kind) for _, metrics in runs))
    return table


def summary(
    runs: Sequence[tuple[Path, Results]],
    shown: Sequence[tuple[str, str, Kind]] | None = None,
    score: Score | None = None,
) -> Table:
    """Return a table of runs grouped by everything but the seed: mean ± sample sd over seeds, best first.

    The best (lowest validation perplexity, or highest accuracy) is marked among runs of the same task. A column says in
    which of the values that were typed the groups differ, if they do; what all groups share stands above the table.

    Args:
        runs: (run folder, results).
        shown: the rows of `rows_of` to show, None for all.
        score: the figure that the best is best in; chosen by what the runs of a task have if None.
    """
    from rich import box
    from rich.table import Table

    groups = grouping.grouped([results for _, results in runs])
    told = grouping.differences(list(groups))
    shown = rows_of(results["metrics"] for _, results in runs) if shown is None else shown
    values = {name: [group.columns[i] for group in groups] for i, name in enumerate(grouping.COLUMNS)}
    shared = {
        name: found[0] for name, found in values.items() if name != "method" and len(groups) > 1 == len(set(found))
    }
    head = {"method": values.pop("method"), **({"settings": told} if any(told) else {})}
    head |= {name: found for name, found in values.items() if name not in shared}
    table = Table(title_justify="left", title_style="", box=box.SIMPLE_HEAD)
    table.title = ", ".join(f"{name} {value}" for name, value in shared.items()) or None
    for column in head:
        table.add_column(column, no_wrap=column in ("method", "settings"))
    table.add_column("seeds", justify="right")
    for _, label, _ in shown:
        table.add_column(label, justify="right")
    ranks: dict[grouping.Group, float] = {}
    winners: set[grouping.Group] = set()
    for mine in by_task(groups).values():
        used = score or scores.choose([run for members in mine.values() for run in members])
        ranks |= {group: used.rank(members) if used else math.inf for group, members in mine.items()}
        winners |= {group for group in (used and best(mine, used),) if group}
    leading = dict(zip(groups, zip(*head.values(), strict=True), strict=True))
    for group in sorted(groups, key=lambda g: (g.task, ranks[g])):
        members = groups[group]
        cells = [mean_sd([m["metrics"].get(metric) for m in members], kind) for metric, _, kind in shown]
        style = "bold" if group in winners and len(groups) > 1 else None
        table.add_row(*leading[group], str(len({m.get("seed") for m in members})), *cells, style=style)
    return table


def by_task(groups: Groups) -> dict[grouping.Key, Groups]:
    """Return the groups of each task, whose figures may be compared."""
    tasks: dict[grouping.Key, dict[grouping.Group, Sequence[Results]]] = {}
    for group, members in groups.items():
        tasks.setdefault(group.task, {})[group] = members
    return dict(tasks)


def best(groups: Groups, score: Score) -> grouping.Group | None:
    """Return the group with the best mean; None if no group has the figure."""
    leader = min(groups, key=lambda group: score.rank(groups[group]))
    return leader if score.rank(groups[leader]) < math.inf else None


def mean_sd(values: Sequence[Any], kind: Kind) -> str:
    """Return mean ± sample sd of the numbers among some values; an em dash where there is none."""
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

    source = published.get("paper", published["source"])
    seen = f" (seen: {published['seen']})" if "seen" in published else ""
    table = Table(title=f"beside {source}{seen}", title_justify="left", box=box.SIMPLE_HEAD)
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
