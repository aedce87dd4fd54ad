"""The scenarios: classes in groups, pixels in other orders, images turned, one set after another."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from typing_extensions import override

from subspace_lab.continual.class_order import ClassOrder, class_order, task_sizes
from subspace_lab.continual.context import Head
from subspace_lab.continual.scenario import LossOver, Plan, Scenario, classes_of
from subspace_lab.data.changes import Change, PixelOrder, Rotation
from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from subspace_lab.data.supervised import SupervisedDataModule


class Split(Scenario):
    """Classes in groups, one group a task (Split CIFAR and its like).

    Args:
        tasks: how many, of equally many classes.
        sizes: classes of each task, in place of `tasks`; e.g. [50, 10, 10, 10, 10, 10].
        class_order: fixed: as the data set numbers them; shuffled: by the seed; pilot: numpy's RandomState(1993), the
            same in every run.
        head: as in `Scenario`; with single, the k-th class of every task is output k.
        loss_over: as in `Scenario`.
        seed: of a shuffled order; null is the run's.
    """

    heads = ("task", "class", "single")
    kind = "split"

    def __init__(
        self,
        tasks: int = 5,
        sizes: Sequence[int] | None = None,
        class_order: ClassOrder = "fixed",
        head: Head = "task",
        loss_over: LossOver = "task",
        seed: int | None = None,
    ) -> None:
        super().__init__(head, loss_over, seed)
        self._tasks, self._wanted_sizes, self._order = tasks, sizes, class_order

    @override
    def sizes(self, data: SupervisedDataModule) -> list[int]:
        """Columns of each task."""
        sizes = self._class_counts(data)
        return [max(sizes)] if self.head == "single" else sizes

    def _class_counts(self, data: SupervisedDataModule) -> list[int]:
        sizes = task_sizes(data.dataset, classes_of(data, self.kind), self._tasks, self._wanted_sizes)
        if min(sizes) < 2 and (self.head != "class" or self.loss_over != "seen") and len(sizes) > 1:
            raise UserError(
                f"scenario=split: a task of one class of {data.dataset} has nothing to tell it from",
                hint="fewer scenario.tasks, or scenario.head=class scenario.loss_over=seen",
            )
        return sizes

    @override
    def _plans(self, data: SupervisedDataModule, seed: int) -> list[Plan]:
        sizes, order = self._class_counts(data), class_order(self._order, classes_of(data, self.kind), seed)
        self._found["class_order"] = order.tolist()
        plans = []
        for index, size in enumerate(sizes):
            own, columns = order[sum(sizes[:index]) :][:size], self.columns(index, sizes)
            numbers = np.full(len(order), -1, dtype=np.int64)
            numbers[own] = np.arange(size) + columns.start
            plans.append(Plan(_group_name(own.tolist()), columns, data, numbers))
        return plans


class _Changed(Scenario):
    """All classes in every task, the images changed in one way for each."""

    heads = ("single", "task")

    def __init__(self, tasks: int, head: Head, loss_over: LossOver, seed: int | None) -> None:
        super().__init__(head, loss_over, seed)
        if tasks < 1:
            raise UserError(f"scenario.tasks={tasks}: expected at least 1")
        self._tasks = tasks

    @override
    def sizes(self, data: SupervisedDataModule) -> list[int]:
        """Columns of each task."""
        return [classes_of(data, self.kind)] * (1 if self.head == "single" else self._tasks)

    @abstractmethod
    def _changes(self, height: int, width: int, seed: int) -> list[tuple[str, Change | None]]:
        """Name and change of every task."""

    @override
    def _plans(self, data: SupervisedDataModule, seed: int) -> list[Plan]:
        classes = classes_of(data, self.kind)
        _, height, width = data.shape  # type: ignore[attr-defined]  # what has classes here is images
        plans = []
        for index, (name, change) in enumerate(self._changes(height, width, seed)):
            columns = self.columns(index, [classes] * self._tasks)
            numbers = np.arange(classes, dtype=np.int64) + columns.start
            plans.append(Plan(name, columns, data, numbers, change))
        return plans


class Permuted(_Changed):
    """The pixels of every task in another order (Permuted MNIST).

    Args:
        tasks: how many.
        first: identity: the first task has its pixels where they are; permuted: not even that (GPM's release).
        head: single (domain-incremental) or task.
        loss_over: as in `Scenario`.
        seed: of the orders; null is the run's.
    """

    kind = "permuted"

    def __init__(
        self,
        tasks: int = 10,
        first: Literal["identity", "permuted"] = "identity",
        head: Head = "single",
        loss_over: LossOver = "task",
        seed: int | None = None,
    ) -> None:
        super().__init__(tasks, head, loss_over, seed)
        self._first = first

    @override
    def _changes(self, height: int, width: int, seed: int) -> list[tuple[str, Change | None]]:
        return [
            (
                f"permutation {index}",
                None
                if index == 0 and self._first == "identity"
                else PixelOrder(height, width, f"permuted/{seed}/{index}"),
            )
            for index in range(self._tasks)
        ]


class Rotated(_Changed):
    """The images of every task turned by another angle (Rotated MNIST).

    Args:
        tasks: how many; angles are evenly spaced from 0 to below `max_angle`.
        max_angle: in degrees, counterclockwise.
        angles: of each task, in place of `tasks` and `max_angle`.
        head: single (domain-incremental) or task.
        loss_over: as in `Scenario`.
    """

    kind = "rotated"

    def __init__(
        self,
        tasks: int = 10,
        max_angle: float = 180.0,
        angles: Sequence[float] | None = None,
        head: Head = "single",
        loss_over: LossOver = "task",
    ) -> None:
        super().__init__(len(angles) if angles is not None else tasks, head, loss_over, None)
        self._angles = [index * max_angle / tasks for index in range(tasks)] if angles is None else list(angles)
        if len(set(self._angles)) < len(self._angles):
            raise UserError(f"scenario.angles={self._angles}: expected each angle once", hint="scenario.max_angle=180")

    @override
    def _changes(self, height: int, width: int, seed: int) -> list[tuple[str, Change | None]]:
        return [(f"{angle:g}°", Rotation(height, width, angle) if angle % 360 else None) for angle in self._angles]


class DomainSequence(Scenario):
    """Every data set of a sequence a task, in the order in which the data name them.

    Args:
        tasks: how many of them, from the first on; null is all.
        head: single: all sets have the same classes (DomainNet by domain), or answers are text; task or class: each set
            has outputs of its own (5-Datasets).
        loss_over: as in `Scenario`.
    """

    heads = ("single", "task", "class")
    kind = "domain"

    def __init__(self, tasks: int | None = None, head: Head = "single", loss_over: LossOver = "task") -> None:
        super().__init__(head, loss_over, None)
        self._tasks = tasks

    def _members(self, data: SupervisedDataModule) -> dict[str, SupervisedDataModule]:
        members: dict[str, SupervisedDataModule] | None = getattr(data, "members", None)
        if members is None:
            raise UserError(
                f"scenario=domain needs data of several sets, and data={data.dataset} is one",
                hint="data=five_datasets, domainnet or image_folder_sequence; or scenario=split",
            )
        wanted = len(members) if self._tasks is None else self._tasks
        if not 1 <= wanted <= len(members):
            raise UserError(
                f"scenario.tasks={wanted}: data={data.dataset} has {len(members)} sets", hint=f"1 to {len(members)}"
            )
        if self.head == "single" and not data.shared_classes:  # type: ignore[attr-defined]
            raise UserError(
                f"scenario.head=single: the sets of data={data.dataset} have different classes",
                hint="scenario.head=task",
            )
        return dict(list(members.items())[:wanted])

    def _sizes(self, members: Iterable[SupervisedDataModule]) -> list[int]:
        if self.head == "single" and not any(hasattr(member, "classes") for member in members):
            return [0 for _ in members]  # text: what a task's answers are is not a matter of outputs
        return [classes_of(member, self.kind) for member in members]

    @override
    def sizes(self, data: SupervisedDataModule) -> list[int]:
        """Columns of each task."""
        sizes = self._sizes(self._members(data).values())
        return sizes[:1] if self.head == "single" else sizes

    @override
    def _plans(self, data: SupervisedDataModule, seed: int) -> list[Plan]:
        members = self._members(data)
        sizes = self._sizes(members.values())
        plans = []
        for index, (name, member) in enumerate(members.items()):
            columns = self.columns(index, sizes)
            numbers = np.arange(sizes[index], dtype=np.int64) + columns.start if sizes[index] else None
            plans.append(Plan(name, columns, member, numbers))
        return plans


def _group_name(classes: Sequence[int]) -> str:
    """`0-9` for neighbours in order, `3,7` for a few, `31,… (10)` for many."""
    if len(classes) > 2 and list(classes) == list(range(classes[0], classes[-1] + 1)):
        return f"{classes[0]}-{classes[-1]}"
    return ",".join(map(str, classes)) if len(classes) <= 4 else f"{classes[0]},… ({len(classes)})"
