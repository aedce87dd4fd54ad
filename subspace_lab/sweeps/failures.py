"""How the cells of a sweep ended, read from their folders; a cell that could not say so itself is spoken for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from subspace_lab import rundir
from subspace_lab.sweeps import manifest

MISSING = "missing"


def results(run_dir: Path) -> dict[str, Any]:
    """Return a run's results.json; empty if it has none that can be read."""
    try:
        found = json.loads((run_dir / rundir.RESULTS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def started_since(run_dir: Path, moment: float) -> bool:
    """Return whether a run took its folder's lock after a moment (seconds since the epoch)."""
    return _changed(run_dir / rundir.LOCK_FILE, moment)


def ended_since(run_dir: Path, moment: float) -> bool:
    """Return whether a run wrote its results after a moment (seconds since the epoch)."""
    return _changed(run_dir / rundir.RESULTS_FILE, moment)


def record(
    run_dir: Path,
    message: str,
    overrides: Sequence[str],
    config_hash: str,
    choices: Mapping[str, Any] | None = None,
    seed: object = None,
) -> None:
    """Write results.json for a run that could not; figures that it has already stay.

    Args:
        run_dir: its folder.
        message: why, in a line.
        overrides: what was typed for it.
        config_hash: see `schema.config_hash`.
        choices: the option of each group, as far as it is known.
        seed: if it is known.
    """
    chosen = dict(choices or {})
    found = {
        "schema_version": 1,
        "status": "failed",
        "name": run_dir.name,
        "method": chosen.get("method", "?"),
        "seed": seed,
        "config_hash": config_hash,
        "overrides": [text for text in overrides if not text.startswith("hydra.")],
        "choices": chosen,
        "trained": False,
        "metrics": {},
    }
    found |= results(run_dir) | {"status": "failed", "message": message}
    run_dir.mkdir(parents=True, exist_ok=True)
    partial = run_dir / f".{rundir.RESULTS_FILE}.partial"
    partial.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")
    os.replace(partial, run_dir / rundir.RESULTS_FILE)


def unfinished(sweep_dir: Path, known: manifest.Manifest) -> list[tuple[manifest.Cell, str, str]]:
    """Return (cell, status, message) of every cell that is not completed, in their order."""
    found = []
    for cell in known.cells:
        told = results(sweep_dir / cell.folder)
        status = str(told.get("status", MISSING))
        if status != "completed":
            found.append((cell, status, str(told.get("message", ""))))
    return found


def lines(sweep_dir: Path, known: manifest.Manifest, most: int = 20) -> list[str]:
    """Return what is to be said about cells without a result: how many of how many, then each, its error and log."""
    left = unfinished(sweep_dir, known)
    groups: dict[str, list[str]] = {"failed": [], "interrupted": [], "not started": []}
    for cell, status, message in left:
        folder = sweep_dir / cell.folder
        log = folder / "run.log"
        if status == MISSING and rundir.digest(folder) is not None:
            status = "interrupted"  # it was killed, and the next start goes on with it
        word = {"interrupted": "interrupted", MISSING: "not started"}.get(status, "failed")
        said = f": {message}" if message and word == "failed" else ""
        place = f" ({os.path.relpath(log)})" if word == "failed" and log.is_file() else ""
        groups[word].append(f"  {known.words(cell)}{said}{place}")
    told = []
    for word, entries in groups.items():
        if entries:
            verb = "is" if len(entries) == 1 else "are"
            head = f"{len(entries)} of {len(known.cells)} cells"
            told.append(f"{head} failed:" if word == "failed" else f"{head} {verb} {word}:")
            told += entries[:most]
            if len(entries) > most:
                told.append(f"  … and {len(entries) - most} more")
    return told


def _changed(file: Path, moment: float) -> bool:
    try:
        return file.stat().st_mtime >= moment - 0.01  # of a file system that counts coarsely
    except OSError:
        return False
