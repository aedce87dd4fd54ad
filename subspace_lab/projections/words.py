"""Integers at any position of a counter-based stream, and keyed permutations made of them.

The words are those of `subspace_lab.linalg.random` (the definition is there). Two things are added: positions need not
be consecutive, and the arithmetic is in int32, which wraps modulo 2^32 by itself and is about six times faster on a CPU
than masked int64. Everything here is integer arithmetic: the same on every device and for every number of threads.

Keyed bijection of k-bit integers, member b of the family `key`::

    m = 2^k - 1;  s = (k + 1) // 2;  w_r = word(key, 8 b + r), r = 0 … 5
    for r in 0, 1, 2:  x = (x * (w_2r | 1) + w_2r+1) & m;  x ^= x >> s

(an odd multiplication, an addition and an exclusive or with a right shift are invertible modulo 2^k; k = 0 is the
identity). A bijection of {0 … D-1} for any D is member 0 for k = bit length of D - 1, applied again while the value is
>= D (cycle walking).
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_PI = (0x243F6A88, 0x85A308D3)
_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))

Device = torch.device | str | None


def _signed(x: int) -> int:
    x &= _MASK
    return x - 2**32 if x >= 2**31 else x


def _mix_int(x: int) -> int:
    for shift, multiplier in _ROUNDS:
        x ^= x >> shift
        x = x * multiplier & _MASK
    return x ^ (x >> 14)


def _mix_(x: Tensor, scratch: Tensor) -> Tensor:
    """`mix` in place; torch shifts int32 arithmetically, so the copies of the sign are masked away."""
    for shift, multiplier in _ROUNDS:
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1)).mul_(_signed(multiplier))
    torch.bitwise_right_shift(x, 14, out=scratch)
    return x.bitwise_xor_(scratch.bitwise_and_((1 << 18) - 1))


def words(key: int, high: Tensor | int, low: Tensor) -> Tensor:
    """word(key, high * 2^32 + low), as int32 bit patterns.

    Args:
        key: any integer, modulo 2^64.
        high: upper halves of the positions: int32 broadcastable with `low`, or one integer for all.
        low: lower halves, int32 bit patterns.

    Returns:
        int32 of the broadcast shape: the word, or the word - 2^32.
    """
    key %= 2**64
    k0, k1 = (_mix_int(_mix_int((key & _MASK) ^ constant) ^ (key >> 32)) for constant in _PI)
    x = low + _signed(k0)
    _mix_(x, torch.empty_like(x))
    if isinstance(high, int):
        x.bitwise_xor_(_signed(k1 ^ _mix_int(high & _MASK)))
    else:
        upper = high.clone()
        x = x ^ (_mix_(upper, torch.empty_like(upper)) ^ _signed(k1))
    return _mix_(x, torch.empty_like(x))


def word_range(key: int, start: int, count: int, device: Device = None) -> Tensor:
    """Words start … start + count - 1, int32 (count,)."""
    if start + count <= 2**31:
        return words(key, 0, torch.arange(start, start + count, dtype=torch.int32, device=device))
    high, low = split(torch.arange(start, start + count, dtype=torch.int64, device=device))
    return words(key, high, low)


def split(index: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower halves of non-negative int64 positions below 2^63, int32 bit patterns."""
    low = ((index & _MASK) ^ 2**31) - 2**31
    return (index >> 32).to(torch.int32), low.to(torch.int32)


def signs(key: int, start: int, count: int, device: Device = None) -> Tensor:
    """Rademacher entries start … start + count - 1 of `linalg.random`, int8 (count,) of ±1."""
    first, skip = divmod(start, 32)
    bits = word_range(key, first, (skip + count + 31) // 32, device).view(torch.uint8)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    flat = ((bits.unsqueeze(-1) >> shifts) & 1).flatten()[skip : skip + count]
    return 1 - 2 * flat.to(torch.int8)


def bit_counts(words: Tensor) -> Tensor:
    """Number of one bits in each byte of int32 words, uint8 (..., 4), the lowest byte first.

    Summed over the last dimension it is the number of one bits of the word.
    """
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return x.view(torch.uint8).reshape(*words.shape, 4)


def bijection(key: int, k: int, values: Tensor, members: Tensor | None = None) -> Tensor:
    """The keyed bijection of k-bit integers.

    Args:
        key: of the family.
        k: 0 <= k <= 62.
        values: integers in [0, 2^k), int32 if k <= 31, else int64.
        members: int64 (m, 1): member b for each row of the result; None is member 0.

    Returns:
        Like `values`, broadcast to (m, …) where members are given.
    """
    if k == 0:
        return values if members is None else values.expand(members.shape[0], -1)
    which = torch.zeros(1, 1, dtype=torch.int64, device=values.device) if members is None else members
    high, low = split(8 * which + torch.arange(6, device=values.device))
    constants = words(key, high, low).to(values.dtype)
    if values.dtype == torch.int64:
        constants = constants & _MASK
    if members is None:
        constants = constants.squeeze(0)
    mask, shift = (1 << k) - 1, (k + 1) // 2
    x = values
    for r in range(0, 6, 2):
        x = (x * (constants[..., r : r + 1] | 1)).add_(constants[..., r + 1 : r + 2]).bitwise_and_(mask)
        x.bitwise_xor_(x >> shift)
    return x


def permuted(key: int, size: int, start: int, stop: int, device: Device = None) -> Tensor:
    """Where the keyed bijection of {0 … size-1} sends start … stop-1: int32 below 2^31, else int64."""
    k = (size - 1).bit_length()
    dtype = torch.int32 if k <= 31 else torch.int64
    x = bijection(key, k, torch.arange(start, stop, dtype=dtype, device=device))
    # Whether to go round again depends on the data; this runs once for each chunk, not in every step.
    while bool((outside := x >= size).any()):
        x = torch.where(outside, bijection(key, k, x), x)
    return x
