"""The equations of the spectral merging methods in NumPy, one matrix at a time, everything formed in full, float64.

Iso-C and Iso-CTS: arXiv 2502.04959.  TSV-M: arXiv 2412.00081.  OPCM: arXiv 2501.09522.  KnOTS: arXiv 2410.19735.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


def polar(X: Matrix) -> Matrix:
    U, _, Vh = np.linalg.svd(X, full_matrices=False)
    found: Matrix = U @ Vh
    return found


def iso_c(D: Sequence[Matrix]) -> Matrix:
    U, S, Vh = np.linalg.svd(np.sum(D, axis=0), full_matrices=False)
    found: Matrix = U @ np.diag(np.full_like(S, S.mean())) @ Vh
    return found


def iso_cts(D: Sequence[Matrix], fraction: float) -> Matrix:
    total, T = np.sum(D, axis=0), len(D)
    r = min(total.shape)
    q = round((r - int(r * fraction)) / T)
    k = r - T * q
    U, S, Vh = np.linalg.svd(total, full_matrices=False)
    U_c, S_c, V_c = U[:, :k], S[:k], Vh[:k].T
    left, values, right = [], [], []
    for D_t in D:
        U, S, Vh = np.linalg.svd(D_t - U_c @ U_c.T @ D_t, full_matrices=False)
        left.append(U[:, :q])
        values.append(S[:q])
        right.append(Vh[:q].T)
    sigma = np.concatenate([*values, S_c]).mean()
    found: Matrix = sigma * polar(np.hstack([*left, U_c])) @ polar(np.hstack([*right, V_c])).T
    return found


def tsv_merge(D: Sequence[Matrix]) -> Matrix:
    left, values, right = [], [], []
    for D_t in D:
        U, S, Vh = np.linalg.svd(D_t, full_matrices=False)
        q = len(S) // len(D)
        left.append(U[:, :q])
        values.append(S[:q])
        right.append(Vh[:q].T)
    found: Matrix = polar(np.hstack(left)) @ np.diag(np.concatenate(values)) @ polar(np.hstack(right)).T
    return found


def opcm(D: Sequence[dict[str, Matrix]], alpha: float, zero_diagonal: bool) -> dict[str, Matrix]:
    """All tensors together, with λ at every step; those that are not two-dimensional are added."""

    def norm(tensors: dict[str, Matrix]) -> float:
        return float(np.sqrt(sum((X**2).sum() for X in tensors.values())))

    M, lam, norms = dict(D[0]), 1.0, [norm(D[0])]
    for D_t in D[1:]:
        norms.append(norm(D_t))
        N = {}
        for name, X in D_t.items():
            if X.ndim == 2:
                U, S, Vh = np.linalg.svd(M[name], full_matrices=True)
                above = np.cumsum(S) / S.sum() > alpha
                s = int(np.argmax(above)) if alpha < 1 else len(S)
                P = U.T @ X @ Vh.T
                if zero_diagonal:
                    np.fill_diagonal(P, 0)
                P[:s, :s] = 0
                X = U @ P @ Vh
            N[name] = lam * M[name] + X
        lam = norm(N) / float(np.mean(norms))
        M = {name: X / lam for name, X in N.items()}
    return M


def knots(D: Sequence[Matrix], density: float | None) -> Matrix:
    """KnOTS with TIES of this density, or with the sum (None)."""
    U, S, Vh = np.linalg.svd(np.hstack(D), full_matrices=False)
    U, S, Vh = U[:, S > 1e-5], S[S > 1e-5], Vh[S > 1e-5]
    Z = [np.diag(S) @ V for V in np.split(Vh, len(D), axis=1)]
    if density is None:
        found: Matrix = U @ np.sum(Z, axis=0)
        return found
    kept = []
    for Z_t in Z:
        bound = np.sort(np.abs(Z_t), axis=None)[-int(density * Z_t.size)]
        kept.append(np.where(np.abs(Z_t) >= bound, Z_t, 0))
    sign = np.sign(np.sum(kept, axis=0))
    agree = [np.where(np.sign(Z_t) == sign, Z_t, 0) for Z_t in kept]
    count = np.sum([X != 0 for X in agree], axis=0)
    found = U @ (np.sum(agree, axis=0) / np.maximum(count, 1))
    return found
