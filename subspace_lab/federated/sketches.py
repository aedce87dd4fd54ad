"""Random sketches of layer inputs that add up: Σ_c R_c G_c is a sketch of all clients' inputs together.

With independent standard normal G_c (n_c, s), E[Y Yᵀ] / s = R Rᵀ for R = [R_1 … R_C]: the leading left singular
vectors of the sum are those of the union, which no one has seen (Halko, Martinsson & Tropp 2011, arXiv 0909.4061).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from subspace_lab.linalg.energy import energy_directions
from subspace_lab.linalg.precision import matmul
from subspace_lab.linalg.removal import Removal

#: entries of the energies that a client sends: Σ|x|², Σ|r|², n, n |R| / |A|
ENERGIES = 4


class InputSketch:
    """Streams the inputs of one layer on one client into what the client sends.

    Args:
        U: (d, k), directions that are protected already.
        width: s, columns of the sketch; None: the Gram matrix R Rᵀ (d, d) in its place, which is exact.
        generator: of G, on U's device.

    Attributes:
        Y: Σ R G (d, s), or R Rᵀ, float32.
        energies: Σ|x|² over the inputs x, Σ|r|² over their rests r = (I − U Uᵀ) x, float64 scalars.
    """

    def __init__(self, U: Tensor, width: int | None, generator: torch.Generator) -> None:
        d = U.shape[0]
        self.Y = U.new_zeros(d, d if width is None else width)
        self.energies = [U.new_zeros((), dtype=torch.float64) for _ in range(2)]
        self._removal = Removal.of(U) if U.shape[1] else None
        self._width, self._generator = width, generator

    def add(self, X: Tensor) -> None:
        """Take in inputs, rows of X (m, d)."""
        rest = X if self._removal is None else self._removal(X)
        for energy, rows in zip(self.energies, (X, rest), strict=True):
            energy += rows.double().square().sum()
        if self._width is None:
            self.Y += matmul(rest.mT, rest)
            return
        G = torch.randn(len(rest), self._width, generator=self._generator, device=rest.device)
        self.Y += matmul(rest.mT, G.to(rest.dtype))

    def energies_of(self, examples: int) -> Tensor:
        """What goes with the sketch of so many examples (4,), float64: see `ENERGIES`."""
        whole, rest = self.energies
        ratio = torch.where(whole > 0, (rest / whole).sqrt(), torch.zeros_like(whole))
        n = torch.full_like(whole, float(examples))
        return torch.stack([whole, rest, n, n * ratio])


def remaining_threshold(ratio: float, threshold: float) -> float:
    """ε' = (ρ̄ − (1 − ε)) / ρ̄: the share of the rest's energy that has to be captured for ε of the whole.

    Args:
        ratio: ρ̄, the rest's share of all energy.
        threshold: ε.
    """
    return (ratio - (1 - threshold)) / ratio if ratio > 0 else 0.0


def new_directions(Y: Tensor, share: float, *, gram: bool) -> Tensor:
    """The fewest leading left singular vectors of a summed sketch that hold `share` of its energy.

    Args:
        Y: Σ_c R_c G_c (d, s), or Σ_c R_c R_cᵀ (d, d) where `gram`.
        share: in any range; none are needed for 0 or less.
        gram: which of the two.

    Returns:
        (d, k) float32, orthonormal.
    """
    G = Y.double() if gram else matmul(Y.double(), Y.double().mT)
    return energy_directions(G, G.new_zeros(len(G), 0), min(1.0, max(0.0, share)))


def sketch_columns(d: int, width: float | None) -> int | None:
    """Columns of a sketch of d-dimensional inputs that is `width` times as wide as it is high."""
    return None if width is None else math.ceil(width * d)
