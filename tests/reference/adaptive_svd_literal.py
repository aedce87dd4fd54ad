"""Sculpting subspaces in NumPy: explicit projectors, explicit ranks (arXiv 2504.07097)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def importance(W: Matrix, X: Matrix) -> float:
    """Mean cosine between inputs X (n, in) and outputs X Wᵀ, both cut to the shorter of the two lengths."""
    d = min(W.shape)
    total = 0.0
    for x in X:
        y = W @ x
        total += x[:d] @ y[:d] / (np.linalg.norm(x[:d]) * np.linalg.norm(y[:d]))
    return total / len(X)


def ranks(importances: list[float], sizes: list[int], mrr: float, trr: float) -> list[int]:
    """R(l) = mrr + I(l)(trr − mrr) of each layer's min(out, in), I with mean 1."""
    mean = sum(importances) / len(importances)
    shares = [mrr + value / mean * (trr - mrr) for value in importances]
    return [min(d, max(1, round(share * d))) for share, d in zip(shares, sizes, strict=True)]


class LiteralSculpting:
    """One weight; AdamW on the projected gradient, the whole step projected."""

    def __init__(self, W: Matrix, k: int, lr: float, decay: float = 0.0) -> None:
        U, _, Vh = np.linalg.svd(W)
        self.left = np.eye(W.shape[0]) - U[:, :k] @ U[:, :k].T
        self.right = np.eye(W.shape[1]) - Vh[:k].T @ Vh[:k]
        self.lr, self.decay, self.t = lr, decay, 0
        self.m = np.zeros_like(W)
        self.v = np.zeros_like(W)

    def step(self, W: Matrix, G: Matrix) -> Matrix:
        """Return the weight after a step with gradient G."""
        self.t += 1
        G = self.left @ G @ self.right
        self.m = 0.9 * self.m + 0.1 * G
        self.v = 0.999 * self.v + 0.001 * G**2
        N = self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
        new: Matrix = W - self.lr * self.left @ (N + self.decay * W) @ self.right
        return new


def factor_step(W: Matrix, G: Matrix, k: int, lr: float) -> Matrix:
    """One gradient step on the low factors (U_l, S_l, V_l), U_l's and V_l's gradients kept off the high ones."""
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    high = (U[:, :k] * s[:k]) @ Vh[:k]
    Ul, Sl, Vl = U[:, k:], s[k:], Vh[k:]
    dU = G @ Vl.T * Sl
    dV = (Ul * Sl).T @ G
    dS = np.diag(Ul.T @ G @ Vl.T)
    dU = dU - U[:, :k] @ (U[:, :k].T @ dU)
    dV = dV - (dV @ Vh[:k].T) @ Vh[:k]
    new: Matrix = high + ((Ul - lr * dU) * (Sl - lr * dS)) @ (Vl - lr * dV)
    return new
