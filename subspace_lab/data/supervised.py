"""`SupervisedDataModule`: what labelled examples in memory, images or sentences, have in common.

Order, position, sharding and resumption are those of the text modules: batch k of process r is a pure function of the
seed (`order`), and a checkpoint holds the number of batches consumed (`position`).
"""

from __future__ import annotations

import copy
import os
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from subspace_lab.data.documents import hash_text
from subspace_lab.data.loaders import TrainBatches, TrainLoader, ValidationBatches, ValidationLoader
from subspace_lab.data.order import EpochOrder, mix
from subspace_lab.data.packing import Batch
from subspace_lab.data.positioned import PositionedDataModule
from subspace_lab.data.splits import fixed_order, stratified
from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key, random_bits

if TYPE_CHECKING:
    from subspace_lab.training.tasks import Task

Indices = npt.NDArray[np.int64]


class Examples(Protocol):
    """Random access to one part of a labelled data set."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices` (b,) as tensors, "labels" int64 (b,) among them."""

    def identity(self) -> str:
        """Hash of the content: equal if and only if all examples are."""


@dataclass(frozen=True)
class Parts:
    """What is trained on, what models are chosen by, and what is reported."""

    train: Examples
    validation: Examples
    test: Examples


class Some:
    """Examples of a set by number, in the order given."""

    def __init__(self, examples: Examples, numbers: Indices) -> None:
        self._examples, self._numbers = examples, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices` of those."""
        return self._examples.batch(self._numbers[indices])


class SupervisedDataModule(PositionedDataModule):
    """Labelled examples for a classifier: train, held-out validation and test part.

    Args:
        dataset: its name, for messages and results.
        batch_size: examples per process and step.
        val_size: examples held out of the training set, each class in proportion, to choose models by.
            0 trains on the whole set; validation then is its last tenth, which is trained on: a curve, no evidence.
        train_fraction: share of the remaining training set to train on, in (0, 1]; smaller shares lie in larger ones.
        data_dir: where data lies; null is SUBSPACE_DATA, else ./data.
        cache_dir: where prepared data is kept; null is SUBSPACE_CACHE, else ~/.cache/subspace-lab.
    """

    has_test = True
    num_workers = 0  # processes that prepare batches: none where the examples are in memory

    def __init__(
        self,
        dataset: str,
        batch_size: int,
        val_size: int,
        train_fraction: float,
        data_dir: str | None,
        cache_dir: str | None,
    ) -> None:
        super().__init__(batch_size)
        if batch_size < 1:
            raise UserError(f"data.batch_size={batch_size}: expected at least 1")
        if val_size < 0:
            raise UserError(f"data.val_size={val_size}: expected 0 or more")
        if not 0 < train_fraction <= 1:
            raise UserError(f"data.train_fraction={train_fraction}: expected a number above 0, at most 1")
        self.dataset = dataset
        self._val_size, self._train_fraction = val_size, train_fraction
        self._data_dir = default_data_dir(data_dir)
        cache = cache_dir or os.environ.get("SUBSPACE_CACHE") or "~/.cache/subspace-lab"
        self._cache_dir = Path(cache).expanduser()
        self._seed = self._run_seed = 0
        self._parts: Parts | None = None
        self._task: tuple[int, str] | None = None  # number and name, of one task of a sequence
        self._outputs: int | None = None  # of the model, where labels are columns of a longer row than these classes

    @abstractmethod
    def _load(self) -> Parts:
        """Read the data set and divide it."""

    @abstractmethod
    def model_arguments(self) -> dict[str, Any]:
        """What a model may want to know of the data before it is built (`data_…` parameters); no data is read."""

    @abstractmethod
    def blank_batch(self) -> tuple[Batch, str]:
        """A batch of zeros in the shape of a training batch, and that shape in words; no data is read."""

    def _train_batches(self, order: EpochOrder) -> Dataset[Batch]:
        """Item k is training batch k of this process."""
        return TrainBatches(self.parts.train, order, self.batch_size, self._rank, self._world_size)

    @property
    def parts(self) -> Parts:
        """The three parts; after `setup`."""
        if self._parts is None:
            raise RuntimeError("setup() comes first")
        return self._parts

    @property
    def held_out(self) -> bool:
        """Whether the validation part is not trained on; after `setup`."""
        return self._val_size > 0

    @property
    def train_rows(self) -> int:
        """Examples of one pass over the training part; after `setup`."""
        return len(self.parts.train)

    def task(self) -> Task:
        """What is to be learnt."""
        from subspace_lab.training.tasks import Classification

        return Classification()

    def configure(self, rank: int, world_size: int, seed: int) -> None:
        """Say which process this is and what orders the training examples; before `setup`."""
        self._rank, self._world_size, self._run_seed = rank, world_size, seed
        self._seed = seed if self._task is None else mix(seed, self._task[0])
        if self._parts is not None:
            self._start()

    def narrowed(self, index: int, name: str, parts: Parts, outputs: int) -> Self:
        """One task of a sequence: this data with other parts, an order of training and a position of its own.

        Args:
            index: of the task; its examples are shuffled differently from every other task's.
            name: of the task.
            parts: what it trains on and is judged by.
            outputs: of the model: labels are smaller than this.

        Raises:
            UserError: fewer training examples than a batch takes, or nothing to validate or to test on.
        """
        for part, examples in (("validation", parts.validation), ("test", parts.test)):
            if not len(examples):
                hint = "a larger data.val_size, or fewer tasks" if part == "validation" else "fewer tasks"
                raise UserError(f"task {name} of data={self.dataset} has no {part} examples", hint=hint)
        if self.batch_size > len(parts.train):
            raise UserError(
                f"data.batch_size={self.batch_size}: task {name} of data={self.dataset} has only {len(parts.train)} "
                "training examples",
                hint=f"data.batch_size={max(1, len(parts.train))}, or fewer tasks",
            )
        task = copy.copy(self)
        task._task, task._parts, task._outputs, task._saved = (index, name), parts, outputs, None
        task.configure(self._rank, self._world_size, self._run_seed)
        return task

    def draw(self, count: int | None, batch_size: int, seed: int, purpose: str) -> Iterator[Batch]:
        """Training examples as they are (nothing augmented), the same ones on every process; after `setup`.

        Args:
            count: how many, drawn without replacement by `seed` and `purpose`; None: all of them, in order.
            batch_size: of the batches; the last one may be short.
            seed: of the task.
            purpose: of the draw; another one draws others.
        """
        numbers = np.arange(self.train_rows, dtype=np.int64)
        if count is not None:
            words = random_bits(derive_key("draw/1", purpose, seed), 0, self.train_rows)
            numbers = words.argsort(stable=True).numpy()[:count]
        batches = ValidationBatches(Some(self.parts.train, numbers), batch_size, 0, 1)
        return iter(ValidationLoader(batches, self.num_workers))

    def prepare_data(self) -> None:
        """Find the data, downloading what is absent; several processes may call this at once."""
        self._open()

    def setup(self, stage: str | None = None) -> None:
        """Have the data in memory."""
        self._open()

    def _open(self) -> None:
        if self._parts is not None:
            return
        self._parts = self._load()
        if self.batch_size > self.train_rows:
            raise UserError(
                f"data.batch_size={self.batch_size}: {self.dataset} has only {self.train_rows} training examples",
                hint=f"data.batch_size={min(32, self.train_rows)}, or a smaller data.val_size",
            )
        self._start()

    def _divide(self, labels: Indices) -> tuple[Indices, Indices]:
        """Rows of the training set to train on and to validate on, each ascending."""
        n = len(labels)
        if self._val_size >= n:
            raise UserError(
                f"data.val_size={self._val_size} leaves nothing to train on: {self.dataset} has {n} training examples",
                hint=f"data.val_size={n // 10}",
            )
        held_out = stratified(labels, self._val_size, f"{self.dataset}/validation")
        rest = np.flatnonzero(~held_out)
        keep = max(1, round(self._train_fraction * len(rest)))
        train = np.sort(rest[fixed_order(len(rest), f"{self.dataset}/fraction")[:keep]])
        return train, np.flatnonzero(held_out) if self._val_size else np.arange(n - max(1, n // 10), n)

    def train_dataloader(self) -> TrainLoader:
        """Endless batches from the current position on."""
        batches = self._train_batches(EpochOrder(self.train_rows, self._seed))
        return TrainLoader(lambda: self._position.consumed, lambda _: batches, _as_is, self.num_workers)

    def val_dataloader(self) -> ValidationLoader:
        """All validation examples of this process, in order; the last batch may be short."""
        return self._in_order(self.parts.validation)

    def test_dataloader(self) -> ValidationLoader:
        """All test examples of this process, in order."""
        return self._in_order(self.parts.test)

    def train_eval_dataloader(self) -> ValidationLoader:
        """All training examples of this process once, in order, as they are (nothing augmented)."""
        return self._in_order(self.parts.train)

    def _in_order(self, part: Examples) -> ValidationLoader:
        batches = ValidationBatches(part, self._eval_batch_size, self._rank, self._world_size)
        return ValidationLoader(batches, self.num_workers)

    @property
    def _eval_batch_size(self) -> int:
        return 4 * self.batch_size  # without gradients a batch takes a fraction of the memory

    @property
    def _is_open(self) -> bool:
        return self._parts is not None

    def _fingerprint(self) -> str:
        """Hash of what decides the sequence of training examples."""
        return hash_text(repr([self.parts.train.identity(), self._seed]))

    def describe(self) -> dict[str, Any]:
        """What results.json records about the data; after `setup`."""
        parts = {"train": self.parts.train, "validation": self.parts.validation, "test": self.parts.test}
        return {
            "dataset": self.dataset,
            **({"task": self._task[1]} if self._task is not None else {}),
            **{name: {"examples": len(part), "hash": part.identity()} for name, part in parts.items()},
            "held_out": self.held_out,
            "train_fraction": self._train_fraction,
        }


def _as_is(batch: Batch) -> Batch:
    return batch


def default_data_dir(data_dir: str | None) -> Path:
    """Where data lies: as said, else SUBSPACE_DATA, else ./data."""
    return Path(data_dir or os.environ.get("SUBSPACE_DATA") or "data").expanduser()
