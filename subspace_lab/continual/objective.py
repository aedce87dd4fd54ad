"""What a batch of a task in a sequence means: which outputs are compared in training, and which in evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from subspace_lab.continual.context import Head
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.models.task_heads import TaskHeads, find_task_heads
from subspace_lab.training.tasks import Batch, Classification, Sums, Task, logits_of

Attack = Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]


class SequenceObjective:
    """A `Task` over the data's own one: the loss is the method's, the outputs are those of the tasks at hand.

    Args:
        inner: what the data are for: `Classification`, or any other task if there is a single head.
        method: adds to the loss, or answers in the model's place.
        columns: the outputs of each task.
        head: see `TaskContext`.
        loss_over: task: the training loss compares the outputs of the current task; seen: of all tasks up to it.

    Attributes:
        current: the task that is trained (the last one, of tasks trained jointly).
        judged: the task that is evaluated.
        joint: all tasks are trained at once.
        attack: changes inputs (b, …) before they are classified, given the logits as a function of them, and labels.
    """

    unit: ClassVar[str] = "examples"
    headline: ClassVar[tuple[str, str]] = ("val/accuracy", "val acc")

    def __init__(
        self,
        inner: Task,
        method: ContinualMethod,
        columns: Sequence[range],
        head: Head,
        loss_over: Literal["task", "seen"] = "task",
    ) -> None:
        self._inner, self._method, self._columns, self._head = inner, method, list(columns), head
        self._loss_over = loss_over
        self.unit, self.headline = inner.unit, inner.headline  # type: ignore[misc]
        self.current = self.judged = 0
        self.joint = False
        self.attack: Attack | None = None
        # which task each output belongs to
        self._owner = torch.cat([torch.full((len(c),), t) for t, c in enumerate(columns)])

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return what the method minimises on a batch (fp32 scalar)."""
        return self._method.objective(model, dict(batch), self.task_loss)

    def task_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the mean loss over the outputs that training compares."""
        if not isinstance(self._inner, Classification):
            return self._inner.loss(model, batch)
        heads = find_task_heads(model)
        first = 0 if self.joint or self._loss_over == "seen" else self.current
        columns = self._activate(heads, range(first, self.current + 1))
        owner = self._owner.to(batch["labels"].device) if self.joint and self._head == "task" else None

        def outputs(inputs: Tensor) -> Tensor:
            logits = logits_of(model, {"inputs": inputs}) / self._method.temperature
            if owner is not None and not batch["labels"].is_floating_point():  # each example has its own task's outputs
                logits = logits.masked_fill(owner != owner[batch["labels"]][:, None], -torch.inf)
            return logits

        return self._inner.loss(outputs, _shifted(batch, columns))  # type: ignore[arg-type]

    def forward(self, model: nn.Module, batch: Batch) -> Any:
        """Run the model as training does; what it returns is for nobody."""
        if not isinstance(self._inner, Classification):
            return self._inner.loss(model, batch)
        self._activate(find_task_heads(model), range(self.current, self.current + 1))
        return logits_of(model, batch)

    def measure(self, model: nn.Module, batch: Batch) -> tuple[Tensor, ...]:
        """Return what `Sums.add` takes, of a batch of task `judged`."""
        if not isinstance(self._inner, Classification):
            return self._inner.measure(model, batch)
        heads = find_task_heads(model)
        told = range(self.judged, self.judged + 1)
        columns = self._activate(heads, told if self._head == "task" else range(self.current + 1))
        batch = _shifted(batch, columns)

        def outputs(inputs: Tensor) -> Tensor:
            now = {**batch, "inputs": inputs}
            scores = self._method.scores(model, now, columns)
            return logits_of(model, now) if scores is None else scores

        if self.attack is not None:
            with torch.enable_grad():
                batch = {**batch, "inputs": self.attack(outputs, batch["inputs"], batch["labels"])}
        return self._inner.measure(outputs, batch)  # type: ignore[arg-type]

    def _activate(self, heads: TaskHeads | None, tasks: range) -> range:
        """Have the model answer for these tasks; returns the outputs it then gives."""
        if heads is None:
            return range(self._columns[0].start, self._columns[-1].stop)
        heads.active = tasks
        return range(self._columns[tasks.start].start, self._columns[tasks.stop - 1].stop)

    def size(self, batch: Batch) -> int:
        """Return the batch's size in units."""
        return self._inner.size(batch)

    def sums(self, device: torch.device) -> Sums:
        """Return sums of nothing."""
        return self._inner.sums(device)

    def figures(self, total: Tensor, part: str) -> dict[str, float]:
        """Return the figures of a part by name."""
        return self._inner.figures(total, part)


def _shifted(batch: Batch, columns: range) -> dict[str, Any]:
    """The batch with its labels counted from the first of the columns."""
    labels = batch["labels"]
    if labels.is_floating_point():
        return {**batch, "labels": labels[:, columns.start : columns.stop]}
    if columns.start == 0:
        return dict(batch)
    return {**batch, "labels": torch.where(labels == -100, labels, labels - columns.start)}
