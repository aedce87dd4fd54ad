"""The bytes that describe a solution to somebody who has the architecture, the seeds and this decoder.

This length is what the error bound of `certificate` counts. Layout, with `varint` little endian in groups of 7 bits:

    varint  numbers in z                 byte  coding: 0 flat, 1 gaussian, 2 laplace; + 8 with a codebook
    varint  levels                       bfloat16  step
    float16 × levels  codebook, if any   byte  width of the frequency model, unless flat
    byte    how the scales and each buffer follow: 0 as the model is built, 1 float16, 2 float32, 3 varint (zigzag)
    …       their numbers                the arithmetic code of z's indices, to the end
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from subspace_lab.compression import frequencies
from subspace_lab.compression.arithmetic import decode, encode
from subspace_lab.compression.quantize import MAX_LEVELS, Indices, Levels, Quantized

AS_BUILT, FLOAT16, FLOAT32, INTEGER = range(4)
Spec = Sequence[tuple[str, Sequence[int], str]]  # (name, shape, dtype) in the order of the payload


class Damaged(ValueError):
    """Bytes that no encoder wrote."""


def pack(quantized: Quantized, extras: Mapping[str, Tensor], spec: Spec) -> bytes:
    """Return the payload.

    Args:
        quantized: z.
        extras: the scales and the buffers that differ from the model as it is built.
        spec: all that could be among them, in an order that the architecture gives.
    """
    levels = quantized.levels
    coding = frequencies.SHAPES.index(quantized.shape) + (8 if levels.codebook is not None else 0)
    head = _varint(len(quantized.indices)) + bytes([coding]) + _varint(levels.count) + _bfloat16(levels.step)
    if levels.codebook is not None:
        head += np.array(levels.codebook, dtype="<f2").tobytes()
    if quantized.shape != "flat":
        head += bytes([quantized.width])
    body = b"".join(_pack_extra(extras.get(name)) for name, _, _ in spec)
    model = frequencies.create(quantized.shape, quantized.width, levels.count)
    return head + body + encode(quantized.indices.tolist(), model)


def unpack(data: bytes, spec: Spec) -> tuple[Quantized, dict[str, Tensor]]:
    """Return z and the extras.

    Raises:
        Damaged: the bytes are cut short or impossible.
    """
    reader = _Reader(data)
    d, coding, count, step = reader.varint(), reader.byte(), reader.varint(), reader.bfloat16()
    shape_index, has_codebook = coding % 8, coding >= 8
    impossible = shape_index >= len(frequencies.SHAPES) or coding > 15 or not 1 <= count <= MAX_LEVELS or d > 2**40
    if impossible or not np.isfinite(step):
        raise Damaged("no such coding")
    codebook = tuple(reader.numbers("<f2", count).astype(np.float64).tolist()) if has_codebook else None
    shape = frequencies.SHAPES[shape_index]
    width = reader.byte() if shape != "flat" else 0
    extras = {name: value for name, dims, dtype in spec if (value := _read_extra(reader, dims, dtype)) is not None}
    indices: Indices = np.array(decode(reader.rest(), d, frequencies.create(shape, width, count)), dtype=np.int64)
    return Quantized(Levels(count, step, codebook), indices, shape, width), extras


def coded(value: Tensor) -> Tensor:
    """Return a scale or buffer as it will be after packing and unpacking."""
    reader = _Reader(_pack_extra(value))
    found = _read_extra(reader, list(value.shape), str(value.dtype).removeprefix("torch."))
    assert found is not None
    return found


def _pack_extra(value: Tensor | None) -> bytes:
    if value is None:
        return bytes([AS_BUILT])
    flat = value.detach().cpu().reshape(-1)
    if not flat.is_floating_point():
        return bytes([INTEGER]) + b"".join(_varint(2 * n if n >= 0 else -2 * n - 1) for n in map(int, flat.tolist()))
    single = flat.float().numpy()
    with np.errstate(over="ignore"):
        half = single.astype("<f2")
    # A half holds 11 bits between 6e-5 and 65504; what lies outside (a variance, say) must not become 0 or infinite.
    fits = np.allclose(half.astype(np.float32), single, rtol=2.0**-10, atol=0.0)
    return bytes([FLOAT16]) + half.tobytes() if fits else bytes([FLOAT32]) + single.astype("<f4").tobytes()


def _read_extra(reader: _Reader, dims: Sequence[int], dtype: str) -> Tensor | None:
    how = reader.byte()
    if how == AS_BUILT:
        return None
    size = int(np.prod(list(dims), dtype=np.int64))
    kind = getattr(torch, dtype)
    if how == INTEGER:
        raw = [reader.varint() for _ in range(size)]
        return torch.tensor([n // 2 if n % 2 == 0 else -(n // 2) - 1 for n in raw], dtype=kind).reshape(tuple(dims))
    if how not in (FLOAT16, FLOAT32):
        raise Damaged("no such coding of a buffer")
    numbers = reader.numbers("<f2" if how == FLOAT16 else "<f4", size)
    return torch.from_numpy(numbers.astype(np.float32)).to(kind).reshape(tuple(dims))


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def take(self, count: int) -> bytes:
        part = self._data[self._at : self._at + count]
        if len(part) < count:
            raise Damaged("cut short")
        self._at += count
        return part

    def rest(self) -> bytes:
        return self._data[self._at :]

    def byte(self) -> int:
        return self.take(1)[0]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise Damaged("a number without end")

    def bfloat16(self) -> float:
        return float((np.frombuffer(self.take(2), "<u2").astype("<u4") << 16).view("<f4")[0])

    def numbers(self, kind: str, count: int) -> npt.NDArray[Any]:
        return np.frombuffer(self.take(count * np.dtype(kind).itemsize), kind)


def _varint(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _bfloat16(value: float) -> bytes:
    return (np.array([value], dtype="<f4").view("<u4") >> 16).astype("<u2").tobytes()
