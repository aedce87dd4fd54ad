"""Images on the disk as examples: decoded when they are asked for, augmented by their place in the sequence."""

from __future__ import annotations

import copy
import functools
import hashlib

import numpy as np
import torch
from typing_extensions import override

from subspace_lab.data.augmentation import Transform, read_picture
from subspace_lab.data.changes import Change
from subspace_lab.data.image_listing import Listing
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
        training: the transform of training images; null: the same.
        change: what is done to all images besides, and what black is after the transforms, (channels, 1, 1).
    """

    def __init__(
        self,
        listing: Listing,
        labels: Indices,
        rows: Indices,
        transform: Transform,
        channels: int,
        content: str,
        training: Transform | None = None,
        change: Change | None = None,
        black: torch.Tensor | None = None,
    ) -> None:
        self.listing, self.labels, self.rows = listing, labels, rows
        self._transform, self._channels, self._content = transform, channels, content
        self._training, self._change, self._black = training or transform, change, black

    def presented(self, transform: Transform, channels: int, content: str) -> FolderExamples:
        """The same images through another transform."""
        return FolderExamples(self.listing, self.labels, self.rows, transform, channels, content)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def targets(self) -> Indices:
        """Label of each example, int64 (m,)."""
        return self.labels[self.rows]

    def chosen(self, indices: Indices, numbers: Indices, change: Change | None) -> FolderExamples:
        """Examples `indices`, of which those of class c are called `numbers[c]`, changed by `change`."""
        part = copy.copy(self)
        part.__dict__.pop("_identity", None)
        labels = np.where(self.labels >= 0, numbers[self.labels], -1)
        part.labels, part.rows, part._change = labels, self.rows[indices], change
        return part

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices`: `inputs` float32 (b, channels, height, width) and `labels` int64 (b,)."""
        rows = self.rows[indices]
        return self._batch([self._image(int(row), self._transform) for row in rows], rows)

    def augmented(self, indices: Indices, places: Indices, seed: int) -> Batch:
        """As `batch`, for training: what happens to example i depends on `seed` and `places[i]` alone."""
        rows = self.rows[indices]
        images = []
        with borrowed_generators():
            for place, row in zip(places, rows, strict=True):
                seed_generators("augment/1", seed, int(place))
                images.append(self._image(int(row), self._training))
        return self._batch(images, rows)

    def _image(self, row: int, transform: Transform) -> torch.Tensor:
        return transform(read_picture(self.listing.path(row), self._channels))

    def _batch(self, images: list[torch.Tensor], rows: Indices) -> Batch:
        inputs = torch.stack(images)
        if self._change is not None:
            black = torch.zeros(1, 1, 1) if self._black is None else self._black
            inputs = self._change(inputs, black)
        return {"inputs": inputs, "labels": torch.from_numpy(self.labels[rows])}

    @functools.cached_property
    def _identity(self) -> str:
        content = self._content if self._change is None else f"{self._content}/{self._change.identity()}"
        digest = hashlib.blake2b(f"{self.listing.identity()}/{content}".encode(), digest_size=16)
        for array in (self.rows, self.labels[self.rows]):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def identity(self) -> str:
        """Hash of the files' names and sizes, their classes and the transform; the pixels are not read for it."""
        return self._identity


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
