"""`subspace-lab report PATHS`: the runs found below some folders as one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_lab.errors import UserError
from subspace_lab.reporting import accuracy_matrix, dimension_tables, results, tables, transfer_plot

if TYPE_CHECKING:
    from rich.table import Table


def main(paths: Sequence[str | Path], *, markdown: bool = False) -> int:
    """Print the tables of all runs and dimension searches at or below `paths` (default: outputs); return the exit code.

    Runs with class subspaces and figures of their features are drawn over k too, into the first path.

    Args:
        paths: folders, or results.json files.
        markdown: print tables that can be pasted into a document.

    Raises:
        UserError: a path does not exist, or there are no results below any.
    """
    folders = [Path(path) for path in paths] or [Path("outputs")]
    runs = results.find(folders)
    if not runs:
        raise UserError(
            f"no results.json below {', '.join(map(str, folders))}",
            hint="a run writes one when it ends; give the folder that --help calls output_root",
        )
    searches = [(folder, found) for folder, found in runs if found.get("search")]
    others = [(folder, found) for folder, found in runs if not found.get("search")]
    kinds = accuracy_matrix.kinds([found for _, found in others])
    for kind in dict.fromkeys(kinds):  # figures that mean different things do not share a table
        mine = [run for run, own in zip(others, kinds, strict=True) if own == kind]
        if kind:
            print(f"{kind} learning:")
        _show(_summary_of(mine), tables.rows_of(found["metrics"] for _, found in mine), markdown)
    if searches:
        _show(lambda _: dimension_tables.summary(searches), [], markdown)
    try:
        first = folders[0].parent if folders[0].is_file() else folders[0]
        for file in transfer_plot.draw_all([found for _, found in others], first):
            print(f"drawn over k: {file}", file=sys.stderr)
    except OSError as error:
        print(f"note: cannot write the plot: {error.strerror}: {error.filename}", file=sys.stderr)
    return 0


def _summary_of(runs: Sequence[tuple[Path, results.Results]]) -> Callable[[Sequence[Any]], Table]:
    return lambda rows: tables.summary(runs, rows)


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
