"""The Flag Aggregator: project the clients' updates onto the subspace that holds most of each of them.

Almasi, Mishra, Vamanan & Ravi, "Flag Aggregator: Scalable Distributed Training under Failures and Augmented Losses
using Convex Optimization", ICLR 2024, arXiv 2302.05865; released code hamidralmasi/FlagAggregator.  A client counts by
the share v_i of its update that the subspace reconstructs, not by its length:

    ĝ_i = g_i / |g_i|,   Yᵀ Y = I_r,   v_i = |Yᵀ ĝ_i|²,   v_ij = |Yᵀ (ĝ_i − ĝ_j)|² / |ĝ_i − ĝ_j|²
    min_Y  Σ_i √(1 − v_i)  +  λ / (p (p − 1)) Σ_{i≠j} √(1 − v_ij)
    IRLS:  Y <- the r leading left singular vectors of [a_i ĝ_i, b_ij (ĝ_i − ĝ_j) / |ĝ_i − ĝ_j|],
           a_i² = (1 − v_i + 1e-7)^(−1/2),   b_ij² = λ / (p (p − 1)) (1 − v_ij + 1e-7)^(−1/2)
    g = Σ_i Y Yᵀ ĝ_i / r

==========  ==================================================================================================
symbol      here
==========  ==================================================================================================
g_i         rows of ``updates`` (p, n)
r           ``r``; half of the clients and one half, as released (8 of 15)
λ           ``pairwise``
K           ``gram`` of the ĝ_i (p, p); with ĝ = B K^½ and BᵀB = I, Y = B W and all above is said of W (p, r)
c           g = Σ c_i g_i: the updates, of size n, are read twice, for K and for this sum
==========  ==================================================================================================

The lengths of the updates are gone from g, whose own lies between 0 and p / r; hence the server's learning rate.
Updates are w_c − w here and gradients in the paper: g changes its sign with all of them, and nothing else does.

``variant="release"`` does what the released code amounts to.  It takes a single step from a random Y, of which every
client holds the share r / n, next to nothing: all weights are 1 to the fourth digit and Y are the leading singular
vectors of the ĝ_i as they are.  Its pairs are not normalised, and their weight λ / (p (p − 1)) multiplies vectors, not
squares.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from subspace_lab.federated.robust import gram, over_columns
from subspace_lab.linalg.svd import descending_eigh

Variant = Literal["paper", "release"]
_EPS = 1e-7  # keeps weights finite; as released
_CONVERGED = 1e-10  # of the objective, from one iteration to the next; as released
_ITERATIONS = 200


def flag(updates: Tensor, r: int | None = None, pairwise: float = 0.0, variant: Variant = "paper") -> Tensor:
    """Aggregate updates by their common subspace.

    Args:
        updates: (p, n); rows that are not finite are left out, and so are zeros.
        r: dimension of the subspace, 1 … p; None: (p + 1) / 2, rounded down.
        pairwise: λ ≥ 0, the weight of the differences of all pairs.
        variant: paper: iterated until nothing changes; release: see the module.

    Returns:
        (n,), whatever the lengths of the updates.

    Raises:
        ValueError: r is not in 1 … p.
    """
    p = len(updates)
    r = (p + 1) // 2 if r is None else r
    if not 1 <= r <= p:
        raise ValueError(f"r={r}: expected 1 to {p}, the number of updates")
    c = flag_coefficients(gram(updates).cpu(), r, pairwise, variant)
    used = c.nonzero().flatten().tolist()
    weights = c[used].to(updates.device, updates.dtype)
    return over_columns(updates, lambda block: weights @ (block if len(used) == p else block[used]))


def flag_coefficients(gram: Tensor, r: int, pairwise: float = 0.0, variant: Variant = "paper") -> Tensor:
    """Factors c (p,) of the updates: Σ_i Y Yᵀ ĝ_i / r = Σ_i c_i g_i.

    Args:
        gram: inner products of the updates (p, p), float64.
        r: dimension of Y.
        pairwise: λ.
        variant: as in `flag`.

    Returns:
        float64; 0 for updates that are zero or not finite.
    """
    lengths = gram.diagonal().sqrt()
    usable = lengths.isfinite() & (lengths > 0)
    inverse = torch.where(usable, 1 / lengths, 0.0)
    K = torch.where(usable[:, None] & usable, gram, 0.0) * inverse[:, None] * inverse
    values, vectors = descending_eigh(K)
    root = (vectors * values.sqrt()) @ vectors.T
    # On the null space of K the inverse root is anything; nothing of Y lies there.
    real = values > values[0] * len(K) * torch.finfo(K.dtype).eps
    back = (vectors * torch.where(real, values, torch.inf).rsqrt()) @ vectors.T
    W = _subspace(K, root, r, pairwise, variant)
    return (back @ (W @ (W.T @ root.sum(dim=1)))) * inverse / r


def _subspace(K: Tensor, root: Tensor, r: int, pairwise: float, variant: Variant) -> Tensor:
    """W (p, r), orthonormal, of the subspace Y = B W."""
    p = len(K)
    share = pairwise / (p * (p - 1)) if p > 1 else 0.0
    apart = _distances(K)
    if variant == "release":
        return _leading(root, torch.ones(p).to(K), torch.full_like(K, share**2), r)
    inverse = torch.where(apart > 0, 1 / apart, 0.0)
    W = _leading(root, torch.ones(p).to(K), share * inverse, r)
    before = torch.inf
    for _ in range(_ITERATIONS):
        Z = W.T @ root
        lost = (1 - Z.square().sum(dim=0)).clamp_min(0) + _EPS
        lost_pairs = (1 - _distances(Z.T @ Z) * inverse).clamp_min(0) + _EPS
        objective = float(lost.sqrt().sum() + share * (lost_pairs.sqrt() * (apart > 0)).sum())
        if before - objective <= _CONVERGED:
            break
        before = objective
        W = _leading(root, lost.rsqrt(), share * inverse * lost_pairs.rsqrt(), r)
    return W


def _leading(root: Tensor, singles: Tensor, pairs: Tensor, r: int) -> Tensor:
    """The r leading eigenvectors of K^½ (Σ_i a_i² e_i e_iᵀ + Σ_{i≠j} b_ij² (e_i − e_j)(e_i − e_j)ᵀ) K^½."""
    pairs = pairs - pairs.diagonal().diag()
    inner = (singles + 2 * pairs.sum(dim=1)).diag() - 2 * pairs
    return descending_eigh(root @ inner @ root)[1][:, :r]


def _distances(G: Tensor) -> Tensor:
    """Squared distances (p, p) of vectors with inner products G; what is rounding is 0."""
    lengths = G.diagonal()
    squares = lengths[:, None] + lengths - 2 * G
    return torch.where(squares > 1e-12, squares, 0.0)
