"""`TaskSuite`: tasks that experts of one encoder are trained on, to be merged, and what it has learnt before.

All inputs are in memory as float32, made once: suites are small.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.data.classifying import ImageClassificationDataModule
from subspace_lab.data.packing import Batch
from subspace_lab.data.presentation import Presentation
from subspace_lab.data.splits import Indices
from subspace_lab.data.supervised import Parts
from subspace_lab.errors import UserError


class HeldExamples:
    """Examples in memory, as a model wants them.

    Args:
        inputs: float32 (n, channels, height, width).
        labels: int64 (n,).
    """

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.labels = inputs, labels

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices` (b,)."""
        chosen = torch.from_numpy(indices)
        return {"inputs": self.inputs[chosen], "labels": self.labels[chosen]}

    def augmented(self, indices: Indices, places: Indices, seed: int) -> Batch:
        """As `batch`: nothing is augmented."""
        return self.batch(indices)

    def identity(self) -> str:
        """Hash of the content."""
        digest = hashlib.blake2b(digest_size=16)
        for tensor in (self.inputs, self.labels):
            digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()

    @classmethod
    def joined(cls, several: Sequence[HeldExamples]) -> HeldExamples:
        """All of them, one after another."""
        return cls(torch.cat([one.inputs for one in several]), torch.cat([one.labels for one in several]))


@dataclass(frozen=True)
class SuiteTask:
    """What a task is made of.

    Attributes:
        name: for tables.
        classes: how many.
        parts: what an expert is trained on, what λ is chosen by, what is reported.
    """

    name: str
    classes: int
    parts: Parts


class TaskData(ImageClassificationDataModule):
    """One task of a suite, or what its encoder is pretrained on, as data to train with.

    Args:
        suite: name of the suite.
        task: what it is.
        shape: (channels, height, width) of an image.
        batch_size: images per process and step.
        index: of the task: its examples are shuffled differently from every other task's.
    """

    def __init__(self, suite: str, task: SuiteTask, shape: tuple[int, int, int], batch_size: int, index: int) -> None:
        super().__init__(f"{suite}/{task.name}", batch_size, 1, 1.0, 0.0, 0.0, 0.0, "cross_entropy", None, None)
        self.shape, self._suite_task = shape, task
        self.name, self._task = task.name, (index, task.name)

    @property
    @override
    def classes(self) -> int:
        return self._suite_task.classes

    @property
    @override
    def class_names(self) -> tuple[str, ...]:
        return tuple(map(str, range(self.classes)))

    @property
    @override
    def presentation(self) -> Presentation:
        raise UserError(f"{self.dataset} cannot be looked at by another data set's model")

    @override
    def examples_as(self, presentation: Presentation) -> Parts:
        raise UserError(f"{self.dataset} cannot be shown to another data set's model")

    @override
    def _load(self) -> Parts:
        return self._suite_task.parts


class TaskSuite(ABC):
    """Base of all suites.

    Args:
        dataset: its name.
        batch_size: images per process and step.
    """

    def __init__(self, dataset: str, batch_size: int) -> None:
        if batch_size < 1:
            raise UserError(f"data.batch_size={batch_size}: expected at least 1")
        self.dataset, self.batch_size = dataset, batch_size
        self._made: tuple[SuiteTask | None, list[SuiteTask]] | None = None

    #: (channels, height, width) of an image
    shape: tuple[int, int, int]
    #: whether the models are not trained here but come with the tasks (`load`)
    has_own_models = False
    #: whether all tasks have the head of the first: the same classes, seen differently
    shared_head = False

    @property
    def has_base(self) -> bool:
        """Whether all experts start from one model; no data is read."""
        return True

    @property
    @abstractmethod
    def names(self) -> list[str]:
        """Names of the tasks; no data is read."""

    @abstractmethod
    def _make(self) -> tuple[SuiteTask | None, list[SuiteTask]]:
        """What the encoder is pretrained on (None: experts start from weights of their own) and the tasks."""

    @property
    def made(self) -> tuple[SuiteTask | None, list[SuiteTask]]:
        """`_make`, once."""
        if self._made is None:
            self._made = self._make()
        return self._made

    def pretraining(self) -> TaskData | None:
        """What the encoder is pretrained on, if it is."""
        task = self.made[0]
        return None if task is None else TaskData(self.dataset, task, self.shape, self.batch_size, 0)

    def tasks(self) -> list[TaskData]:
        """What experts are trained on, validated and tested with."""
        return [
            TaskData(self.dataset, task, self.shape, self.batch_size, index + 1)
            for index, task in enumerate(self.made[1])
        ]

    def describe(self) -> dict[str, Any]:
        """What results.json records about the data."""
        pretraining, tasks = self.made
        sizes = {
            task.name: {part: len(getattr(task.parts, part)) for part in ("train", "validation", "test")}
            | {"classes": task.classes, "identity": task.parts.train.identity()}
            for task in tasks
        }
        before = {} if pretraining is None else {"pretraining": len(pretraining.parts.train)}
        return {"dataset": self.dataset, "shape": list(self.shape), **before, "tasks": sizes}


def unique(names: Sequence[str]) -> list[str]:
    """Names, those that come again with their number: a, b, a 2."""
    seen: dict[str, int] = {}
    found = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        found.append(name if seen[name] == 1 else f"{name} {seen[name]}")
    return found


def rows_of(marked: np.ndarray[Any, np.dtype[np.bool_]]) -> Indices:
    """Numbers of the marked ones, ascending."""
    return np.flatnonzero(marked).astype(np.int64)
