"""Several sets of examples as one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch

from subspace_lab.data.changes import Change
from subspace_lab.data.packing import Batch
from subspace_lab.data.splits import Indices


class DivisibleExamples(Protocol):
    """Labelled examples of which some can be chosen, to be told apart anew: what tasks are made of."""

    def __len__(self) -> int: ...

    @property
    def targets(self) -> Indices:
        """Label of each example, int64 (n,)."""

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices` (b,) as tensors, "labels" int64 (b,) among them."""

    def augmented(self, indices: Indices, places: Indices, seed: int) -> Batch:
        """As `batch`, for training: what happens to example i depends on `seed` and `places[i]` alone."""

    def chosen(self, indices: Indices, numbers: Indices, change: Change | None) -> DivisibleExamples:
        """Examples `indices` (ascending), those of class c called `numbers[c]`, changed by `change`."""

    def identity(self) -> str:
        """Hash of the content: equal if and only if all examples are."""


class JoinedExamples:
    """The examples of several sets, one set after another.

    Args:
        members: at least one, whose batches have tensors of the same names and shapes.
    """

    def __init__(self, members: Sequence[DivisibleExamples]) -> None:
        # Sentences of several tasks are filled up to one length.
        self._members = getattr(type(members[0]), "aligned", list)(members)
        self._starts = np.cumsum([0, *map(len, members)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def targets(self) -> Indices:
        """Label of each example, int64 (n,)."""
        return np.concatenate([member.targets for member in self._members])

    def batch(self, indices: Indices) -> Batch:
        """Examples `indices`, of whichever sets they are."""
        return self._gathered(indices, lambda member, inner, _: member.batch(inner))

    def augmented(self, indices: Indices, places: Indices, seed: int) -> Batch:
        """As `batch`, augmented as each set augments its examples."""
        return self._gathered(indices, lambda member, inner, own: member.augmented(inner, places[own], seed))

    def chosen(self, indices: Indices, numbers: Indices, change: Change | None) -> JoinedExamples:
        """Examples `indices` (ascending), those of class c called `numbers[c]`, changed by `change`."""
        cuts = np.searchsorted(indices, self._starts)
        return JoinedExamples(
            [
                member.chosen(indices[cuts[k] : cuts[k + 1]] - self._starts[k], numbers, change)
                for k, member in enumerate(self._members)
            ]
        )

    def identity(self) -> str:
        """Hash of the sets' own."""
        names = [member.identity() for member in self._members]
        return hashlib.blake2b(repr(names).encode(), digest_size=16).hexdigest()

    def _gathered(self, indices: Indices, read: Callable[[DivisibleExamples, Indices, Indices], Batch]) -> Batch:
        of = np.searchsorted(self._starts, indices, side="right") - 1
        found, order = [], []
        for k in np.unique(of):
            own = np.flatnonzero(of == k)
            found.append(read(self._members[k], indices[own] - self._starts[k], own))
            order.append(own)
        if len(found) == 1:
            return found[0]
        back = torch.from_numpy(np.argsort(np.concatenate(order)))
        return {name: torch.cat([part[name] for part in found])[back] for name in found[0]}
