"""The `.sid` container: a payload that is what a solution costs, and beside it what `rebuild` needs to know.

4 bytes "SSID" · byte version · varint payload length · payload · deflated JSON · CRC-32 of all before, little endian
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from subspace_lab.compression import payload
from subspace_lab.compression.quantize import Quantized
from subspace_lab.compression.solution import Solution, write_bytes
from subspace_lab.errors import UserError

MAGIC = b"SSID"
VERSION = 1
FILE = "compressed.sid"
_LAMBDAS = "lambdas"


@dataclass(frozen=True)
class Compressed:
    """A quantised solution and its bytes.

    Attributes:
        solution: with the quantised numbers in it and θ's hash for them.
        data: the whole file.
        payload_bytes: the part that describes the numbers, given architecture, seeds and decoder.
    """

    solution: Solution
    data: bytes
    payload_bytes: int

    def save(self, path: Path) -> None:
        """Write the file as a whole or not at all."""
        write_bytes(path, self.data)


def quantized_solution(solution: Solution, quantized: Quantized) -> Solution:
    """Return the solution as it will be read back, all numbers rounded; θ's hash is still the old one."""
    return replace(
        solution,
        z=torch.from_numpy(quantized.values().copy()).to(solution.z.dtype),
        lambdas=None if solution.lambdas is None else payload.coded(solution.lambdas),
        buffers={name: payload.coded(value) for name, value in solution.buffers.items()},
    )


def payload_of(solution: Solution, quantized: Quantized) -> bytes:
    """Return the payload of a solution whose z is coded as `quantized`; buffers as built should be left out of it."""
    extras = dict(solution.buffers)
    if solution.lambdas is not None:
        extras[_LAMBDAS] = solution.lambdas
    return payload.pack(quantized, extras, _spec(solution))


def compress(solution: Solution, quantized: Quantized, theta_sha256: str) -> Compressed:
    """Return the file for a solution.

    Args:
        solution: the trained one.
        quantized: its z.
        theta_sha256: of θ at `quantized_solution`.
    """
    rounded = replace(quantized_solution(solution, quantized), theta_sha256=theta_sha256, tensors=[])
    described = payload_of(solution, quantized)
    about = {"about": rounded.about(), "extras": _spec(solution), "dtype": _name(solution.z.dtype)}
    text = json.dumps(about, sort_keys=True, separators=(",", ":"))
    head = MAGIC + bytes([VERSION]) + payload._varint(len(described))
    data = head + described + zlib.compress(text.encode(), 9)
    return Compressed(rounded, data + zlib.crc32(data).to_bytes(4, "little"), len(described))


def is_sid(path: Path) -> bool:
    """Return whether a file begins like one of ours."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def load(path: Path) -> Compressed:
    """Read a `.sid` file.

    Raises:
        UserError: there is no such file, it is damaged, something else, or of a newer version.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    if data[:4] != MAGIC:
        raise UserError(f"{path}: not a compressed solution of subspace-lab")
    if len(data) > 4 and data[4] > VERSION:
        raise UserError(f"{path}: written by a newer subspace-lab (version {data[4]}, this one reads {VERSION})")
    if len(data) < 10 or zlib.crc32(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise UserError(f"{path}: damaged: its checksum differs from the one written with it")
    try:
        reader = payload._Reader(data[5:-4])
        described = reader.take(reader.varint())
        stored: dict[str, Any] = json.loads(zlib.decompress(reader.rest()))
        quantized, extras = payload.unpack(described, stored["extras"])
        z = torch.from_numpy(quantized.values().copy()).to(getattr(torch, stored["dtype"]))
        solution = Solution(z=z, lambdas=extras.pop(_LAMBDAS, None), buffers=extras, **stored["about"])
    except (payload.Damaged, zlib.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {error}") from None
    return Compressed(solution, data, len(described))


def _spec(solution: Solution) -> list[tuple[str, list[int], str]]:
    known = dict(solution.buffers) if solution.lambdas is None else {_LAMBDAS: solution.lambdas, **solution.buffers}
    return [(name, list(tensor.shape), _name(tensor.dtype)) for name, tensor in known.items()]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
