"""Which rows make up batch k: a pure function of (seed, k, rank, world_size), so a position is one number.

Training reads an endless sequence of epochs; epoch e is a permutation of all rows that depends on (seed, e)
only. The global batch k of W processes with b rows each is rows kWb to (k+1)Wb of that sequence, and process
r takes the r-th b of them: W processes at b rows and one process at Wb rows see the same global batches.
"""

from __future__ import annotations

import hashlib

import numpy as np
import numpy.typing as npt
import torch

Indices = npt.NDArray[np.int64]


class EpochOrder:
    """The endless training sequence over `n_rows` rows."""

    def __init__(self, n_rows: int, seed: int) -> None:
        if n_rows < 1:
            raise ValueError("a training sequence needs at least one row")
        self.n_rows, self.seed = n_rows, seed
        self._epochs: dict[int, Indices] = {}

    def rows(self, start: int, count: int) -> Indices:
        """Elements `start` to `start + count` of the sequence: row indices, int64 (count,)."""
        parts = []
        while count > 0:
            epoch, offset = divmod(start, self.n_rows)
            part = self._permutation(epoch)[offset : offset + count]
            parts.append(part)
            start += len(part)
            count -= len(part)
        return np.concatenate(parts)

    def batch(self, index: int, batch_size: int, rank: int, world_size: int) -> Indices:
        """Rows of batch `index` for process `rank`, int64 (batch_size,)."""
        return self.rows((index * world_size + rank) * batch_size, batch_size)

    def _permutation(self, epoch: int) -> Indices:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # a batch can touch two epochs; older ones are not read again
                self._epochs.clear()
            generator = torch.Generator().manual_seed(mix(self.seed, epoch))
            self._epochs[epoch] = torch.randperm(self.n_rows, generator=generator).numpy()
        return self._epochs[epoch]


def mix(*numbers: int) -> int:
    """One 63-bit seed from several numbers; neighbours give unrelated seeds."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def validation_batch(index: int, n_rows: int, batch_size: int, rank: int, world_size: int) -> Indices:
    """Rows of validation batch `index` for process `rank`, int64; the last ones are short or empty."""
    start = (index * world_size + rank) * batch_size
    return np.arange(min(start, n_rows), min(start + batch_size, n_rows), dtype=np.int64)
