"""The two iterables Lightning gets: endless training batches from an exact position, one validation pass.

They are not `DataLoader`s themselves (one is inside): Lightning would put its own sampler in, which repeats
rows.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset
from typing_extensions import override

from subspace_lab.data.order import EpochOrder, Indices, validation_batch
from subspace_lab.data.packing import IGNORE, Batch
from subspace_lab.errors import UserError


class Rows(Protocol):
    """Random access to token rows or labelled examples."""

    def __len__(self) -> int: ...

    def batch(self, indices: Indices) -> Batch:
        """Rows `indices` (b,) as tensors, `labels` among them."""


class TrainBatches(Dataset[Batch]):
    """Batch k of one process, for every k ≥ 0."""

    def __init__(self, rows: Rows, order: EpochOrder, batch_size: int, rank: int, world_size: int) -> None:
        self._rows, self._order = rows, order
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size

    def __getitem__(self, index: int) -> Batch:
        return self._rows.batch(self._order.batch(index, self._batch_size, self._rank, self._world_size))


class AugmentedRows(Rows, Protocol):
    """Examples that look different every time they are trained on."""

    def augmented(self, indices: Indices, places: Indices, seed: int) -> Batch:
        """As `batch`; what happens to row i of it depends on `seed` and `places[i]` alone."""


class AugmentedBatches(TrainBatches):
    """Training batches of augmented examples.

    What is drawn for element p of the training sequence is a function of (seed, p): neither the number of processes or
    workers nor where a run was resumed changes an example.
    """

    def __init__(self, rows: AugmentedRows, order: EpochOrder, batch_size: int, rank: int, world_size: int) -> None:
        super().__init__(rows, order, batch_size, rank, world_size)
        self._augmented = rows.augmented

    @override
    def __getitem__(self, index: int) -> Batch:
        first = (index * self._world_size + self._rank) * self._batch_size
        places = np.arange(first, first + self._batch_size, dtype=np.int64)
        rows = self._order.batch(index, self._batch_size, self._rank, self._world_size)
        return self._augmented(rows, places, self._order.seed)


class ValidationBatches(Dataset[Batch]):
    """Validation batch k of one process, in row order.

    Every process has equally many batches, or a collective inside the model would wait for ever. A process
    whose share of the last
    global batch is empty gets one row without any label: no row is counted twice.
    """

    def __init__(self, rows: Rows, batch_size: int, rank: int, world_size: int) -> None:
        self._rows = rows
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size

    def __len__(self) -> int:
        return -(-len(self._rows) // (self._batch_size * self._world_size))

    def __getitem__(self, index: int) -> Batch:
        rows = validation_batch(index, len(self._rows), self._batch_size, self._rank, self._world_size)
        if len(rows):
            return self._rows.batch(rows)
        batch = self._rows.batch(np.zeros(1, dtype=np.int64))
        batch["labels"] = torch.full_like(batch["labels"], IGNORE)
        return batch


class TrainLoader:
    """Endless batches starting where the data module stands when iteration begins.

    Args:
        start: gives that position: the number of batches consumed so far.
        dataset: gives what to read from that position on, item k being batch k; or an iterable dataset that
            starts there.
        receive: takes what the inner loader gave and returns the batch.
    """

    def __init__(
        self,
        start: Callable[[], int],
        dataset: Callable[[int], Dataset[Any]],
        receive: Callable[[Any], Batch],
        num_workers: int,
    ) -> None:
        self._start, self._dataset, self._receive, self._num_workers = start, dataset, receive, num_workers

    def __iter__(self) -> Iterator[Batch]:
        start = self._start()
        dataset = self._dataset(start)
        sampler = None if isinstance(dataset, IterableDataset) else itertools.count(start)
        if sampler is not None and not self._num_workers and not torch.cuda.is_available():
            # Nothing to pin and nobody to ask: a DataLoader would only cost its overhead, at every step.
            yield from (self._receive(dataset[index]) for index in sampler)
        for item in make_loader(dataset, sampler, self._num_workers):
            yield self._receive(told(item))


class ValidationLoader:
    """All validation batches of one process, always in the same order."""

    def __init__(self, dataset: ValidationBatches, num_workers: int = 0) -> None:
        self._dataset = dataset
        self._loader = make_loader(dataset, range(len(dataset)), num_workers)

    def __len__(self) -> int:
        return len(self._dataset)

    def __iter__(self) -> Iterator[Batch]:
        return map(told, self._loader)


class Told(Dataset[Any]):
    """A dataset whose user errors come as items: a worker process would add its traceback to the one line."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        self._dataset = dataset

    def __getitem__(self, index: int) -> Any:
        try:
            return self._dataset[index]
        except UserError as error:
            return error


def told(item: Any) -> Any:
    """Return an item, or raise the error that came in its place."""
    if isinstance(item, UserError):
        raise item
    return item


def make_loader(dataset: Dataset[Any], sampler: Any, num_workers: int) -> DataLoader[Any]:
    """A `DataLoader` that passes items on as they are and leaves the global random state alone."""
    return DataLoader(
        Told(dataset) if num_workers and not isinstance(dataset, IterableDataset) else dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=num_workers,
        multiprocessing_context="fork" if num_workers else None,  # tokenizers and datasets need not pickle
        collate_fn=_unchanged,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
        # Its own generator: the default would draw from the global one, and a resumed run's dropout would
        # differ.
        generator=torch.Generator(),
    )


def _unchanged(item: Any) -> Any:
    return item


def _start_worker(worker: int) -> None:
    # A forked worker has none of its parent's threads: tokenizers must not wait for its pool, nor fsspec for
    # its loop.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)
    try:
        from fsspec.asyn import reset_lock  # type: ignore[import-untyped]
    except ImportError:
        return
    reset_lock()
