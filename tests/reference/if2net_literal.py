"""Recursive least squares on given random features, batch by batch, in float64; the projector as λ → 0."""

from __future__ import annotations

import torch
from torch import Tensor


class RecursiveLeastSquares:
    """P ← P − P Hᵀ (I + H P Hᵀ)⁻¹ H P from P = I/λ, then W ← W + P Hᵀ (Y − H W)."""

    def __init__(self, m: int, outputs: int, ridge: float) -> None:
        self.P = torch.eye(m, dtype=torch.float64) / ridge
        self.W = torch.zeros(m, outputs, dtype=torch.float64)

    def update(self, H: Tensor, Y: Tensor) -> None:
        """H (N, m) and Y (N, outputs) of a batch."""
        inner = torch.eye(len(H), dtype=torch.float64) + H @ self.P @ H.T
        self.P = self.P - self.P @ H.T @ torch.linalg.inv(inner) @ H @ self.P
        self.W = self.W + self.P @ H.T @ (Y - H @ self.W)


def complement_projector(H: Tensor) -> Tensor:
    """I − H⁺ H: onto what is orthogonal to all rows of H."""
    return torch.eye(H.shape[1], dtype=H.dtype) - torch.linalg.pinv(H) @ H
