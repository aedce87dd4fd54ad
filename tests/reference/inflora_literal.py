"""InfLoRA in NumPy: explicit adapters B A beside a frozen weight, DualGPM on explicit matrices (arXiv 2404.00228)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class LiteralDualGPM:
    """The remembered space of one layer's inputs, or from half on its complement."""

    def __init__(self) -> None:
        self.kind = "remove"
        self.M: Matrix | None = None

    def keep(self, R: Matrix) -> Matrix:
        """The part of the columns of R (d, n) that the coming task may use."""
        if self.M is None:
            return R
        inside: Matrix = self.M @ (self.M.T @ R)
        return R - inside if self.kind == "remove" else inside

    def update(self, R: Matrix, threshold: float) -> None:
        """Take in a finished task with representations R (d, n)."""
        total = (R**2).sum()
        d = len(R)
        if self.M is None:
            U, s, _ = np.linalg.svd(R, full_matrices=False)
            r = int((np.cumsum(s**2 / total) < threshold).sum())
            self.M = U[:, : max(r, 1)]
        elif self.kind == "remove":
            U, s, _ = np.linalg.svd(self.keep(R), full_matrices=False)
            captured, r = 1 - (s**2).sum() / total, 0
            while r < len(s) and captured < threshold:
                captured += s[r] ** 2 / total
                r += 1
            self.M = np.concatenate([self.M, U[:, :r]], axis=1)[:, :d]
        else:
            U, s, _ = np.linalg.svd(self.keep(R), full_matrices=False)
            left, r = (s**2).sum() / total, 0
            while r < len(s) and left >= 1 - threshold:
                left -= s[r] ** 2 / total
                r += 1
            rest = self.M - U[:, :r] @ (U[:, :r].T @ self.M)
            self.M = np.linalg.svd(rest)[0][:, : self.M.shape[1] - r]
        if self.kind == "remove" and self.M.shape[1] > d / 2:
            self.M = np.linalg.svd(self.M)[0][:, self.M.shape[1] :]
            self.kind = "retain"


def down_projection(space: LiteralDualGPM, R: Matrix, rank: int) -> Matrix:
    """A (rank, d): the leading directions of what may be used, divided by √3."""
    A: Matrix = np.linalg.svd(space.keep(R), full_matrices=False)[0][:, :rank].T / np.sqrt(3)
    return A


class LiteralAdapter:
    """Adam on B of W + B A, B starting at zero."""

    def __init__(self, W: Matrix, A: Matrix, lr: float) -> None:
        self.W, self.A, self.lr, self.t = W, A, lr, 0
        self.B = np.zeros((len(W), len(A)))
        self.m = np.zeros_like(self.B)
        self.v = np.zeros_like(self.B)

    @property
    def weight(self) -> Matrix:
        """The effective weight."""
        W: Matrix = self.W + self.B @ self.A
        return W

    def step(self, G: Matrix) -> None:
        """One step; G is the gradient of the effective weight."""
        self.t += 1
        g = G @ self.A.T
        self.m = 0.9 * self.m + 0.1 * g
        self.v = 0.999 * self.v + 0.001 * g**2
        self.B = self.B - self.lr * self.m / (1 - 0.9**self.t) / (np.sqrt(self.v / (1 - 0.999**self.t)) + 1e-8)
