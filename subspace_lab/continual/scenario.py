"""How a sequence of tasks is made out of a data set: which classes, pixels or sets each has, and which outputs.

A scenario knows nothing of methods. Its labels are output columns, counted over the whole sequence: task after task
(`head=task`, told at test time which columns it is about; `head=class`, not told), or the same ones for all tasks
(`head=single`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from subspace_lab.continual.context import Head
from subspace_lab.data.changes import Change
from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from subspace_lab.data.splits import Indices
    from subspace_lab.data.supervised import Parts, SupervisedDataModule

LossOver = Literal["task", "seen"]


@dataclass(frozen=True)
class TaskData:
    """One task of a sequence.

    Attributes:
        name: for tables and plots.
        columns: which outputs are its classes.
        data: its training, validation and test examples, labelled by column, in an order of its own.
    """

    name: str
    columns: range
    data: SupervisedDataModule


@dataclass(frozen=True)
class Plan:
    """What makes one task.

    Attributes:
        name: for tables and plots.
        columns: which outputs are its classes.
        source: whose examples it has.
        numbers: int64, the column of each of the source's classes, -1 for those that are not in the task; None: all
            examples as they are.
        change: of all inputs.
    """

    name: str
    columns: range
    source: SupervisedDataModule
    numbers: Indices | None
    change: Change | None = None


class Scenario(ABC):
    """Base of all scenarios.

    Args:
        head: task: own outputs for each task, told which at test time; class: own outputs, not told; single: all
            tasks share the outputs.
        loss_over: which outputs the training loss compares: the task's own, or all seen so far. Without effect on a
            single head.
        seed: of what is random about the tasks; null is the run's.
    """

    heads: ClassVar[tuple[Head, ...]]
    kind: ClassVar[str]

    def __init__(self, head: Head, loss_over: LossOver, seed: int | None) -> None:
        if head not in self.heads:
            raise UserError(
                f"scenario.head={head} does not fit scenario={self.kind}: its tasks have the same classes",
                hint=f"scenario.head={' or '.join(self.heads)}",
            )
        if loss_over not in ("task", "seen"):
            raise UserError(f"scenario.loss_over={loss_over}: no such choice", hint="task or seen")
        if seed is not None and seed < 0:
            raise UserError(f"scenario.seed={seed}: expected 0 or more", hint="null is the run's seed")
        self.head, self.loss_over, self._seed = head, loss_over, seed
        self._found: dict[str, Any] = {}

    @abstractmethod
    def sizes(self, data: SupervisedDataModule) -> list[int]:
        """Columns of each task, in order; one number with a single head. No example is read."""

    @abstractmethod
    def _plans(self, data: SupervisedDataModule, seed: int) -> list[Plan]:
        """What makes the tasks."""

    def outputs(self, data: SupervisedDataModule) -> int:
        """Columns that a model of the whole sequence needs. No example is read."""
        return sum(self.sizes(data))

    def build(self, data: SupervisedDataModule, seed: int) -> list[TaskData]:
        """Make the tasks.

        Args:
            data: after `setup`.
            seed: of the run.

        Raises:
            UserError: data that cannot be divided so.
        """
        plans = self._plans(data, seed if self._seed is None else self._seed)
        outputs = self.outputs(data)
        tasks = []
        for index, plan in enumerate(plans):
            parts = _restricted(plan, self.kind)
            tasks.append(TaskData(plan.name, plan.columns, plan.source.narrowed(index, plan.name, parts, outputs)))
        self._found["tasks"] = [plan.name for plan in plans]
        self._found["columns"] = [[plan.columns.start, plan.columns.stop] for plan in plans]
        changes = [plan.change for plan in plans]
        if any(changes):
            self._found["changes"] = [change.identity() if change else "none" for change in changes]
        return tasks

    def describe(self) -> dict[str, Any]:
        """What results.json records of the sequence; after `build`."""
        return {"kind": self.kind, "head": self.head, "loss_over": self.loss_over, **self._found}

    def joined(self, tasks: Sequence[TaskData]) -> SupervisedDataModule:
        """The examples of all tasks as one data set, shuffled together: what `method=joint` trains on.

        Mixing, batch size and workers are those of the first task.
        """
        from subspace_lab.data.joined import JoinedExamples
        from subspace_lab.data.supervised import Parts

        whole = [
            JoinedExamples([getattr(task.data.parts, part) for task in tasks])
            for part in ("train", "validation", "test")
        ]
        return tasks[0].data.narrowed(len(tasks), "joint", Parts(*whole), max(task.columns.stop for task in tasks))

    def columns(self, index: int, sizes: Sequence[int]) -> range:
        """Columns of task `index` of a sequence of tasks of so many classes."""
        if self.head == "single":
            return range(max(sizes))
        start = sum(sizes[:index])
        return range(start, start + sizes[index])


def _restricted(plan: Plan, kind: str) -> Parts:
    """The plan's share of every part; without held-out examples validation is the last tenth of its training part."""
    from subspace_lab.data.supervised import Parts

    whole, numbers = plan.source.parts, plan.numbers
    if numbers is None:
        return whole

    def chosen(examples: Any) -> Any:
        if not hasattr(examples, "chosen"):
            raise UserError(f"scenario={kind} divides image sets, and data={plan.source.dataset} is none")
        return examples.chosen(np.flatnonzero(numbers[examples.targets] >= 0), numbers, plan.change)

    train, validation = chosen(whole.train), chosen(whole.validation)
    if not plan.source.held_out and len(train):
        tail = np.arange(len(train) - max(1, len(train) // 10), len(train))
        same = np.arange(plan.columns.stop, dtype=np.int64)
        validation = train.chosen(tail, same, plan.change)
    return Parts(train, validation, chosen(whole.test))


def classes_of(data: SupervisedDataModule, kind: str) -> int:
    """How many classes an image set has.

    Raises:
        UserError: no image set.
    """
    classes: int | None = getattr(data, "classes", None)
    if classes is None:
        raise UserError(
            f"scenario={kind} divides image sets, and data={data.dataset} is none",
            hint="data=permuted_digits, or any image set of `subspace-lab list data`",
        )
    return classes
