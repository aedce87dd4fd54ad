"""Images on the disk as examples: decoded when they are asked for, augmented by their place in the sequence."""

from __future__ import annotations

import functools
import hashlib

import numpy as np
import torch
from typing_extensions import override

from subspace_lab.data.augmentation import Transform, read_picture
from subspace_lab.data.image_listing import Listing
from subspace_lab.data.loaders import TrainBatches
from subspace_lab.data.mixing import borrowed_generators, seed_generators
from subspace_lab.data.order import EpochOrder, Indices
from subspace_lab.data.packing import Batch


class FolderExamples:
    """Some images of a listing, as evaluation sees them.

    Args:
        listing: all images of a folder.
        labels: int64 (n,), the class of each of its images among those kept; -1 where it is none of them.
        rows: int64 (m,), which images belong here.
        transform: from a picture to float32 (channels, height, width).
        channels: of the pictures: 1 or 3.
        content: names what the transform does.
    """

    def __init__(
        self, listing: Listing, labels: Indices, rows: Indices, transform: Transform, channels: int, content: str
    ) -> None:
        self.listing, self.labels, self.rows = listing, labels, rows
        self._transform, self._channels, self._content = transform, channels, content

    def presented(self, transform: Transform, channels: int, content: str) -> FolderExamples:
        """The same images through another transform."""
        return FolderExamples(self.listing, self.labels, self.rows, transform, channels, content)

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices`: `inputs` float32 (b, channels, height, width) and `labels` int64 (b,)."""
        rows = self.rows[indices]
        images = [self.image(int(row), self._transform) for row in rows]
        return {"inputs": torch.stack(images), "labels": torch.from_numpy(self.labels[rows])}

    def image(self, row: int, transform: Transform) -> torch.Tensor:
        """Image `row` of the listing through a transform."""
        return transform(read_picture(self.listing.path(row), self._channels))

    @functools.cached_property
    def _identity(self) -> str:
        digest = hashlib.blake2b(f"{self.listing.identity()}/{self._content}".encode(), digest_size=16)
        for array in (self.rows, self.labels[self.rows]):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def identity(self) -> str:
        """Hash of the files' names and sizes, their classes and the transform; the pixels are not read for it."""
        return self._identity


class AugmentedBatches(TrainBatches):
    """Training batches whose images are augmented.

    What is drawn for element p of the training sequence is a function of (seed, p): neither the number of processes or
    workers nor where a run was resumed changes an image.
    """

    def __init__(
        self,
        examples: FolderExamples,
        transform: Transform,
        order: EpochOrder,
        batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        super().__init__(examples, order, batch_size, rank, world_size)
        self._examples, self._transform = examples, transform

    @override
    def __getitem__(self, index: int) -> Batch:
        rows = self._examples.rows[self._order.batch(index, self._batch_size, self._rank, self._world_size)]
        first = (index * self._world_size + self._rank) * self._batch_size
        images = []
        with borrowed_generators():
            for place, row in enumerate(rows, start=first):
                seed_generators("augment/1", self._order.seed, place)
                images.append(self._examples.image(int(row), self._transform))
        return {"inputs": torch.stack(images), "labels": torch.from_numpy(self._examples.labels[rows])}


class RepeatedOrder(EpochOrder):
    """The training sequence with every element `repeats` times in a row, each augmented anew.

    (Hoffer et al. 2020, arXiv 1901.09335; Touvron et al. 2021, arXiv 2012.12877.) As many steps as an epoch has
    without repeats see one image in `repeats`.
    """

    def __init__(self, n_rows: int, seed: int, repeats: int) -> None:
        super().__init__(n_rows, seed)
        self._repeats = repeats

    @override
    def rows(self, start: int, count: int) -> Indices:
        first, skip = divmod(start, self._repeats)
        distinct = super().rows(first, -(-(skip + count) // self._repeats))
        return np.repeat(distinct, self._repeats)[skip : skip + count]
