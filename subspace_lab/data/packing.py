"""Rows of `block_size` tokens, cut from a token store.

`pack`: the documents follow one another, separated by eos, and the stream is cut into blocks: every token is
a real one. `pad`: one document per row, truncated or filled up, as the training script of GaLore (Zhao et al.
2024, torchrun_main.py, after ReLoRA) does; about a sixth of the positions is then padding on C4. Labels are
-100 there, so they count in no loss.

Labels equal the inputs (not shifted): the model shifts, as in transformers. The first token of a row is
predicted by no one.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch

from subspace_lab.data.cache import TokenStore

Packing = Literal["pack", "pad"]
Batch = dict[str, torch.Tensor]
IGNORE = -100
"""The label that no loss counts (`torch.nn.functional.cross_entropy`'s default)."""


class Rows(Protocol):
    """Random access to the rows of a corpus."""

    n_tokens: int
    """Real tokens in all rows together."""

    def __len__(self) -> int: ...

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Rows `indices` (b,): `input_ids`, `labels`, in pad mode `attention_mask`, int64 (b, block_size)."""


class PackedRows:
    """Blocks of consecutive tokens.

    Args:
        keep_tail: also give the last, incomplete block, filled up with `pad_id` (validation: every token
            counts once).
        max_tokens: use only the first tokens of the store.
    """

    def __init__(
        self,
        store: TokenStore,
        block_size: int,
        pad_id: int,
        keep_tail: bool = False,
        max_tokens: int | None = None,
    ) -> None:
        available = len(store.tokens) if max_tokens is None else min(max_tokens, len(store.tokens))
        self._store, self._block, self._pad = store, block_size, pad_id
        self._n_rows = -(-available // block_size) if keep_tail else available // block_size
        self.n_tokens = min(available, self._n_rows * block_size)

    def __len__(self) -> int:
        return self._n_rows

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Rows `indices`: `input_ids` and `labels`."""
        positions = indices[:, None] * self._block + np.arange(self._block)
        real = positions < self.n_tokens
        return _batch(self._store, positions, real, self._pad)


class PaddedRows:
    """One document per row; a document longer than the row loses its end, and the row still ends in eos.

    Args:
        max_tokens: use only the first documents, until this many real tokens are in the rows.
    """

    def __init__(
        self, store: TokenStore, block_size: int, pad_id: int, eos_id: int, max_tokens: int | None = None
    ) -> None:
        ends = np.asarray(store.ends)
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
        lengths = np.minimum(ends - starts, block_size)
        if max_tokens is not None:
            keep = int(np.searchsorted(np.cumsum(lengths), max_tokens, side="left")) + 1
            starts, lengths = starts[:keep], lengths[:keep]
        self._store, self._block, self._pad, self._eos = store, block_size, pad_id, eos_id
        self._starts, self._lengths = starts, lengths
        self.n_tokens = int(lengths.sum())

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, indices: npt.NDArray[np.int64]) -> Batch:
        """Rows `indices`: `input_ids`, `labels` and `attention_mask`."""
        columns = np.arange(self._block)
        lengths = self._lengths[indices]
        real = columns < lengths[:, None]
        batch = _batch(self._store, self._starts[indices][:, None] + columns, real, self._pad)
        full = torch.from_numpy(lengths == self._block)
        batch["input_ids"][full, -1] = self._eos
        batch["labels"][full, -1] = self._eos
        batch["attention_mask"] = torch.from_numpy(real.astype(np.int64))
        return batch


def _batch(store: TokenStore, positions: npt.NDArray[np.int64], real: npt.NDArray[np.bool_], pad_id: int) -> Batch:
    tokens = store.tokens[np.where(real, positions, 0)].astype(np.int64)
    return {
        "input_ids": torch.from_numpy(np.where(real, tokens, pad_id)),
        "labels": torch.from_numpy(np.where(real, tokens, IGNORE)),
    }
