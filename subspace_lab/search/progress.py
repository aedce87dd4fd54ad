"""One line on stderr for every finished cell, under them a bar on a terminal, and about how long it will still take."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from subspace_lab.search.cells import CellResult

if TYPE_CHECKING:
    from rich.progress import Progress


class Display:
    """Tells how a search goes; on other ranks than the first it is silent.

    Args:
        metric: the figure to print.
        parallel: cells at the same time.
        silent: print nothing.
    """

    def __init__(self, metric: str, *, parallel: int, silent: bool) -> None:
        self._metric, self._parallel, self._silent = metric, parallel, silent
        self._seconds: list[float] = []
        self._trained = self._reused = 0
        self._progress: Progress | None = None
        self._bar: Any = None
        self.thresholds: Mapping[str, float] = {}

    def __enter__(self) -> Display:
        if not self._silent and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar = self._progress.add_task("cells", total=None)
            self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def finished(self, result: CellResult, left: int) -> None:
        """Tell of one cell.

        Args:
            result: its figures.
            left: about how many more will be trained.
        """
        if result.reused:
            self._reused += 1
        else:
            self._trained += 1
            self._seconds.append(result.seconds)
        if self._silent:
            return
        figure = "diverged" if result.diverged else f"{result.value(self._metric):.3f}"
        line = f"{result.spec}: {self._metric.split('/')[0]} {figure}{self._compared()} · "
        if result.reused:
            line += "of an earlier search"
        else:
            line += f"{self._trained} cell{'s' if self._trained != 1 else ''}{self._time_left(left)}"
        self._print(line, left)

    def _compared(self) -> str:
        if not self.thresholds:
            return ""
        return f" (threshold {', '.join(f'{value:.3f} {name}' for name, value in self.thresholds.items())})"

    def _time_left(self, left: int) -> str:
        if not self._seconds or left < 1:
            return ""
        recent = self._seconds[-10:]
        return f", about {write_seconds(left * sum(recent) / len(recent) / min(self._parallel, left))} left"

    def _print(self, line: str, left: int) -> None:
        if self._progress is None:
            print(line, file=sys.stderr, flush=True)
            return
        done = self._trained + self._reused
        self._progress.update(self._bar, completed=done, total=done + left)
        self._progress.console.print(line, highlight=False, markup=False)


def write_seconds(seconds: float) -> str:
    """Return a duration roughly: `40 s`, `3 min`, `2.5 h`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
