"""Throughput, wall time and peak memory, without validation and checkpoints."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from subspace_lab.training.module import ExperimentModule


class Timing(Callback):
    """Keeps the clock of a run, across resumes.

    `seconds` is training time (batches, steps, waiting for data); validation and checkpoints stop the clock. Units
    (the task's: tokens, examples) per second leave out the first step of each process, where caches, kernels and
    compilation warm up.

    Attributes:
        seconds: training time of all steps, over all processes' lives of this run.
        units: tokens or examples consumed by all steps and all ranks.
        validation_seconds: time spent in validation.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.units = 0
        self.validation_seconds = 0.0
        self._warm_seconds = 0.0
        self._warm_units = 0
        self._mark = 0.0
        self._validation_mark = 0.0
        self._batches_here = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._batches_here = 0
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch and its time."""
        assert isinstance(pl_module, ExperimentModule)
        now = time.perf_counter()
        elapsed, self._mark = now - self._mark, now
        units = pl_module.task.size(batch) * trainer.world_size
        self.seconds += elapsed
        self.units += units
        if self._batches_here >= trainer.accumulate_grad_batches:
            self._warm_seconds += elapsed
            self._warm_units += units
        self._batches_here += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock once the device has caught up with the host."""
        self._catch_up(trainer)
        self._validation_mark = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start it again."""
        self.validation_seconds += time.perf_counter() - self._validation_mark
        self.restart()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for the device's last step."""
        self._catch_up(trainer)

    def restart(self) -> None:
        """Leave the time since the last batch out (validation, a checkpoint)."""
        self._mark = time.perf_counter()

    @property
    def units_per_second(self) -> float:
        """Training throughput over all ranks; of all steps if there was only a first one."""
        if self._warm_seconds > 0:
            return self._warm_units / self._warm_seconds
        return self.units / self.seconds if self.seconds > 0 else 0.0

    def _catch_up(self, trainer: Trainer) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        if self._batches_here:
            elapsed = time.perf_counter() - self._mark
            self.seconds += elapsed
            if self._batches_here > trainer.accumulate_grad_batches:
                self._warm_seconds += elapsed
            self.restart()

    def state_dict(self) -> dict[str, Any]:
        """Return the clock."""
        return {
            "seconds": self.seconds,
            "units": self.units,
            "validation_seconds": self.validation_seconds,
            "warm": [self._warm_seconds, self._warm_units],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting from a checkpoint."""
        self.seconds, self.units = float(state_dict["seconds"]), int(state_dict["units"])
        self.validation_seconds = float(state_dict["validation_seconds"])
        self._warm_seconds, self._warm_units = state_dict["warm"]


def peak_memory_bytes(device: torch.device) -> int:
    """Return the largest CUDA allocation since training began, or the process's largest resident set on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024
