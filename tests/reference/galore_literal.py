"""GaLore written out matrix by matrix, as the paper (arXiv 2403.03507, algorithm 2) and the release state it.

Slow on purpose: no stacks, no shared code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GaLoreMatrix:
    """One weight W (m × n) under GaLore-Adam; `variant` as in `subspace_lab.methods.galore`."""

    def __init__(self, W: Tensor, rank: int, every: int, scale: float, lr: float, eps: float, variant: str) -> None:
        self.W, self.rank, self.every, self.scale, self.lr, self.eps = W.clone(), rank, every, scale, lr, eps
        self.variant = variant
        self.b1, self.b2 = 0.9, 0.999
        self.t = 0
        self.P: Tensor | None = None
        self.M: Tensor | None = None
        self.V: Tensor | None = None

    def step(self, G: Tensor) -> None:
        m, n = G.shape
        right = m >= n
        if self.t % self.every == 0:
            U, _, Vh = torch.linalg.svd(G, full_matrices=False)
            new = Vh[: self.rank].T if right else U[:, : self.rank]
            if self.variant == "paper" and self.P is not None:
                signs = (self.P * new).sum(dim=0).sign()
                new = new * torch.where(signs == 0, torch.ones_like(signs), signs)
            self.P = new
        assert self.P is not None
        R = G @ self.P if right else self.P.T @ G
        if self.M is None or self.V is None:
            self.M, self.V = torch.zeros_like(R), torch.zeros_like(R)
        self.t += 1
        self.M = self.b1 * self.M + (1 - self.b1) * R
        self.V = self.b2 * self.V + (1 - self.b2) * R**2
        c1, c2 = 1 - self.b1**self.t, 1 - self.b2**self.t
        if self.variant == "release":
            N = (c2**0.5 / c1) * self.M / (self.V.sqrt() + self.eps)
        else:
            N = (self.M / c1) / ((self.V / c2).sqrt() + self.eps)
        self.W = self.W - self.lr * self.scale * (N @ self.P.T if right else self.P @ N)
