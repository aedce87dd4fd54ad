"""Which tensors, or parts of them, are merged together: stacks of one shape, none larger than the largest tensor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch

from subspace_lab.merging.base import Kind
from subspace_lab.merging.settings import TensorRules
from subspace_lab.merging.sources import TensorInfo

# One after the other along the rows; GPT-NeoX's query_key_value takes turns by head and GPT-2's c_attn is transposed.
_FUSED = re.compile(r"(^|\.)(in_proj_weight|(qkv|Wqkv|qkv_proj)\.weight)$")
_PIECE = 1 << 20  # bytes: base, update and one model's piece stay in the cache
_STEP = 1 << 20  # entries
_DEVICE_PIECE = 1 << 28  # a GPU wants work, and has memory


@dataclass(frozen=True)
class Part:
    """Consecutive entries of a stored tensor that are merged as one.

    Attributes:
        name: of the part: the tensor's, or `<tensor>#i`.
        tensor: name of the stored tensor.
        start: its first entry in the flat tensor.
        shape: of the part.
    """

    name: str
    tensor: str
    start: int
    shape: tuple[int, ...]

    @property
    def stop(self) -> int:
        """First entry after it."""
        return self.start + math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Parts of one shape and kind that make a stack.

    Attributes:
        dtype: in which they are merged.
    """

    parts: tuple[Part, ...]
    kind: Kind
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Size of one model's stack."""
        return len(self.parts) * math.prod(self.parts[0].shape) * self.dtype.itemsize


def piece_bytes(device: torch.device) -> int:
    """How much of a tensor is worked on at once where it can be cut anywhere."""
    return _PIECE if device.type == "cpu" else _DEVICE_PIECE


def steps(part: Part) -> Iterator[Part]:
    """Pieces of a part that are looked at one after the other: then no model's tensor is in memory as a whole."""
    for start in range(part.start, part.stop, _STEP):
        yield replace(part, start=start, shape=(min(_STEP, part.stop - start),))


def compute_dtype(stored: torch.dtype) -> torch.dtype:
    """float64 for float64; float32 for everything shorter, which is never summed in its own precision."""
    return torch.float64 if stored == torch.float64 else torch.float32


def parts_of(name: str, info: TensorInfo, rules: TensorRules) -> Iterator[Part]:
    """The parts of one tensor: itself, or three where queries, keys and values are fused and to be split."""
    rows = info.shape[0] if info.shape else 0
    if rules.split_fused_qkv and len(info.shape) == 2 and rows == 3 * info.shape[1] and _FUSED.search(name):
        d = info.shape[1]
        for i in range(3):
            yield Part(f"{name}#{i}", name, i * d * d, (d, d))
    else:
        yield Part(name, name, 0, info.shape)


def stacks(infos: Mapping[str, TensorInfo], rules: TensorRules) -> list[Group]:
    """Groups for methods that look at whole tensors, in the order of the first tensor of each."""
    largest = max((info.numel * compute_dtype(info.dtype).itemsize for info in infos.values()), default=0)
    alike: dict[tuple[tuple[int, ...], Kind, torch.dtype], list[Part]] = {}
    for name, info in infos.items():
        kind = rules.kind(name, info)
        if kind is not None:
            for part in parts_of(name, info, rules):
                alike.setdefault((part.shape, kind, compute_dtype(info.dtype)), []).append(part)
    groups = []
    for (shape, kind, dtype), parts in alike.items():
        most = max(1, largest // (math.prod(shape) * dtype.itemsize))
        groups += [Group(tuple(parts[i : i + most]), kind, dtype) for i in range(0, len(parts), most)]
    return groups


def pieces(infos: Mapping[str, TensorInfo], rules: TensorRules, device: torch.device) -> Iterator[Group]:
    """Flat pieces of every tensor, for methods that look at one entry after the other."""
    for name, info in infos.items():
        kind = rules.kind(name, info)
        if kind is None:
            continue
        dtype = compute_dtype(info.dtype)
        length = piece_bytes(device) // dtype.itemsize
        for start in range(0, info.numel, length):
            part = Part(name, name, start, (min(length, info.numel - start),))
            yield Group((part,), kind, dtype)
