"""One descent step from three k x k Gram matrices: where a step ends is S P + m Q, and only P and Q have to be found.

For a point S (n, k) and a direction m (n, k) whose tangent part is followed, SᵀS, Sᵀm and mᵀm decide everything: the
tangent part G = m + S g, the retraction of S − t G, its orthonormality, and the momentum carried to where it ends. The
tall matrices are read once for the Gram matrices and once for the result; there is no tall SVD or QR. All in float64,
batched over (...), and on a GPU by matrix products alone (but for the Stiefel geodesic's exponential).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from subspace_lab.manifolds.base import Retraction, inverse_sqrt

Kind = Literal["grassmann", "stiefel", "sphere"]

# cos and sinc of angles up to 2^8 · 0.5 = 128 rad from eight doublings of a series that is exact below 0.5 rad; longer
# arcs, which only a diverging run takes, are cut.
_DOUBLINGS = 8
_LONGEST = 100.0


@dataclass(frozen=True)
class Grams:
    """What a step looks at, float64 (..., k, k): SᵀS, Sᵀm and mᵀm."""

    SS: Tensor
    Sm: Tensor
    mm: Tensor

    def tangent(self, kind: Kind) -> Tensor:
        """Coefficients g (..., k, k) of the tangent part G = m + S g of m."""
        return -self.Sm if kind != "stiefel" else -0.5 * (self.Sm + self.Sm.mT)

    def inner(self, left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> Tensor:
        """(S a + m b)ᵀ (S c + m d) for left = (a, b), right = (c, d)."""
        (a, b), (c, d) = left, right
        return a.mT @ (self.SS @ c + self.Sm @ d) + b.mT @ (self.Sm.mT @ c + self.mm @ d)


def step(kind: Kind, grams: Grams, t: float, method: Retraction) -> tuple[Tensor, Tensor]:
    """P, Q (..., k, k) such that S P + m Q is where the step −t G from S ends.

    Args:
        kind: the manifold; a sphere is k = 1.
        grams: of S and m.
        t: length factor (the learning rate).
        method: as in `Grassmann.retract` and `Stiefel.retract`. Of the Grassmannian's, all three reach their
            subspace with the basis that is continuous in t: no signs flip.

    Raises:
        ValueError: unknown method.
    """
    identity = torch.eye(grams.SS.shape[-1], dtype=grams.SS.dtype, device=grams.SS.device).expand_as(grams.SS)
    a, b = -t * grams.tangent(kind), -t * identity  # the step V = S a + m b
    if method == "geodesic":
        return _geodesic(kind, grams, a, b, identity)
    X = (identity + a, b)
    gram = grams.inner(X, X)
    if method == "polar":
        R = inverse_sqrt(gram)
    elif method == "qr":
        factor, _ = torch.linalg.cholesky_ex(gram, check_errors=False)
        R = torch.linalg.solve_triangular(factor, identity, upper=False).mT
    else:
        raise ValueError(f"unknown retraction {method!r}, expected polar, qr or geodesic")
    return X[0] @ R, X[1] @ R


def transport(kind: Kind, grams: Grams, P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor]:
    """P', Q' such that S P' + m Q' is G projected to the tangent space where the step (P, Q) ended."""
    identity = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device).expand_as(P)
    G = (grams.tangent(kind), identity)
    inner = grams.inner((P, Q), G)
    if kind == "stiefel":
        inner = 0.5 * (inner + inner.mT)
    return G[0] - P @ inner, identity - Q @ inner


def _geodesic(kind: Kind, grams: Grams, a: Tensor, b: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    squares = grams.inner((a, b), (a, b))
    longest = squares.diagonal(dim1=-2, dim2=-1).sum(-1).clamp_min(0).sqrt()[..., None, None]
    cut = (_LONGEST / longest.clamp_min(1e-300)).clamp_max(1.0)
    a, b, squares = a * cut, b * cut, squares * cut.square()
    if kind == "stiefel":
        P, Q = _stiefel_geodesic(grams, a, b, squares, identity)
    else:
        cosine, sinc = cos_sinc(squares)
        P, Q = cosine + a @ sinc, b @ sinc
    # One Newton-Schulz step on the k x k side, or float32's errors in S add up over thousands of steps.
    correction = 1.5 * identity - 0.5 * grams.inner((P, Q), (P, Q))
    return P @ correction, Q @ correction


def _stiefel_geodesic(grams: Grams, a: Tensor, b: Tensor, B: Tensor, identity: Tensor) -> tuple[Tensor, Tensor]:
    """[S, V] exp([[A, −B], [I, A]]) [I; 0] exp(−A) with A = SᵀV, B = VᵀV (Edelman et al. 1998, eq. 2.7)."""
    k = B.shape[-1]
    inner = grams.SS @ a + grams.Sm @ b
    A = 0.5 * (inner - inner.mT)
    block = torch.cat([torch.cat([A, -B], dim=-1), torch.cat([identity, A], dim=-1)], dim=-2)
    factor = torch.linalg.matrix_exp(block)[..., :k] @ torch.linalg.matrix_exp(-A)
    return factor[..., :k, :] + a @ factor[..., k:, :], b @ factor[..., k:, :]


def cos_sinc(squares: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos √X and sin √X / √X of symmetric X (..., k, k) with eigenvalues in [0, 10⁴].

    Both are entire functions of X: nothing is divided by a small angle. On the CPU they come from eigenvectors;
    elsewhere, where torch.linalg.eigh would wait for the host, from a series and `_DOUBLINGS` doublings.
    """
    if squares.device.type == "cpu":
        finite = torch.isfinite(squares).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
        values, vectors = torch.linalg.eigh(torch.where(finite, squares, 0))  # eigh raises on NaN
        angles = values.clamp_min(0).sqrt().unsqueeze(-2)
        nan = torch.where(finite, 0.0, float("nan"))
        return (vectors * angles.cos()) @ vectors.mT + nan, (vectors * torch.sinc(angles / torch.pi)) @ vectors.mT + nan
    return cos_sinc_series(squares)


def cos_sinc_series(squares: Tensor) -> tuple[Tensor, Tensor]:
    """The same by matrix products alone. Doubling works on 1 − cos, which loses no digits of small angles."""
    identity = torch.eye(squares.shape[-1], dtype=squares.dtype, device=squares.device).expand_as(squares)
    X = squares / 4.0**_DOUBLINGS
    versine, sinc = torch.zeros_like(X), torch.zeros_like(X)
    for j in range(9, 0, -1):  # Horner: 1 − cos = Σ (−1)^(j+1) X^j / (2j)!, sinc = Σ (−1)^j X^j / (2j+1)!
        versine = (identity - versine) @ X / ((2 * j - 1) * (2 * j))
        sinc = (identity - sinc) @ X / (2 * j * (2 * j + 1))
    sinc = identity - sinc
    for _ in range(_DOUBLINGS):
        sinc = sinc @ (identity - versine)  # sin 2θ / 2θ = (sin θ / θ) cos θ
        versine = 4 * versine - 2 * versine @ versine  # 1 − cos 2θ = 2 (1 − cos² θ)
    return identity - versine, sinc
