"""Whether kernels give the bits of the definition: tried on small cases before they are trusted.

Written for being read beside `subspace_lab.projections.blocked` and compared with it, not for speed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_lab.linalg.random import rademacher, random_bits

Keys = tuple[int, int, int]


def hadamard(v: Tensor) -> Tensor:
    """H v, unnormalised, strides 1, 2, 4, …; v (n,), n a power of two."""
    h = 1
    while h < len(v):
        a, b = v.view(-1, 2, h).unbind(1)
        v = torch.stack((a + b, a - b), dim=1).flatten()
        h *= 2
    return v


def places(n: int, key: int, block: int, device: torch.device | None = None) -> Tensor:
    """π_block(0 … n - 1), int64 (n,)."""
    bits, x = n.bit_length() - 1, torch.arange(n, device=device)
    shift = (bits + 1) // 2
    for times, plus in random_bits(key, 8 * block, 6, device).view(3, 2):
        x = ((x * (times | 1)) + plus) & (n - 1)  # below 2^64: only the low bits count
        x = x ^ (x >> shift)
    return x


def lift(z: Tensor, base: Tensor | None, D: int, n: int, keys: Keys, c: float, rows: tuple[int, int]) -> Tensor:
    """Return base + c P[rows] z of the unscaled orthoblock P, (rows,) of z's dtype."""
    x, made = torch.zeros(n, dtype=z.dtype, device=z.device), []
    x[: len(z)] = z
    for block in range(-(-D // n)):
        B, S = (_signs(key, block, n, z) for key in keys[:2])
        made.append(hadamard(S * hadamard(B * x)[places(n, keys[2], block, z.device)]))
    y = c * torch.cat(made)[slice(*rows)]
    return y if base is None else base + y


def project(g: Tensor, d: int, D: int, n: int, keys: Keys, c: float, rows: tuple[int, int]) -> Tensor:
    """Return c P[rows]ᵀ g, (d,): blocks added in ascending order, then scaled."""
    padded = torch.zeros(-(-D // n) * n, dtype=g.dtype, device=g.device)
    padded[slice(*rows)] = g
    total = torch.zeros(n, dtype=g.dtype, device=g.device)
    for block in range(rows[0] // n, -(-rows[1] // n)):
        B, S = (_signs(key, block, n, g) for key in keys[:2])
        v = torch.empty_like(total)
        v[places(n, keys[2], block, g.device)] = S * hadamard(padded[block * n : (block + 1) * n])
        total = total + B * hadamard(v)
    return c * total[:d]


def sign_matrix(rows: tuple[int, int], d: int, key: int) -> Tensor:
    """Rows of `dense` without its scale, float64."""
    return torch.stack([rademacher((d,), key=key, offset=i << 32, dtype=torch.float64) for i in range(*rows)])


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Also of zeros, which have a sign."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def _signs(key: int, block: int, n: int, like: Tensor) -> Tensor:
    return rademacher((n,), key=key, offset=block * n, dtype=like.dtype, device=like.device)
