"""HLOP's Hebbian learning (Xiao et al., ICLR 2024, arXiv 2402.11984), example by example.

Slow on purpose: outer products of single examples, no shared code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLAMP, KEEP, INNER = 10.0, 0.9, 5


class HlopRows:
    """Rows H (m × d) of which the first `fixed` are old; learns the others from batches of inputs."""

    def __init__(self, H: Tensor, fixed: int, lr: float) -> None:
        self.H, self.fixed, self.lr = H.double().clone(), fixed, lr
        self.velocity = torch.zeros_like(self.H)

    def learn(self, X: Tensor) -> None:
        for _ in range(INNER):
            delta = torch.zeros_like(self.H)
            for x in X.double():
                y = self.H @ x
                delta += torch.outer(y, x - self.H.T @ y) / len(X)
            delta = delta.clamp(-CLAMP, CLAMP)
            for i in range(self.fixed, len(self.H)):
                self.velocity[i] = KEEP * self.velocity[i] + (1 - KEEP) * delta[i]
                self.H[i] = self.H[i] + self.lr * self.velocity[i]


def weight_gradient(delta: Tensor, X: Tensor, H_old: Tensor) -> Tensor:
    """Σ δ (x − HᵀHx)ᵀ over a batch: δ (b × out), X (b × d)."""
    G = torch.zeros(delta.shape[1], X.shape[1], dtype=torch.float64)
    for d, x in zip(delta.double(), X.double(), strict=True):
        G += torch.outer(d, x - H_old.T @ (H_old @ x))
    return G


def rows_for(task: int, first: int, more: int, fewer: int, every: int) -> int:
    """The released schedule, counted up task by task."""
    rows = first
    grow = more
    for t in range(1, task + 1):
        if t % every == 0:
            grow -= fewer
        rows = grow
    return max(rows, 0)
