"""Which directions hold a given share of the inputs' energy, from the Gram matrix of the inputs.

Gradient projection memory (Saha, Garg & Roy, ICLR 2021, arXiv 2103.09762), eqs. 5, 8 and 9, with R (d, n) the inputs
as columns and G = R Rᵀ.  Singular vectors of R are eigenvectors of G, singular values squared its eigenvalues, and
those of R̂ = (I − M Mᵀ) R belong to (I − M Mᵀ) G (I − M Mᵀ): the inputs themselves are never needed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_lab.linalg.orthonormalize import orthonormalize
from subspace_lab.linalg.precision import full_precision, matmul
from subspace_lab.linalg.random import derive_key, rademacher
from subspace_lab.linalg.svd import descending_eigh

EXACT = 1024  # up to this dimension all eigenvectors are computed
_DOUBLE = 512  # and up to this one in float64: beyond, it takes twice the time for what the threshold never sees
_BLOCK = 32
_GIVE_UP = 3  # a randomised search for more than d / 3 directions costs as much as all eigenvectors


@full_precision
def energy_directions(gram: Tensor, protected: Tensor | None, threshold: float, *, exact: int = EXACT) -> Tensor:
    """New directions by GPM's rule; the leading ones of what `protected` leaves over.

    Without a basis, as many as together hold *less* than the threshold (eq. 5 as released: strictly below).  With one
    (it may have no columns), as few as raise the captured energy to the threshold *or above* (eq. 9), relative to all
    energy, starting from what the basis captures already.  Directions without energy are never taken.

    Args:
        gram: G = Σ x xᵀ (d, d), float32 or float64.
        protected: M (d, m) with orthonormal columns; None before the first task.
        threshold: ε in [0, 1].
        exact: up to this d all eigenvectors are computed; beyond it, block subspace iteration (Halko, Martinsson &
            Tropp 2011, §4.5 and §5.5) with blocks that double until the energy is reached.

    Returns:
        (d, k) in float32, orthonormal, orthogonal to M, longest first; k = 0 where nothing is missing.

    Raises:
        ValueError: the threshold is out of range, or shapes disagree.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    d = gram.shape[0]
    if protected is not None and protected.shape[0] != d:
        raise ValueError(f"basis of dimension {protected.shape[0]} and inputs of dimension {d}")
    G = gram.to(torch.float64 if d <= _DOUBLE else torch.float32)
    M = None if protected is None else protected.to(G.dtype)
    operator = _Residual(G, M)
    missing = threshold * operator.total - (operator.total - operator.left)
    if missing <= 0:
        return gram.new_zeros(d, 0, dtype=torch.float32)
    if d <= exact or not (found := _search(operator, missing)):
        values, vectors = descending_eigh(operator.dense())
    else:
        values, vectors = found
    k = _count(values, missing, strict=M is None)
    free = d - (0 if M is None else M.shape[1])
    return _clean(vectors[:, : min(k, free)], M).float()


@full_precision
def row_directions(rows: Tensor, protected: Tensor | None, threshold: float, *, total: float | None = None) -> Tensor:
    """`energy_directions` for G = SᵀS given by few rows S (l, d): a sketch where d is too large for a Gram matrix.

    Args:
        rows: S (l, d).
        protected: M (d, m) or None.
        threshold: ε in [0, 1].
        total: energy of the sketched inputs; a sketch has lost some of it, and then more directions are taken than the
            inputs need, at most l.

    Returns:
        (d, k), k ≤ l.
    """
    if not 0 <= threshold <= 1:
        raise ValueError(f"threshold must be in [0, 1], got {threshold}")
    S = rows.double()
    M = None if protected is None else protected.double()
    everything = float(S.square().sum()) if total is None else total
    inside = 0.0
    if M is not None:
        Z = S @ M
        inside = float(Z.square().sum())
        S = S - Z @ M.mT
    values, left = descending_eigh(S @ S.mT)
    k = _count(values, threshold * everything - inside, strict=M is None)
    lengths = values[:k].sqrt()
    free = S.shape[1] - (0 if M is None else M.shape[1])
    return _clean((S.mT @ (left[:, :k] / lengths))[:, :free], M).float()


class _Residual:
    """X -> (I − M Mᵀ) G (I − M Mᵀ) X without forming the matrix; `total` is tr G, `left` the trace of the residual."""

    def __init__(self, G: Tensor, M: Tensor | None) -> None:
        self.G, self.M = G, M if M is not None and M.shape[1] else None
        self.total = float(G.diagonal().double().sum())
        self.left = self.total
        if self.M is not None:
            self.GM = matmul(G, self.M)
            self.left -= float((self.GM * self.M).double().sum())

    def __call__(self, X: Tensor) -> Tensor:
        if self.M is None:
            return matmul(self.G, X)
        Y = matmul(self.G, X - matmul(self.M, matmul(self.M.mT, X)))
        return Y - matmul(self.M, matmul(self.M.mT, Y))

    def dense(self) -> Tensor:
        if self.M is None:
            return self.G
        half = self.G - matmul(self.GM, self.M.mT)
        full = half - matmul(self.M, matmul(self.M.mT, half))
        return (full + full.mT) / 2


def _search(A: _Residual, goal: float) -> tuple[Tensor, Tensor] | None:
    """Ritz values and vectors that hold `goal` of A's trace; None where that takes too many of them.

    What the first k Ritz vectors capture is the sum of their Ritz values exactly, so both rules hold as they stand;
    only their number may exceed the smallest possible one.
    """
    d = A.G.shape[0]
    Q = A.G.new_zeros(d, 0)
    images: list[Tensor] = []
    width = _BLOCK
    while Q.shape[1] + width <= d // _GIVE_UP:
        key = derive_key("energy_directions/1", Q.shape[1])
        Y = A(rademacher((d, width), key=key, dtype=A.G.dtype, device=A.G.device))
        for last in (False, True):
            Y = Y - matmul(Q, matmul(Q.mT, Y))
            Y = orthonormalize(Y)
            if last:
                Y = orthonormalize(Y - matmul(Q, matmul(Q.mT, Y)))
            image = A(Y)
            Y = Y if last else image
        Q = torch.cat([Q, Y], dim=1)
        images.append(image)
        T = matmul(Q.mT, torch.cat(images, dim=1)).double()
        values, V = descending_eigh((T + T.mT) / 2)
        if float(values.sum()) >= goal:
            return values, matmul(Q, V.to(Q.dtype))
        width = Q.shape[1]
    return None


def _count(values: Tensor, goal: float, *, strict: bool) -> int:
    """How many of the descending eigenvalues: sum < goal (strict), or the fewest with sum >= goal."""
    sums = values.double().cumsum(0)
    before = sums if strict else sums - values
    noise = torch.finfo(torch.float32).eps * values[:1]  # the Gram matrix was summed in float32
    return int(((before < goal) & (values > noise)).sum())


def _clean(U: Tensor, M: Tensor | None) -> Tensor:
    """Orthonormal to rounding, and orthogonal to M, in float64."""
    U = U.double()
    if M is not None and M.shape[1]:
        M = M.double()
        U = U - M @ (M.mT @ U)
    return orthonormalize(U)
