"""The Flag Aggregator (Almasi et al., ICLR 2024) with n × p matrices, one client after the other.

Slow on purpose: singular value decompositions of the stacked vectors, loops over clients and pairs, no shared code with
the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7


def left_vectors(columns: list[Tensor], r: int) -> Tensor:
    """The r leading left singular vectors (n, r) of vectors (n,) side by side."""
    return torch.linalg.svd(torch.stack(columns, dim=1), full_matrices=False)[0][:, :r]


def remainder(Y: Tensor, x: Tensor) -> Tensor:
    """1 − |Yᵀ x|² / |x|²."""
    return (1 - (Y.T @ x).square().sum() / x.square().sum()).clamp_min(0)


def objective(units: list[Tensor], Y: Tensor, pairwise: float) -> float:
    """Σ √(1 − v_i) + λ / (p (p − 1)) Σ_{i≠j} √(1 − v_ij)."""
    p = len(units)
    total = sum(float(remainder(Y, u).sqrt()) for u in units)
    for i in range(p):
        for j in range(p):
            if i != j:
                total += pairwise / (p * (p - 1)) * float(remainder(Y, units[i] - units[j]).sqrt())
    return total


def subspace(updates: Tensor, r: int, pairwise: float, iterations: int) -> Tensor:
    """IRLS from equal weights: Y (n, r)."""
    units = [g / g.norm() for g in updates.double()]
    p = len(units)
    Y = None
    for _ in range(iterations):
        columns = []
        for u in units:
            weight = 1.0 if Y is None else (remainder(Y, u) + EPS) ** -0.25
            columns.append(weight * u)
        if pairwise > 0:
            for i in range(p):
                for j in range(p):
                    if i != j:
                        x = units[i] - units[j]
                        weight = 1.0 if Y is None else (remainder(Y, x) + EPS) ** -0.25
                        columns.append((pairwise / (p * (p - 1))) ** 0.5 * weight * x / x.norm())
        Y = left_vectors(columns, r)
    assert Y is not None
    return Y


def combine(updates: Tensor, Y: Tensor) -> Tensor:
    """Σ_i Y Yᵀ ĝ_i / r."""
    total = torch.zeros(updates.shape[1], dtype=torch.float64)
    for g in updates.double():
        total += Y @ (Y.T @ (g / g.norm()))
    return total / Y.shape[1]


def released_subspace(updates: Tensor, r: int, pairwise: float, seed: int) -> Tensor:
    """One step from a random Y, pairs as they are, weights on vectors: Y (n, r)."""
    units = [g / g.norm() for g in updates.double()]
    p, n = len(units), updates.shape[1]
    generator = torch.Generator().manual_seed(seed)
    Y = torch.linalg.qr(torch.rand(n, r, generator=generator, dtype=torch.float64) - 0.5)[0]
    columns = [((1 - (Y.T @ u).square().sum()).abs() + EPS) ** -0.25 * u for u in units]
    for i in range(p):
        for j in range(p):
            if i != j and pairwise > 0:
                x = units[i] - units[j]
                weight = ((1 - (Y.T @ x).square().sum()).abs() + EPS) ** -0.25
                columns.append(pairwise / (p * (p - 1)) * weight * x)
    return left_vectors(columns, r)
