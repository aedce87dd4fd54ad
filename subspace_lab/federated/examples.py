"""A task's training examples where clients compute, asked for by number."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from subspace_lab.data.packing import IGNORE, Batch
from subspace_lab.federated.partition import Indices

_LARGEST = 1 << 30  # bytes of examples that are kept ready
_PIECE = 4096


class TaskExamples:
    """Examples of one task. As inputs on the device where they fit, else made ready when they are asked for.

    Args:
        examples: the training part.
        device: where batches are wanted.
        varies: whether training changes examples every time (augmentation).
    """

    def __init__(self, examples: Any, device: torch.device, *, varies: bool) -> None:
        self._examples, self._device, self._varies = examples, device, varies
        self._kept: dict[str, Tensor] | None = None
        first = examples.batch(np.zeros(1, dtype=np.int64))
        size = sum(tensor.numel() * tensor.element_size() for tensor in first.values()) * len(examples)
        if "inputs" in first and not varies and size <= _LARGEST:
            pieces = [
                examples.batch(np.arange(start, min(start + _PIECE, len(examples)), dtype=np.int64))
                for start in range(0, len(examples), _PIECE)
            ]
            self._kept = {name: torch.cat([piece[name] for piece in pieces]).to(device) for name in first}

    def batch(self, rows: Indices, seed: int) -> Batch:
        """Examples `rows` (b,) as training sees them; `seed` decides what varies."""
        if self._varies and hasattr(self._examples, "augmented"):
            return self._placed(self._examples.augmented(rows, np.arange(len(rows), dtype=np.int64), seed))
        return self.plain(rows)

    def plain(self, rows: Indices) -> Batch:
        """Examples `rows` (b,) as they are."""
        if self._kept is None:
            return self._placed(self._examples.batch(rows))
        where = torch.from_numpy(rows).to(self._device, non_blocking=True)
        return {name: tensor[where] for name, tensor in self._kept.items()}

    def stacked(self, rows: Indices) -> Batch:
        """Examples `rows` (c, b) as tensors (c, b, …); those numbered −1 have no label."""
        flat = self.plain(rows.reshape(-1).clip(min=0))
        batch = {name: tensor.view(*rows.shape, *tensor.shape[1:]) for name, tensor in flat.items()}
        none = torch.from_numpy(rows < 0).to(self._device, non_blocking=True)
        batch["labels"] = batch["labels"].masked_fill(none, IGNORE)
        return batch

    def _placed(self, batch: Batch) -> Batch:
        return {name: tensor.to(self._device, non_blocking=True) for name, tensor in batch.items()}
