"""Numbers that come out the same everywhere: sums in 64-bit fixed point on a common scale, and exactly rounded scales.

Floating-point additions in another order give other bits, and libraries choose the order. Integers do not care: numbers
u_j become q_j = round(u_j 2^s) with the largest s for which `terms` of them cannot overflow 62 bits, are added as
integers, and the sum times 2^-s is rounded to double once. Against the largest |u| the error is 2^-61 times the number
of terms. Everything stays on the device; the scale is read from the bits of a double.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_BITS = 62


def inverse_roots(squares: Tensor, factor: float = 1.0) -> Tensor:
    """1 / sqrt(double(squares) * factor) for int64, on the same device, rounded as IEEE says.

    By NumPy on the CPU: torch may hand square roots to a vector library that errs in the last bit.
    """
    doubles = squares.cpu().numpy().astype(np.float64)
    return torch.from_numpy(1 / np.sqrt(doubles * factor)).to(squares.device)


def power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, exactly, for int64 exponents in -1022 … 1023."""
    return ((exponent + 1023) << 52).view(torch.float64)


def to_fixed(u: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """Integers q = round(u 2^s), and s.

    Args:
        u: any floating dtype; not empty.
        terms: bound of the sums to be formed: |Σ w q| with Σ |w| <= terms.

    Returns:
        int64 like u, and s as an int64 scalar, or -2000 where u has an infinity or NaN.
    """
    u = u.double()
    largest = torch.maximum(u.amax(), -u.amin())
    exponent = torch.frexp(largest).exponent.to(torch.int64)
    shift = (_BITS - (terms - 1).bit_length() - exponent).clamp(-1000, 1000)
    q = (u * power_of_two(shift)).round_().to(torch.int64)
    return q, torch.where(torch.isfinite(largest), shift, -2000)


def from_fixed(total: Tensor, shift: Tensor) -> Tensor:
    """Return total 2^-s as float64; NaN where the summands were not finite."""
    scale = power_of_two((-shift).clamp(-1022, 1023))
    return torch.where(shift > -2000, total.double() * scale, float("nan"))
