"""CoSO's algorithm in NumPy, one matrix at a time, everything formed in full (arXiv 2505.11816)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def shrink(C: Matrix, columns: int) -> tuple[Matrix, Matrix]:
    """Leading eigenvectors of C (q, q) and the lengths that frequent directions leaves them."""
    energy, vectors = np.linalg.eigh(C)
    energy, vectors = np.maximum(energy[::-1], 0), vectors[:, ::-1]
    cut = energy[columns] if columns < len(energy) else 0.0
    return vectors[:, :columns], np.sqrt(np.maximum(energy[:columns] - cut, 0))


class LiteralCoSO:
    """One weight W (out, in).

    Args:
        side: output: U of the gradient; input: V of it.
        release: shrink twice, and put ε beside √v before bias correction.
    """

    def __init__(
        self,
        *,
        r1: int,
        r2: int,
        every: int,
        threshold: float,
        lr: float,
        side: str,
        release: bool,
        adam: bool = True,
        eps: float = 1e-6,
    ) -> None:
        self.r1, self.r2, self.every, self.threshold, self.lr = r1, r2, every, threshold, lr
        self.side, self.release, self.adam, self.eps = side, release, adam, eps
        self.M: Matrix | None = None
        self.begin()

    def begin(self) -> None:
        """A task starts: no sketch, no moments."""
        self.t = 0
        self.S: Matrix | None = None
        self.P: Matrix | None = None
        self.m: Matrix | float = 0.0
        self.v: Matrix | float = 0.0

    def step(self, W: Matrix, G: Matrix) -> Matrix:
        """Return the weight after a step with gradient G."""
        if self.side == "input":
            G = G.T
        if self.M is not None:
            G = G - self.M @ (self.M.T @ G)
        if self.t % self.every == 0:
            U = np.linalg.svd(G, full_matrices=False)[0]
            P = U[:, : self.r1]
            if self.P is not None:
                P = P * np.where((P * self.P).sum(0) < 0, -1, 1)
            self.P = P
            C = G @ G.T
            if self.release:
                vectors, lengths = shrink(C, self.r2)
                C = (vectors * lengths**2) @ vectors.T
            if self.S is not None:
                C = C + self.S @ self.S.T
            vectors, lengths = shrink(C, self.r2)
            self.S = vectors * lengths
        assert self.P is not None
        self.t += 1
        R = self.P.T @ G
        if self.adam:
            self.m = 0.9 * self.m + 0.1 * R
            self.v = 0.999 * self.v + 0.001 * R**2
            first, second = 1 - 0.9**self.t, 1 - 0.999**self.t
            if self.release:
                N = np.sqrt(second) / first * self.m / (np.sqrt(self.v) + self.eps)
            else:
                N = self.m / first / (np.sqrt(self.v / second) + self.eps)
        else:
            N = R
        step = self.P @ N
        new: Matrix = W - self.lr * (step.T if self.side == "input" else step)
        return new

    def end(self) -> None:
        """The task ends: its leading directions join M."""
        assert self.S is not None
        energy = (self.S**2).sum(0)
        k = int((np.cumsum(energy / energy.sum()) < self.threshold).sum())
        new = self.S[:, :k] / np.sqrt(energy[:k])
        self.M = new if self.M is None else np.concatenate([self.M, new], axis=1)
        self.begin()
