"""`TextPairs`: tokenised prompts and answers in memory, filled up to one length, as either kind of model reads them."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from subspace_lab.data.packing import IGNORE, Batch
from subspace_lab.data.splits import Indices

Form = Literal["seq2seq", "causal"]
Ids = npt.NDArray[np.uint32]


class Ragged:
    """Rows of token ids of different lengths, in one array.

    Args:
        rows: uint32 (any,) each.
    """

    def __init__(self, rows: list[Ids]) -> None:
        self.lengths = np.asarray([len(row) for row in rows], dtype=np.int64)
        self.starts = np.cumsum(self.lengths) - self.lengths
        self.flat = (np.concatenate(rows) if rows else np.empty(0, np.uint32)).astype(np.int32)

    def padded(self, rows: Indices, width: int, fill: int) -> npt.NDArray[np.int64]:
        """Return rows, int64 (b, width), filled up with `fill` on the right."""
        columns = np.arange(width)
        real = columns < self.lengths[rows][:, None]
        places = np.where(real, self.starts[rows][:, None] + columns, 0)
        return np.where(real, self.flat[places], fill).astype(np.int64)


class TextPairs:
    """One part of a task.

    Args:
        sources: prompts as token ids, with what the model expects around them.
        targets: answers, with the end of text.
        classes: int64 (n,) number of each answer, for draws in proportion; all 0 where answers are open.
        pad_id: fills rows up.
        form: seq2seq: prompt and answer apart; causal: one after the other in a row.
        widths: tokens to which prompts and answers are filled up.
        metric: number of the score (`text_scores.METRICS`) for batches to carry; None: they carry none.
        content: names what was tokenised.
    """

    def __init__(
        self,
        sources: list[Ids],
        targets: list[Ids],
        classes: Indices,
        pad_id: int,
        form: Form,
        widths: tuple[int, int],
        metric: int | None,
        content: str,
    ) -> None:
        self._sources, self._targets, self._classes = Ragged(sources), Ragged(targets), classes
        self._pad_id, self._form, self._widths, self._metric = pad_id, form, widths, metric
        self._content = content
        self._rows = np.arange(len(classes), dtype=np.int64)

    def subset(self, rows: Indices) -> TextPairs:
        """Return the examples `rows`, sharing the tokens."""
        part = copy.copy(self)
        part.__dict__.pop("_hash", None)
        part._rows = self._rows[rows]
        return part

    def chosen(self, indices: Indices, numbers: Indices, change: Any = None) -> TextPairs:
        """Return examples `indices`: what tasks are made of. Answers are words, so nothing is numbered anew."""
        return self.subset(indices)

    @staticmethod
    def aligned(members: Sequence[TextPairs]) -> list[TextPairs]:
        """Return the parts of several tasks, filled up to one length, so that their examples fit into one batch."""
        parts = [copy.copy(member) for member in members]
        for part in parts:
            part._widths = (max(m._widths[0] for m in members), max(m._widths[1] for m in members))
        return parts

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def widths(self) -> tuple[int, int]:
        """Tokens to which prompts and answers are filled up."""
        return self._widths

    @property
    def targets(self) -> Indices:
        """Number of each example's answer, int64 (n,)."""
        return self._classes[self._rows]

    def batch(self, indices: Indices) -> Batch:
        """Return examples `indices`.

        `input_ids` and `attention_mask` (b, width of prompts) and `labels` (b, width of answers), for a causal model
        all three (b, both widths), the answer after the prompt; labels are IGNORE on prompt and padding. All int64.
        `metric` (b,) is there if scores differ between the sequence's tasks.
        """
        rows = self._rows[indices]
        width, answer = self._widths
        real = np.arange(width) < self._sources.lengths[rows][:, None]
        ids = self._sources.padded(rows, width, self._pad_id)
        labels = self._targets.padded(rows, answer, IGNORE)
        if self._form == "causal":
            # Places of the answer: right after the prompt.
            at = self._sources.lengths[rows][:, None] + np.arange(answer)
            whole = np.full((len(rows), width + answer), self._pad_id, dtype=np.int64)
            wanted = np.full_like(whole, IGNORE)
            whole[:, :width] = ids
            np.put_along_axis(whole, at, np.where(labels == IGNORE, self._pad_id, labels), axis=1)
            np.put_along_axis(wanted, at, labels, axis=1)
            total = self._sources.lengths[rows] + self._targets.lengths[rows]
            ids, labels, real = whole, wanted, np.arange(width + answer) < total[:, None]
        batch = {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "labels": torch.from_numpy(labels),
        }
        if self._metric is not None:
            batch["metric"] = torch.full((len(rows),), self._metric, dtype=torch.int64)
        return batch

    def augmented(self, indices: Indices, places: Indices, seed: int) -> Batch:
        """As `batch`: nothing is augmented."""
        return self.batch(indices)

    @functools.cached_property
    def _hash(self) -> str:
        digest = hashlib.blake2b(f"{self._content}/{self._form}".encode(), digest_size=16)
        arrays: list[npt.NDArray[Any]] = []
        for ragged in (self._sources, self._targets):
            arrays += [ragged.flat, ragged.lengths]
        for array in (*arrays, self._rows):
            digest.update(array.tobytes())
        return digest.hexdigest()

    def identity(self) -> str:
        """Hash of tokens and which examples belong here."""
        return self._hash
