"""`subspace-lab report PATHS`: the runs found below some folders as one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from subspace_lab.errors import UserError
from subspace_lab.reporting import dimension_tables, results, tables


def main(paths: Sequence[str | Path]) -> int:
    """Print the tables of all runs and dimension searches at or below `paths` (default: outputs); return the exit code.

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
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    searches = [(folder, found) for folder, found in runs if found.get("search")]
    others = [(folder, found) for folder, found in runs if not found.get("search")]
    if others:
        console.print(tables.summary(others))
    if searches:
        console.print(dimension_tables.summary(searches))
    return 0
