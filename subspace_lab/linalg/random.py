"""A counter-based random generator: the same integers on every device, addressable entry by entry.

Random bases and sketches are regenerated instead of stored, so entry ``i`` of stream ``key`` has to be a pure
function of ``(key, i)``: independent of chunking, device, library version and process. torch's own generators
promise none of that.

Definition (all arithmetic modulo 2^32; ``^`` is exclusive or, ``>>`` a logical shift)::

    mix(x):  x ^= x >> 17;  x *= 0xED5AD4BB;  x ^= x >> 11;  x *= 0xAC4C1B51
             x ^= x >> 15;  x *= 0x31848BAB;  x ^= x >> 14

    k0 = mix(mix(lo(key) ^ 0x243F6A88) ^ hi(key))
    k1 = mix(mix(lo(key) ^ 0x85A308D3) ^ hi(key))
    word(key, i) = mix(mix(lo(i) + k0) ^ k1 ^ mix(hi(i)))

``lo`` and ``hi`` are the low and the high 32 bits of the 64-bit two's complement value. ``mix`` is the
bijection "triple32" of C. Wellons' hash-prospector (bias 0.021 bits); the two constants are the first
fraction words of pi. Derived streams:

    rademacher entry i = 1 - 2 * bit (i mod 32) of word(key, i // 32)
    uniform entry i    = floor(word(key, i) / 2^8) / 2^24, in [0, 1)

A rademacher and a uniform stream of one key share words: derive a key for each use with `derive_key`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

Key = int | Tensor

_MASK = 0xFFFFFFFF
_PI = (0x243F6A88, 0x85A308D3)
# Multipliers as signed 32-bit numbers: congruent modulo 2^32, and |x * multiplier| < 2^63 never overflows an
# int64.
_MULTIPLIERS = tuple(c - 2**32 if c >= 2**31 else c for c in (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))


def derive_key(*parts: int | str) -> int:
    """Hash ``parts`` to a key in [0, 2^63), stable across processes, machines and Python versions.

    The parts are tagged with type and length before BLAKE2b, so ``("ab", "c")``, ``("a", "bc")`` and ``(1,)``
    versus ``("1",)`` give different keys.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        text = str(int(part) if isinstance(part, int) else part).encode()
        digest.update(f"{'i' if isinstance(part, int) else 's'}{len(text)}:".encode() + text)
    return int.from_bytes(digest.digest(), "little") >> 1


def _mix(x: Tensor) -> Tensor:
    for shift, multiplier in zip((17, 11, 15), _MULTIPLIERS, strict=True):
        x = ((x ^ (x >> shift)) * multiplier) & _MASK
    return x ^ (x >> 14)


def _key_tensor(key: Key, device: torch.device | str | None) -> Tensor:
    if isinstance(key, Tensor):
        return key.to(device=device, dtype=torch.int64)
    wrapped = (key + 2**63) % 2**64 - 2**63
    # full, not tensor: a host-to-device copy from pageable memory would synchronise.
    return torch.full((), wrapped, dtype=torch.int64, device=device)


def random_bits(key: Key, start: int, count: int, device: torch.device | str | None = None) -> Tensor:
    """Words ``start … start + count - 1`` of a stream.

    Args:
        key: an integer (taken modulo 2^64), or an integer tensor of keys, one stream each.
        start: index of the first word, 0 <= start < 2^63 - count.
        count: number of words.
        device: device of the result; default: the key tensor's, or the default device.

    Returns:
        int64 (count,) or (*key.shape, count) with values in [0, 2^32).
    """
    if start < 0 or count < 0:
        raise ValueError(f"start and count must be non-negative, got start={start}, count={count}")
    k = _key_tensor(key, device).unsqueeze(-1)
    low, high = k & _MASK, (k >> 32) & _MASK
    k0, k1 = (_mix(_mix(low ^ constant) ^ high) for constant in _PI)
    index = torch.arange(start, start + count, dtype=torch.int64, device=k.device)
    return _mix(_mix(((index & _MASK) + k0) & _MASK) ^ k1 ^ _mix(index >> 32))


def rademacher(
    shape: Sequence[int],
    *,
    key: Key,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Signs ±1 with equal probability; flat (row-major) entry ``i`` is entry ``offset + i`` of the stream.

    Returns:
        (*shape) for an integer key, (*key.shape, *shape) for a tensor of keys. Row ``j`` of an (n, k) matrix
        alone is ``rademacher((k,), key=key, offset=j * k)``.
    """
    if offset < 0:
        raise ValueError(f"offset must be non-negative, got {offset}")
    size = math.prod(shape)
    first, skip = divmod(offset, 32)
    words = random_bits(key, first, (skip + size + 31) // 32, device)
    # Words to bytes to bits: the per-entry work is then on uint8, an eighth of the memory traffic of int64.
    byte_shifts = torch.arange(0, 32, 8, dtype=torch.int64, device=words.device)
    octets = ((words.unsqueeze(-1) >> byte_shifts) & 0xFF).to(torch.uint8)
    bits = (octets.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=words.device)) & 1
    flat = bits.flatten(start_dim=words.dim() - 1)[..., skip : skip + size]
    return (1 - 2 * flat.to(dtype)).reshape((*words.shape[:-1], *shape))


def uniform(
    shape: Sequence[int],
    *,
    key: Key,
    offset: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Uniform multiples of 2^-24 in [0, 1), exact in float32; addressing and shapes as in `rademacher`.

    Raises:
        ValueError: dtype is neither float32 nor float64 (a shorter one would round up to 1).
    """
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"uniform needs float32 or float64, got {dtype}")
    words = random_bits(key, offset, math.prod(shape), device)
    return ((words >> 8).to(dtype) * 2.0**-24).reshape((*words.shape[:-1], *shape))
