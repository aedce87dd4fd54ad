"""A learning rate that falls where validation stops improving, and the best weights at the end: GPM's recipe.

Serrà et al., ICML 2018, arXiv 1801.01423 (HAT), whose training loop GPM, SGP, TRGP and ROGO took over: after `patience`
validations without a better loss the learning rate is divided by `factor`; when it falls below `min_lr` training (of
the task) ends; the weights of the best validation are what is kept.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.training.module import ExperimentModule


class Plateau(Callback):
    """Watches `monitor` at every validation within training.

    Every fit (every task of a sequence) starts anew; a resumed one goes on where it was.

    Args:
        monitor: the validation figure; smaller is better.
        patience: validations in a row without a better figure until the learning rate falls.
        factor: it is divided by this.
        min_lr: training ends when it falls below.
    """

    def __init__(self, monitor: str = "val/loss", patience: int = 6, factor: float = 2.0, min_lr: float = 1e-5) -> None:
        if patience < 1:
            raise UserError(f"callbacks: patience={patience}: expected at least 1")
        if not factor > 1:
            raise UserError(f"callbacks: factor={factor}: expected a number above 1")
        if not min_lr >= 0:
            raise UserError(f"callbacks: min_lr={min_lr}: expected 0 or more")
        self.monitor, self.patience, self.factor, self.min_lr = monitor, patience, factor, min_lr
        self._start()

    def _start(self) -> None:
        self._best, self._left = math.inf, self.patience
        self._weights: dict[str, Tensor] = {}
        self._done = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget the fit before; what a resumed one was at is read after this.

        Raises:
            UserError: nothing is validated during training.
        """
        if stage != "fit":
            return
        if trainer.check_val_every_n_epoch is not None or trainer.limit_val_batches == 0:
            raise UserError(
                "callbacks=plateau looks at every validation, and there is none", hint="trainer.val_every=STEPS"
            )
        self._start()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the figure in."""
        if trainer.state.fn != "fit" or self._done:
            return
        assert isinstance(pl_module, ExperimentModule)
        if self.monitor not in pl_module.validation:
            known = ", ".join(sorted(pl_module.validation))
            raise UserError(f"callbacks: monitor={self.monitor}: no such figure", hint=f"there are: {known}")
        figure = pl_module.validation[self.monitor]
        if figure < self._best:
            self._best, self._left = figure, self.patience
            self._weights = {name: tensor.clone() for name, tensor in pl_module.model.state_dict().items()}
            return
        self._left -= 1
        if self._left > 0:
            return
        self._left = self.patience
        if max(float(group["lr"]) for group in trainer.optimizers[0].param_groups) / self.factor < self.min_lr:
            self._done = trainer.should_stop = True
            return
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                for name in ("lr", "initial_lr"):
                    if name in group:
                        group[name] /= self.factor
        for config in trainer.lr_scheduler_configs:  # or the next step would set the old one again
            scheduler: Any = config.scheduler
            scheduler.base_lrs = [lr / self.factor for lr in scheduler.base_lrs]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End at once where a checkpoint was written between the decision to stop and the end."""
        if self._done:
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the best weights in, before the last checkpoint is written."""
        self._restore(pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Likewise where a fit was resumed after its last step and did not train."""
        self._restore(pl_module)

    def _restore(self, pl_module: LightningModule) -> None:
        if self._weights:
            assert isinstance(pl_module, ExperimentModule)
            pl_module.model.load_state_dict(self._weights)
            self._weights = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the best figure and its weights, and what is left of the patience."""
        return {"best": self._best, "left": self._left, "done": self._done, "weights": dict(self._weights)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on watching from a checkpoint."""
        self._best, self._left, self._done = state_dict["best"], state_dict["left"], state_dict["done"]
        self._weights = {name: torch.as_tensor(tensor) for name, tensor in state_dict["weights"].items()}
