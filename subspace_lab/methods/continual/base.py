"""What a continual-learning method is: a `Method` that is told where tasks begin and end.

Order of calls in a run with T tasks:

    prepare(model)                       once; weights may be reparametrised, parameters of all tasks exist from here on
    for each task
        begin_task(model, task)          decide (bases, trust regions, …): not repeated on a resume
        install(model, index)            act on the model (requires_grad, bases of layers); after a resume this alone
        build_optimizer, training with `objective`, after_step after each optimizer step
        end_task(model, task)            gather what is to be protected
        evaluation of the tasks seen so far, task j inside `as_of(model, j)`
    export(model)                        once

Whatever `begin_task` and `end_task` decide is in `state_dict`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from subspace_lab.continual.context import TaskContext
from subspace_lab.data.packing import Batch
from subspace_lab.methods.base import Method

Loss = Callable[[nn.Module, Batch], Tensor]


class ContinualMethod(Method):
    """Base of all methods of `protocol=continual`: ordinary training, task after task.

    Attributes:
        schedule: sequence: one task after another; joint: all tasks at once, as a bound.
        trains: whether tasks are trained by gradient descent; else `end_task` does all there is to do.
        temperature: the logits are divided by it in the training loss.
    """

    name: ClassVar[str] = "naive"
    protocols: ClassVar[tuple[str, ...]] = ("continual",)
    shards: ClassVar[bool] = False
    schedule: ClassVar[Literal["sequence", "joint"]] = "sequence"
    trains: ClassVar[bool] = True
    temperature: float = 1.0

    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        """Decide what the coming task may change."""

    def install(self, model: nn.Module, index: int) -> None:
        """Put the decisions for task `index` into the model; called before every training, also after a resume."""

    def objective(self, model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
        """What is minimised on one batch: the task's own `loss`, unless the method adds to it."""
        return loss(model, batch)

    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        """Take in what the finished task has to be remembered by."""

    def scores(self, model: nn.Module, batch: Batch, columns: range) -> Tensor | None:
        """Scores (b, len(columns)) that replace the model's outputs in evaluation; None: the model's are used."""
        return None

    def as_of(self, model: nn.Module, index: int) -> AbstractContextManager[None]:
        """The model as it answers for task `index`, for methods that keep something per task."""
        return nullcontext()

    def ranks(self) -> dict[str, int]:
        """Protected (or occupied) directions of each layer, by the path of the layer."""
        return {}

    def dimensions(self) -> dict[str, int]:
        """The number of directions that each layer of `ranks` has."""
        return {}

    def basis_bytes(self) -> int:
        """Bytes of what is kept from old tasks: bases, sketches, replayed examples."""
        return 0

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values: all that later tasks need."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
