"""The words of `subspace_lab.linalg.random` in 32-bit arithmetic: one stream, fifteen times faster on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 32
_FACTORS = tuple(c - 2**32 if c >= 2**31 else c for c in (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))
_PI = (0x243F6A88, 0x85A308D3)


def random_words(key: int, start: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """Words ``start … start + count - 1`` of a stream, as the same 32 bits of `random_bits`.

    Args:
        key: an integer, taken modulo 2^64.
        start: index of the first word.
        count: number of words.
        device: of the result.

    Returns:
        int32 (count,): a word w of `random_bits` is w - 2^32 here from 2^31 on.
    """
    if start // _BLOCK != (start + max(count, 1) - 1) // _BLOCK:
        first = _BLOCK - start % _BLOCK
        return torch.cat(
            [random_words(key, start, first, device), random_words(key, start + first, count - first, device)]
        )
    # The upper half of the index and the key are one number each: they are mixed outside the tensor.
    low, high = key % 2**32, (key >> 32) % 2**32
    k0, k1 = (_mix(_mix(low ^ constant) ^ high) for constant in _PI)
    x = torch.arange(count, dtype=torch.int32, device=device).add_(_signed(start + k0))
    scratch = torch.empty_like(x)
    _mix_(x, scratch)
    x.bitwise_xor_(_signed(k1 ^ _mix(start // _BLOCK)))
    return _mix_(x, scratch)


def bernoulli(key: int, start: int, count: int, p: float, device: torch.device | str | None = None) -> Tensor:
    """Draws that are True with probability p (to a multiple of 2^-32), one word each.

    Returns:
        bool (count,); entry i depends on key, start + i and p alone, and stays True when p grows.
    """
    limit = round(p * 2**32)
    if limit >= 2**32:
        return torch.ones(count, dtype=torch.bool, device=device)
    # Turning the top bit over maps the order of unsigned numbers to that of signed ones.
    return random_words(key, start, count, device).bitwise_xor_(-(2**31)) < limit - 2**31


def _mix(x: int) -> int:
    for shift, factor in zip((17, 11, 15), _FACTORS, strict=True):
        x = ((x ^ (x >> shift)) * factor) % 2**32
    return x ^ (x >> 14)


def _mix_(x: Tensor, scratch: Tensor) -> Tensor:
    """`_mix` in place; shifts of int32 copy the sign, which is masked away."""
    for shift, factor in zip((17, 11, 15), _FACTORS, strict=True):
        _shift_and_xor(x, shift, scratch).mul_(factor)
    return _shift_and_xor(x, 14, scratch)


def _shift_and_xor(x: Tensor, shift: int, scratch: Tensor) -> Tensor:
    torch.bitwise_right_shift(x, shift, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_(2 ** (32 - shift) - 1))


def _signed(x: int) -> int:
    return (x + 2**31) % 2**32 - 2**31
