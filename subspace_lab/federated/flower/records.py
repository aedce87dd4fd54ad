"""What is in the records of Flower's messages: tensors, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from flwr.app import Array, ArrayRecord, RecordDict
from torch import Tensor


def pack(tensors: Mapping[str, Tensor]) -> ArrayRecord:
    """Return a record of dense tensors of any shape and of a dtype that numpy has, on any device."""
    return ArrayRecord({name: Array(tensor.detach().cpu().numpy()) for name, tensor in tensors.items()})


def unpack(record: ArrayRecord) -> dict[str, Tensor]:
    """Return the tensors of a record, on the CPU, in the order in which they were packed."""
    return {name: torch.from_numpy(array.numpy()) for name, array in record.items()}


class Failed(RecordDict):
    """In place of a client's reply.

    Args:
        message: what went wrong, one line.
        hint: what to do about it, or the empty string.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__()
        self.message, self.hint = message, hint
