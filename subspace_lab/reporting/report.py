"""`subspace-lab report PATHS`: the runs found below some folders as tables, with the best and what it gains; plots."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_lab.errors import UserError
from subspace_lab.reporting import (
    accuracy_matrix,
    dimension_tables,
    found_runs,
    grouping,
    paired,
    results,
    scores,
    sweep_plots,
    tables,
    transfer_plot,
)
from subspace_lab.reporting.found_runs import Run
from subspace_lab.reporting.scores import Score

if TYPE_CHECKING:
    from rich.table import Table


def main(
    paths: Sequence[str | Path],
    *,
    markdown: bool = False,
    csv: Path | None = None,
    baseline: Sequence[str] = (),
    metric: str | None = None,
    unfinished: bool = True,
) -> int:
    """Print the tables of all runs and dimension searches at or below `paths` (default: outputs); return the exit code.

    Sweeps are drawn into their `plots`; runs with class subspaces and figures of their features over k, into the first
    path.

    Args:
        paths: folders, or results.json files.
        markdown: print tables that can be pasted into a document.
        csv: a file for one line per run, with all that was typed and all figures.
        baseline: `key=value` words of what the others are compared with; see `paired.baselines`.
        metric: the figure to rank by and to draw; see `scores.choose`.
        unfinished: whether to list what failed, was interrupted or never ran.

    Raises:
        UserError: a path does not exist, there are no results below any, or no run is or has what was asked for.
    """
    folders = [Path(path) for path in paths] or [Path("outputs")]
    found = found_runs.gather(folders)
    if not found.runs and not found.lost:
        raise UserError(
            f"no results.json below {', '.join(map(str, folders))}",
            hint="a run writes one when it ends; give the folder that --help calls output_root",
        )
    searches = [run for run in found.runs if run[1].get("search")]
    others = [run for run in found.runs if not run[1].get("search")]
    metric = metric or _searched_for(found)
    if metric is not None:
        scores.choose([run for _, run in others], metric)
    if baseline:
        paired.baselines(grouping.grouped([run for _, run in others]), baseline)
    kinds = accuracy_matrix.kinds([run for _, run in others])
    for kind in dict.fromkeys(kinds):  # figures that mean different things do not share a table
        mine = [run for run, own in zip(others, kinds, strict=True) if own == kind]
        if kind:
            print(f"{kind} learning:")
        score = scores.score_named(metric) if metric else None
        rows = tables.rows_of(run["metrics"] for _, run in mine)
        if score is not None and score.metric not in [name for name, _, _ in rows]:
            rows.append((score.metric, score.metric, "figure"))
        _show(_summary_of(mine, score), rows, markdown)
        _compare(mine, metric, baseline, markdown)
    if searches:
        _show(lambda _: dimension_tables.summary(searches), [], markdown)
    if unfinished and found.lost:
        print("\n".join(found.lost))
    if csv is not None:
        _write(lambda: results.write_csv(csv, found.runs))
        print(f"{len(found.runs)} runs: {csv}", file=sys.stderr)
    _draw(found, folders[0].parent if folders[0].is_file() else folders[0], metric)
    return 0


def _searched_for(found: found_runs.Found) -> str | None:
    """Return the figure that a search minimised, if there is nothing but searches."""
    if not found.sweeps or not all(known.sweeper.startswith("Optuna") for _, known in found.sweeps):
        return None
    return next((str(run["objective"]) for _, run in found.runs if run.get("objective")), None)


def _compare(runs: Sequence[Run], metric: str | None, asked: Sequence[str], markdown: bool) -> None:
    """Of each task print the best group by name, and what the groups gain on the baseline."""
    tasks = tables.by_task(grouping.grouped([run for _, run in runs]))
    for groups in tasks.values():
        score = scores.choose([run for members in groups.values() for run in members], metric)
        leader = tables.best(groups, score) if score is not None else None
        if score is None or leader is None or len(groups) == 1:
            continue
        names = grouping.words(list(groups))
        try:
            bases = paired.baselines(groups, asked)
        except UserError:  # another task has it
            bases = []
        told = paired.differences(groups, score, bases)
        if told:
            print("\nagainst the baseline, seed by seed:\n")
            _show(lambda _, told=told, names=names, score=score: paired.table(told, names, score), [], markdown)  # type: ignore[misc]
        about = "" if len(tasks) == 1 else f"{leader.columns[2]}, {leader.columns[3]}: "
        print(about + _best(groups, leader, names, score, bases))


def _best(
    groups: tables.Groups,
    leader: grouping.Group,
    names: Mapping[grouping.Group, str],
    score: Score,
    bases: Sequence[grouping.Group],
) -> str:
    members = groups[leader]
    figure = tables.mean_sd([run["metrics"].get(score.metric) for run in members], "figure")
    seeds = len({run.get("seed") for run in members})
    text = f"best {score.metric}: {names[leader]}, {figure} ({seeds} seed{'s' if seeds > 1 else ''})"
    rivals = sorted((base for base in bases if base != leader), key=lambda base: score.rank(groups[base]))
    if rivals and leader not in bases:
        gain = paired.compare(members, groups[rivals[0]], rivals[0], score)
        if gain is not None:
            spread = "" if gain.sd is None else f" ± {gain.sd:.3g}"
            text += f"; {gain.mean:+.3g}{spread} against the best baseline ({names[rivals[0]]})"
    return text


def _draw(found: found_runs.Found, first: Path, metric: str | None) -> None:
    def draw() -> None:
        for sweep_dir, known in found.sweeps:
            drawn = sweep_plots.draw_all(found_runs.of_sweep(found, sweep_dir, known), known, sweep_dir, metric)
            if drawn:
                print(f"drawn: {', '.join(file.name for file in drawn)} in {drawn[0].parent}", file=sys.stderr)
        for file in transfer_plot.draw_all([run for _, run in found.runs if not run.get("search")], first):
            print(f"drawn over k: {file}", file=sys.stderr)

    _write(draw)


def _write(action: Callable[[], object]) -> None:
    try:
        action()
    except OSError as error:
        print(f"note: cannot write: {error.strerror}: {error.filename}", file=sys.stderr)


def _summary_of(runs: Sequence[Run], score: Score | None) -> Callable[[Sequence[Any]], Table]:
    return lambda rows: tables.summary(runs, rows, score)


def _show(make: Callable[[Sequence[Any]], Table], rows: Sequence[Any], markdown: bool) -> None:
    """Print a table: as wide as it is into a file; on a terminal in as many parts as it takes to be read.

    Args:
        make: the table of some of the rows.
        rows: all of them.
        markdown: draw it with dashes and bars.
    """
    from rich import box
    from rich.console import Console

    console, wide = Console(), Console(width=10_000, no_color=True, force_terminal=False)
    if console.is_terminal and not markdown:
        parts = [make(rows)]
        for size in range(len(rows) - 1, 0, -1):
            if all(wide.measure(part).maximum <= console.width for part in parts):
                break
            parts = [make(rows[start : start + size]) for start in range(0, len(rows), size)]
        console.print(*parts)
        return
    table = make(rows)
    title, table.title = table.title, None
    if markdown:
        table.box = box.MARKDOWN
    with wide.capture() as capture:
        wide.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines() if line.strip()]
    print("\n".join([f"{title}\n", *lines] if title else lines))
