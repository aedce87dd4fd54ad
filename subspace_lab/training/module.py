"""The one LightningModule: a model, a task, a method and how to make the optimizer.

No configuration is stored here: factories come in as callables, so that a checkpoint holds plain tensors only.
Lightning has no hook after the optimizer's step, so the method's `after_step` hangs on
`optimizer.register_step_post_hook`, which also fires once per step (not per micro-batch) under gradient accumulation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
from subspace_lab.training.tasks import Batch, Sums, Task

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from subspace_lab.methods.base import Method

OptimizerFactory = Callable[["Method", nn.Module], "Optimizer"]
SchedulerFactory = Callable[["Optimizer"], "LRScheduler"]


class ExperimentModule(LightningModule):
    """Trains `model` on `task` with `method`.

    Args:
        model: the network, called as the task does.
        task: turns a batch into a loss and sums over a data set into figures.
        method: what decides in which directions the parameters may move.
        make_optimizer: (method, model) -> optimizer; called after `method.prepare`, with the model on its device.
        make_scheduler: optimizer -> learning-rate scheduler stepped once per optimizer step.
        compile_model: run the model through torch.compile.

    Attributes:
        last_loss: the last micro-batch's mean loss (fp32 scalar on the device, detached).
        validation: the figures of the last finished validation pass; empty before the first.
        part: what Lightning's test loop is looking at: test, or train after training.
        evaluation: the figures of the finished test loops.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        method: Method,
        make_optimizer: OptimizerFactory,
        make_scheduler: SchedulerFactory,
        *,
        compile_model: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.method = method
        self.make_optimizer = make_optimizer
        self.make_scheduler = make_scheduler
        self.compile_model = compile_model
        self.last_loss: Tensor | None = None
        self.validation: dict[str, float] = {}
        self.part = "test"
        self.evaluation: dict[str, float] = {}
        self._sums: Sums = task.sums(torch.device("cpu"))
        self._prepared = False

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; the hook's name, which Lightning notes dozens of times a step, without torch's ceremony."""
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def configure_model(self) -> None:
        """Let the method change the model; runs before weights are restored, so shapes are right by then."""
        if self._prepared:  # Lightning calls this for every fit and every validate
            return
        self.model = self.method.prepare(self.model)
        if self.compile_model:
            self.model.compile()  # in place: the names in checkpoints stay the plain ones
        if self._device_mesh is not None:  # trainer=fsdp
            from subspace_lab.training.sharding import shard

            shard(self.model, self._device_mesh["data_parallel"], self.method.shard_dimensions(self.model))
        self._prepared = True

    def configure_optimizers(self) -> Any:
        """Build the optimizer and its per-step scheduler and hang the method's `after_step` on it."""
        optimizer = self.make_optimizer(self.method, self.model)
        if isinstance(self.trainer.strategy, DDPStrategy):  # every process has the averaged gradient
            for part in (optimizer, *getattr(optimizer, "children", ())):
                if isinstance(part, SubspaceOptimizer):
                    part.share_refreshes()
        optimizer.register_step_post_hook(lambda stepped, args, kwargs: self.method.after_step(stepped))
        scheduler = self.make_scheduler(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the micro-batch's mean loss."""
        loss = self.task.loss(self.model, batch)
        self.last_loss = loss.detach()
        return loss

    def on_validation_epoch_start(self) -> None:
        """Start the sums anew."""
        self._sums = self.task.sums(self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the sums; nothing leaves the device."""
        self._sums.add(*self.task.measure(self.model, batch))

    def on_validation_epoch_end(self) -> None:
        """Reduce the sums over the processes and publish the figures (also as `trainer.callback_metrics`)."""
        self.validation = self.task.figures(self._total(), "val")
        for name, value in self.validation.items():
            # float64: in 32-bit mode Lightning's logging would round the figure that early stopping and sweeps look at.
            self.log(name, torch.tensor(value, dtype=torch.float64), logger=False, rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        """Start the sums anew."""
        self._sums = self.task.sums(self.device)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Add one batch to the sums; nothing leaves the device."""
        self._sums.add(*self.task.measure(self.model, batch))

    def on_test_epoch_end(self) -> None:
        """Reduce the sums over the processes and keep the figures."""
        self.evaluation |= self.task.figures(self._total(), self.part)

    def _total(self) -> Tensor:
        local = self._sums.local()
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(local)
        return local
