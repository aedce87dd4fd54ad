"""What a user sees of a federated run: a bar on a terminal, one plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from subspace_lab.reporting.durations import clock

if TYPE_CHECKING:
    from subspace_lab.training.trainer import TrainerPlan

_LINES = 20  # plain lines per run of a few minutes
_SECONDS = 30.0  # and the longest silence of a longer one


class RoundProgress:
    """Shows rounds, the last validation accuracy and the time left, on stderr.

    Args:
        plan: says whether and how.
        label: what is being run, at the start of each line.
        rounds: of the whole run.
    """

    def __init__(self, plan: TrainerPlan, label: str, rounds: int) -> None:
        self._label, self._rounds = label, rounds
        self._quiet, self._wants_bar = plan.progress == "off", plan.wants_bar()
        self._bar: Any = None
        self._job: Any = None
        self._began: tuple[float, int] | None = None
        self._last = time.monotonic()

    def show(self, task: int, tasks: int, done: int, accuracy: float | None) -> None:
        """A round is over.

        Args:
            task: the one at hand, from 0.
            tasks: how many there are.
            done: rounds behind, of the whole run.
            accuracy: on validation examples, if it was measured.
        """
        if self._quiet:
            return
        now = time.monotonic()
        if self._began is None:
            self._began = (now, done)
        told = [f"val acc {accuracy:.3f}"] if accuracy is not None else []
        since, first = self._began
        if done > first:
            told.append(f"{clock((now - since) / (done - first) * (self._rounds - done))} left")
        title = f"{self._label} task {task + 1}/{tasks}" if tasks > 1 else self._label
        if self._wants_bar:
            self._draw(title, done, "  ".join(told))
        elif done % max(1, self._rounds // _LINES) == 0 or done == self._rounds or now - self._last > _SECONDS:
            self._last = now
            print(f"{title}  round {done}/{self._rounds}  {'  '.join(told)}".rstrip(), file=sys.stderr, flush=True)

    def task_line(
        self, name: str, row: Sequence[float], ranks: Mapping[str, int], dimensions: Mapping[str, int]
    ) -> None:
        """A task is over.

        Args:
            name: of the task.
            row: accuracies on the tasks so far.
            ranks: protected directions of each layer.
            dimensions: of each layer.
        """
        if self._quiet:
            return
        accuracies = " ".join(f"{accuracy:.3f}" for accuracy in row)
        told = [f"{rank}/{dimensions[path]}" for path, rank in ranks.items()]
        protected = f"; ranks {' '.join(told[:6])}{' …' if len(told) > 6 else ''}" if told else ""
        mean = sum(row) / len(row)
        line = f"{self._label}  after {name}: accuracies {accuracies}, mean {mean:.4f}{protected}"
        if self._bar is not None:
            self._bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _draw(self, title: str, done: int, figures: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

            columns = TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()
            self._bar = Progress(
                *columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True), expand=True
            )
            self._job = self._bar.add_task(title, total=self._rounds, figures="")
            self._bar.start()
        self._bar.update(self._job, completed=done, description=title, figures=figures)
