"""Grassmann class representation written out class by class, with tall SVDs, in float64.

Slow on purpose: no batches, no shared code with the package. S_i, G, m are (n, k) columns as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logits(x: Tensor, bases: list[Tensor], gamma: float) -> Tensor:
    """x (b, n) -> (b, C)."""
    out = torch.empty(len(x), len(bases), dtype=x.dtype)
    for b in range(len(x)):
        for i, S in enumerate(bases):
            out[b, i] = gamma * torch.linalg.norm(S.T @ (x[b] / torch.linalg.norm(x[b])))
    return out


def geodesic(S: Tensor, G: Tensor, t: float) -> Tensor:
    """S+ = (S V cos(t Σ) + U sin(t Σ)) Vᵀ for G = U Σ Vᵀ."""
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
    return (S @ Vh.T @ torch.diag(torch.cos(t * sigma)) + U @ torch.diag(torch.sin(t * sigma))) @ Vh


class PaperClass:
    """One class: tangent gradient, tangent momentum, geodesic, momentum projected at the new point."""

    def __init__(self, S: Tensor, lr: float, momentum: float) -> None:
        self.S, self.lr, self.momentum = S.clone(), lr, momentum
        self.m = torch.zeros_like(S)

    def step(self, D: Tensor) -> None:
        tangent = D - self.S @ (self.S.T @ D)
        self.m = self.momentum * self.m + tangent
        self.S = geodesic(self.S, self.m, -self.lr)
        self.m = self.m - self.S @ (self.S.T @ self.m)


class ReleaseClass:
    """One class as gcr/rsgd.py of innerlee/GCR moves it: ambient momentum, projection, geodesic, QR now and then."""

    def __init__(self, S: Tensor, lr: float, momentum: float, reorth_step: int) -> None:
        self.S, self.lr, self.momentum, self.reorth_step = S.clone(), lr, momentum, reorth_step
        self.m = torch.zeros_like(S)
        self.calls = 0

    def step(self, D: Tensor) -> None:
        self.calls += 1
        self.m = self.momentum * self.m + D
        G = self.m - self.S @ (self.S.T @ self.m)
        self.S = geodesic(self.S, G, -self.lr)
        if self.calls % self.reorth_step == 0:
            self.S = torch.linalg.qr(self.S)[0]
