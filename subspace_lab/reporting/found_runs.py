"""What lies below some folders: runs with figures, the cells of sweeps, and runs that came to nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from subspace_lab.reporting import results
from subspace_lab.reporting.results import Results
from subspace_lab.sweeps import failures, manifest

Run = tuple[Path, Results]


@dataclass
class Found:
    """See the module.

    Attributes:
        runs: (folder, results) of the runs that have figures.
        sweeps: (folder, what its sweep.json says) of the sweeps.
        lost: a line for each thing to be said about runs without figures, and cells that never ran.
    """

    runs: list[Run]
    sweeps: list[tuple[Path, manifest.Manifest]]
    lost: list[str]


def gather(paths: Sequence[Path]) -> Found:
    """Look below some folders; cells that a sweep took over from an earlier one count as its own.

    Raises:
        UserError: a path does not exist.
    """
    runs = {folder.resolve(): (folder, found) for folder, found in results.find(paths)}
    sweeps = []
    for file in sorted({file for path in paths if path.is_dir() for file in path.rglob(manifest.FILE)}):
        known = manifest.read(file.parent)
        if known is None or not known.cells:
            continue
        sweeps.append((file.parent, known))
        folders = [Path(os.path.normpath(file.parent / cell.folder)) for cell in known.cells]
        missing = [folder for folder in folders if folder.resolve() not in runs and folder.is_dir()]
        runs |= {folder.resolve(): (folder, found) for folder, found in results.find(missing)}
    lost = []
    cells: set[Path] = set()
    for folder, known in sweeps:
        cells |= {(folder / cell.folder).resolve() for cell in known.cells}
        told = failures.lines(folder, known)
        lost += [f"{os.path.relpath(folder)}: {told[0]}", *told[1:]] if told and len(sweeps) > 1 else told
    for place, (folder, found) in runs.items():
        if not _has_figures(found) and place not in cells:
            said = f": {found['message']}" if found.get("message") else ""
            lost.append(f"{found['status']}: {os.path.relpath(folder)}{said}")
    return Found([run for run in runs.values() if _has_figures(run[1])], sweeps, lost)


def of_sweep(found: Found, sweep_dir: Path, known: manifest.Manifest) -> list[tuple[manifest.Cell, Results]]:
    """Return the cells of one sweep that have figures, in their order."""
    by_place = {folder.resolve(): run for folder, run in found.runs}
    places = [(cell, (sweep_dir / cell.folder).resolve()) for cell in known.cells]
    return [(cell, by_place[place]) for cell, place in places if place in by_place]


def _has_figures(run: Results) -> bool:
    return bool(run["metrics"]) or bool(run.get("search")) or run["status"] == "completed"
