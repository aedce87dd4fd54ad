"""The one callback that drives a method and writes the training rows: loss, learning rate, throughput, `subspace/…`."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from subspace_lab.training.callbacks.timing import Timing
from subspace_lab.training.module import ExperimentModule


class MethodDriver(Callback):
    """Measures the method on logged steps and writes their rows; every other step runs without a host sync.

    A row belongs to the number of finished optimizer steps. `train/loss` is the mean over the step's micro-batches
    and over the ranks of the mean loss per target.

    Args:
        log_every: optimizer steps between rows.
        timing: the run's clock.

    Attributes:
        last_loss: the last row's train/loss, for the progress display.
    """

    def __init__(self, log_every: int, timing: Timing) -> None:
        self.log_every = log_every
        self.timing = timing
        self.last_loss: float | None = None
        self._losses: list[Tensor] = []
        self._energy: list[float] = [0.0, 0.0]  # sum and number of the measured captured energies
        self._refresh: list[float] = [0.0, 0.0]  # seconds and number of refreshes before this process
        self._refresh_start: list[float] = [0.0, 0.0]
        self._optimizer: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note where the optimizer's own counters stand (a restored optimizer may bring its old ones along)."""
        self._optimizer = trainer.optimizers[0]
        self._refresh_start = self._counters()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Ask the optimizer to measure the coming step if it will be logged."""
        if hasattr(self._optimizer, "measure"):
            self._optimizer.measure = (trainer.global_step + 1) % self.log_every == 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write a row after every `log_every`-th step."""
        assert isinstance(pl_module, ExperimentModule) and pl_module.last_loss is not None
        self._losses.append(pl_module.last_loss)
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        losses, self._losses = self._losses, []
        if trainer.global_step % self.log_every:
            return
        loss = torch.stack(losses).mean()
        if trainer.world_size > 1:
            torch.distributed.all_reduce(loss)
            loss = loss / trainer.world_size
        self.last_loss = loss.item()
        unit = pl_module.task.unit
        row = {
            "train/loss": self.last_loss,
            "train/lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            f"train/{unit}": float(self.timing.units),
            f"train/{unit}_per_second": self.timing.units_per_second,
        }
        measured = {f"subspace/{name}": float(value) for name, value in pl_module.method.metrics().items()}
        if "subspace/refreshes" in measured:  # the optimizer counts its own life, the rows count the run's
            measured["subspace/refreshes"] = self._refreshes()[1]
        if "subspace/captured_energy" in measured:
            self._energy[0] += measured["subspace/captured_energy"]
            self._energy[1] += 1
        write_row(trainer, row | measured)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the validation's figures into the same row as the step they follow."""
        assert isinstance(pl_module, ExperimentModule)
        write_row(trainer, pl_module.validation)

    def figures(self, optimizer: Any) -> dict[str, float]:
        """Return the run's figures: share of training time in refreshes, their number, mean captured energy."""
        self._optimizer = optimizer  # of a run resumed at its end no step has told
        found: dict[str, float] = {}
        if hasattr(self._optimizer, "refresh_seconds"):
            seconds, count = self._refreshes()
            found["subspace/refresh_share"] = seconds / self.timing.seconds if self.timing.seconds else 0.0
            found["subspace/refresh_count"] = count
        if self._energy[1]:
            found["subspace/captured_energy"] = self._energy[0] / self._energy[1]
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the sums behind `figures`."""
        return {"energy": self._energy, "refresh": self._refreshes()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on summing from a checkpoint."""
        self._energy, self._refresh = list(state_dict["energy"]), list(state_dict["refresh"])

    def _counters(self) -> list[float]:
        return [
            float(getattr(self._optimizer, "refresh_seconds", 0.0)),
            float(getattr(self._optimizer, "refresh_count", 0)),
        ]

    def _refreshes(self) -> list[float]:
        return [a + b - c for a, b, c in zip(self._refresh, self._counters(), self._refresh_start, strict=True)]


def write_row(trainer: Trainer, values: dict[str, float]) -> None:
    """Hand one row, numbered by finished optimizer steps, to every logger of the first process."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step)
