"""What a user sees while training: a bar on a terminal, one plain line every few rows elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer

from subspace_lab.reporting.durations import clock
from subspace_lab.training.callbacks.method import MethodDriver
from subspace_lab.training.module import ExperimentModule

if TYPE_CHECKING:
    from rich.progress import Progress

_LINES = 20  # plain lines per run of a few minutes
_SECONDS = 30.0  # and the longest silence of a longer one


class ProgressDisplay(Callback):
    """Shows step, loss, the task's validation figure, throughput and the time left, on stderr of the first process.

    Args:
        driver: where the last logged loss and the clock are.
        label: what is being trained, at the start of each line.
        bar: draw a bar; otherwise print lines.
    """

    def __init__(self, driver: MethodDriver, label: str, *, bar: bool) -> None:
        self.driver = driver
        self.label = label
        self.bar = bar
        self._progress: Progress | None = None
        self._task: Any = None
        self._last = 0.0
        self._begun = (0.0, 0)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the empty bar."""
        self._begun = (self.driver.timing.seconds, trainer.global_step)
        self._last = time.monotonic()
        if not self.bar or not trainer.is_global_zero:
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
            expand=True,
        )
        self._task = self._progress.add_task(
            self.label, total=trainer.max_steps, completed=trainer.global_step, figures=""
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar at most ten times a second, or print a line about every twentieth of the run."""
        if not trainer.is_global_zero or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        step = trainer.global_step
        if self._progress is not None:
            now = time.monotonic()
            if now - self._last > 0.1 or step == trainer.max_steps:
                self._last = now
                self._progress.update(self._task, completed=step, figures=self._figures(trainer, pl_module))
        elif not self.bar and self._line_due(trainer):
            self._last = time.monotonic()
            line = f"{self.label}  step {step}/{trainer.max_steps}  {self._figures(trainer, pl_module)}"
            print(line, file=sys.stderr, flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _line_due(self, trainer: Trainer) -> bool:
        """About twenty lines a run, more if they would be over half a minute apart."""
        step, every = trainer.global_step, self.driver.log_every
        rows = max(1, round(trainer.max_steps / _LINES / every))
        overdue = time.monotonic() - self._last > _SECONDS and step % every == 0
        return step % (rows * every) == 0 or step == trainer.max_steps or overdue

    def _figures(self, trainer: Trainer, pl_module: LightningModule) -> str:
        assert isinstance(pl_module, ExperimentModule)
        timing = self.driver.timing
        parts = []
        if self.driver.last_loss is not None:
            parts.append(f"loss {self.driver.last_loss:.3f}")
        metric, name = pl_module.task.headline
        if metric in pl_module.validation:
            digits = 3 if metric.endswith("accuracy") else 2
            parts.append(f"{name} {pl_module.validation[metric]:.{digits}f}")
        parts.append(f"{timing.units_per_second:,.0f} {pl_module.task.unit}/s")
        seconds, steps = timing.seconds - self._begun[0], trainer.global_step - self._begun[1]
        if steps:
            parts.append(f"{clock(seconds / steps * (trainer.max_steps - trainer.global_step))} left")
        return "  ".join(parts)
