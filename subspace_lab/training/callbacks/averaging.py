"""Averages of the weights along the run (EMA, SWA), in whose place they are validated, tested and exported."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from subspace_lab.errors import UserError
from subspace_lab.methods.manifold import place
from subspace_lab.training.module import ExperimentModule


class Averaging(WeightAveraging):
    """Lightning's weight averaging, with weights on manifolds brought back to them after every update.

    A mean of orthonormal bases is not orthonormal; its polar factor, the nearest point, is (the projected arithmetic
    mean). Which weights live on a manifold the method tells of the averaged copy as of the model itself.

    Args:
        decay: weight of the past in the exponential moving average; null weighs all steps alike (SWA).
        start: optimizer steps before the first that counts; below 1 a share of the run.
    """

    def __init__(self, decay: float | None = 0.999, start: int | float = 0) -> None:
        if decay is not None and not 0 < decay < 1:
            raise UserError(f"callbacks: decay={decay}: expected a number between 0 and 1, or null")
        if start < 0:
            raise UserError(f"callbacks: start={start}: expected 0 or more")
        average = get_swa_multi_avg_fn() if decay is None else get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]
        super().__init__(multi_avg_fn=_of_floats(average))
        self._start = start
        self._points: list[tuple[Tensor, dict[str, Any]]] = []

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        """Return whether the step with this index (from 0) counts."""
        return step_idx is not None and step_idx >= self._start

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the averaged copy when training begins.

        Raises:
            UserError: the weights are sharded.
        """
        if isinstance(trainer.strategy, ModelParallelStrategy):
            raise UserError("averaged weights need whole ones, which trainer=fsdp has not", hint="use trainer=ddp")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that sharded models do not work
            super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if self._start < 1:
                self._start = int(self._start * trainer.max_steps)
            assert isinstance(pl_module, ExperimentModule) and self._average_model is not None
            copied = self._average_model.module
            assert isinstance(copied, ExperimentModule)
            groups = pl_module.method.param_groups(copied.model)
            self._points = [(p, group) for group in groups if "manifold" in group for _, p in group["params"]]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Take the step into the average."""
        before = self._latest_update_step
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._latest_update_step != before:
            for p, group in self._points:
                place(p, group["manifold"], blocks=group["blocks"], near=True)


def _of_floats(average: Callable[[list[Tensor], list[Tensor], Any], None]) -> Callable[..., None]:
    """Average floats; counters (BatchNorm's batches, which torch's SWA cannot divide) are taken over."""

    def run(averaged: list[Tensor], current: list[Tensor], count: Any) -> None:
        if averaged[0].is_floating_point():
            average(averaged, current, count)
        else:
            torch._foreach_copy_(averaged, current)

    return run
