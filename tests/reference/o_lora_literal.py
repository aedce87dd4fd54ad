"""O-LoRA in NumPy: the loss, its gradient with respect to both factors, and gradient descent (arXiv 2310.14152)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


class LiteralOLoRA:
    """One weight W + (α/r) B A, trained by gradient descent on A and B."""

    def __init__(self, W: Matrix, *, scaling: float, lambda1: float, lambda2: float, lr: float) -> None:
        self.W, self.scaling, self.lambda1, self.lambda2, self.lr = W, scaling, lambda1, lambda2, lr
        self.old: list[Matrix] = []
        self.A = np.zeros((1, W.shape[1]))
        self.B = np.zeros((W.shape[0], 1))

    def begin(self, A: Matrix) -> None:
        """A task starts with this A and B = 0."""
        self.A, self.B = A, np.zeros((len(self.W), len(A)))

    @property
    def weight(self) -> Matrix:
        """The effective weight."""
        W: Matrix = self.W + self.scaling * self.B @ self.A
        return W

    def penalty(self) -> float:
        """λ1 Σ|A_old Aᵀ| + λ2 (|A|_F + |B|_F)."""
        overlap = sum(np.abs(old @ self.A.T).sum() for old in self.old)
        return self.lambda1 * float(overlap) + self.lambda2 * float(np.linalg.norm(self.A) + np.linalg.norm(self.B))

    def step(self, G: Matrix) -> None:
        """One step; G is the gradient of the task's loss for the effective weight."""
        dA = self.scaling * self.B.T @ G
        dB = self.scaling * G @ self.A.T
        for old in self.old:
            dA = dA + self.lambda1 * np.sign(old @ self.A.T).T @ old
        if self.lambda2:
            dA = dA + self.lambda2 * self.A / np.linalg.norm(self.A)
            length = np.linalg.norm(self.B)
            dB = dB + (self.lambda2 * self.B / length if length else 0.0)
        self.A, self.B = self.A - self.lr * dA, self.B - self.lr * dB

    def end(self) -> None:
        """The task ends: its adapter becomes part of W, its A is remembered."""
        self.W = self.weight
        self.old.append(self.A)
