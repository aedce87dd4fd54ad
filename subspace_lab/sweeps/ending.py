"""What a sweep says when it ends: its table, what failed, and how to go on."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from pathlib import Path

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.sweeps import failures, manifest
from subspace_lab.sweeps.launcher import cells_first


def conduct(launch: Callable[[], object], sweep_dir: Path) -> int:
    """Run a sweep through Hydra and print how it ended; return the exit code: 1 if a cell has no result.

    Args:
        launch: Hydra's main function.
        sweep_dir: the sweep's folder.

    Raises:
        Interrupted: it was stopped; the message says how to go on.
    """
    try:
        with cells_first():
            launch()
    except (Interrupted, KeyboardInterrupt) as stopped:
        raise _stopped(sweep_dir) from stopped
    except ValueError as error:
        if "No trials are completed" not in str(error):  # Optuna has no best of none; the cells say why
            raise
    return tell(sweep_dir)


def tell(sweep_dir: Path) -> int:
    """Print the table of a sweep's runs and draw its plots; on stderr what failed. Return the exit code."""
    known = manifest.read(sweep_dir)
    if known is None:
        return 0
    from subspace_lab.reporting import report

    try:
        report.main([sweep_dir], unfinished=False)
    except UserError as error:
        if known.cells and len(failures.unfinished(sweep_dir, known)) < len(known.cells):
            print(f"note: {error}", file=sys.stderr)
    told = failures.lines(sweep_dir, known)
    if not told:
        return 0
    print("\n".join(told), file=sys.stderr)
    print(f"these alone are done by: {_again(known)}", file=sys.stderr)
    return 1


def _stopped(sweep_dir: Path) -> Interrupted:
    known = manifest.read(sweep_dir)
    if known is None:
        return Interrupted("interrupted")
    done = len(known.cells) - len(failures.unfinished(sweep_dir, known))
    what = "terminated" if interrupt.requested() not in (None, signal.SIGINT) else "interrupted"
    return Interrupted(
        f"sweep {what}, {done} of {len(known.cells)} cells are finished and what ran is saved; "
        f"continue with: {_again(known)}"
    )


def _again(known: manifest.Manifest) -> str:
    words = known.command
    return words if "resume=auto" in words.split() else f"{words} resume=auto"
