"""Masks, fixed-point numbers and the size of neighbourhoods of secure aggregation.

Sums are made of 64-bit integers modulo 2⁶⁴, so that masks cancel exactly. A value x travels as ⌊x·2³⁶⌉: an error of at
most 2⁻³⁷ ≈ 7.3e-12 of each client's contribution, and room for sums of magnitude up to 2²⁷ ≈ 1.3e8.

Masks are the key stream of AES in counter mode, as in Bonawitz et al. (2017), "Practical Secure Aggregation for
Privacy-Preserving Machine Learning", §3. Flower's own generator folds every key into the 32 bits that seed a Mersenne
Twister: whoever has a masked vector could try all seeds. Its key agreement, Shamir shares and encryption are used as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray
from torch import Tensor

from subspace_lab.errors import UserError

FRACTION_BITS = 36
SEED_BYTES = 16  # of a client's own mask: AES-128
LEAST_CLIENTS = 3  # with two, each learns the other's part from the sum
_NEIGHBOURS = 16  # Bell et al. (2020): of the order of log(clients) are enough
_CHUNK = 1 << 16

Words = NDArray[np.uint64]


def threshold(members: int) -> int:
    """Of how many of `members` clients shares are needed to unmask: more than two thirds (Bonawitz et al., §6.2)."""
    return 2 * members // 3 + 1


def neighbourhoods(order: list[int]) -> dict[int, list[int]]:
    """Who exchanges keys with whom: everybody, or on a ring in the given order the 16 nearest.

    Returns:
        Of each client the clients of its neighbourhood, itself among them, ascending; the relation is symmetric.
    """
    count = len(order)
    half = min(_NEIGHBOURS, count - 1) // 2
    if count <= _NEIGHBOURS + 1:
        return {client: sorted(order) for client in order}
    return {
        client: sorted(order[(place + step) % count] for step in range(-half, half + 1))
        for place, client in enumerate(order)
    }


def encode(tensors: Mapping[str, Tensor], coefficient: float, clients: int) -> Words:
    """Return coefficient · tensors, one after the other, as fixed-point words.

    Raises:
        UserError: a value is not finite, or the sum of so many clients could overflow.
    """
    flat = torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors.values()]) * coefficient
    limit = 2.0 ** (63 - FRACTION_BITS) / (clients + 1)
    largest = flat.abs().max().item() if flat.numel() else 0.0
    if not largest <= limit:
        raise UserError(
            f"secure aggregation takes numbers up to {limit:.3g} from each of {clients} clients, one is {largest:.3g}",
            hint="federation.secure_aggregation=false has no limit",
        )
    return from_tensor((flat * 2.0**FRACTION_BITS).round_().long())


def to_tensor(words: Words) -> Tensor:
    """Return words as the int64 tensor of the same bits, without copying."""
    return torch.from_numpy(words.view(np.int64))


def from_tensor(tensor: Tensor) -> Words:
    """Undo `to_tensor`."""
    words: Words = tensor.numpy().view(np.uint64)
    return words


def decode(words: Words) -> Tensor:
    """Return the numbers that words stand for (float64)."""
    return to_tensor(words).double().mul_(2.0**-FRACTION_BITS)


def add_mask(words: Words, key: bytes, negative: bool = False) -> None:
    """Add the mask of a key to words, or subtract it, in place. A key must be used for one mask only."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(8 * _CHUNK)
    for first in range(0, len(words), _CHUNK):
        part = words[first : first + _CHUNK]
        mask = np.frombuffer(stream.update(zeros[: 8 * len(part)]), dtype=np.uint64)
        if negative:
            part -= mask
        else:
            part += mask
