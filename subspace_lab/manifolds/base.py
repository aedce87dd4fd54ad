"""What a manifold optimizer needs to know about a manifold, and the algebra the matrix manifolds share."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from subspace_lab.linalg.orthonormalize import orthonormalize
from subspace_lab.linalg.precision import full_precision, matmul, upcast
from subspace_lab.linalg.random import Key, uniform

Retraction = Literal["polar", "qr", "geodesic"]

# Newton-Schulz steps of `inverse_sqrt`: the first ones enlarge an eigenvalue x of the scaled matrix by 2.25
# each, the last five converge. 25 reach full accuracy from x = 5e-8, that is from retraction steps of
# spectral norm 4000.
_NEWTON_SCHULZ_STEPS = 25


class Manifold(Protocol):
    """A stateless manifold of matrices S (..., n, k), batched over the leading dimensions.

    All methods compute in float32 (float64 if S is) and broadcast over the batch.
    """

    def tangent(self, S: Tensor, G: Tensor) -> Tensor:
        """Orthogonal projection of an ambient direction G (..., n, k) to the tangent space at S."""
        ...

    def retract(self, S: Tensor, V: Tensor, method: Retraction = "polar") -> Tensor:
        """Point reached from S along the tangent vector V; equals S + V up to O(‖V‖²)."""
        ...

    def transport(self, S: Tensor, V: Tensor, S_new: Tensor) -> Tensor:
        """Move a tangent vector V from S to S_new by projection."""
        ...

    def random(
        self,
        shape: tuple[int, ...],
        key: Key,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """A point that depends only on shape and key, the same on every device (to rounding)."""
        ...

    def check(self, S: Tensor) -> Tensor:
        """Distance (...) of S from the manifold, as the largest violated constraint; a device tensor."""
        ...


def check_method(method: str) -> None:
    """Raise ValueError for an unknown retraction."""
    if method not in get_args(Retraction):
        raise ValueError(f"unknown retraction {method!r}, expected one of {', '.join(get_args(Retraction))}")


def inverse_sqrt(G: Tensor, method: Literal["auto", "eigh", "newton_schulz"] = "auto") -> Tensor:
    """G^(-1/2) of symmetric positive definite G (..., k, k), computed in float64.

    ``auto`` is an eigendecomposition on the CPU and the coupled Newton-Schulz iteration (Higham, Functions of
    Matrices, eq. 6.35) elsewhere: torch.linalg.eigh reads LAPACK's status back, which would synchronise in
    every optimizer step.
    """
    X = G.double()
    if method == "eigh" or (method == "auto" and G.device.type == "cpu"):
        # NaN must come out as NaN; eigh would raise.
        finite = torch.isfinite(X).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
        identity = torch.eye(G.shape[-1], dtype=X.dtype, device=X.device)
        values, vectors = torch.linalg.eigh(torch.where(finite, X, identity))
        root = (vectors * values.rsqrt().unsqueeze(-2)) @ vectors.mT
        return torch.where(finite, root, torch.full_like(root, float("nan"))).to(G.dtype)
    # The largest absolute row sum bounds the largest eigenvalue, so the spectrum of Y lies in (0, 1].
    bound = X.abs().sum(dim=-1).amax(dim=-1)[..., None, None]
    identity = torch.eye(G.shape[-1], dtype=X.dtype, device=X.device)
    Y, Z = X / bound, identity.expand_as(X)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        T = 1.5 * identity - 0.5 * (Z @ Y)
        Y, Z = Y @ T, T @ Z
    return (Z / bound.sqrt()).to(G.dtype)


class OrthonormalColumns:
    """What the Stiefel and the Grassmann manifold share: points are S (..., n, k) with SᵀS = I."""

    @full_precision
    def random(
        self,
        shape: tuple[int, ...],
        key: Key,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Orthonormal columns (*shape) of a centred uniform matrix.

        Nearly but not exactly Haar distributed (the entries are uniform, not normal). A tensor of keys puts
        its own dimensions in front of ``shape``.
        """
        return orthonormalize(uniform(shape, key=key, dtype=dtype, device=device) - 0.5)

    @full_precision
    def check(self, S: Tensor) -> Tensor:
        """Largest |SᵀS - I| (...)."""
        S = upcast(S)
        gram = matmul(S.mT, S)
        return (gram - torch.eye(S.shape[-1], dtype=S.dtype, device=S.device)).abs().amax(dim=(-2, -1))


def polar(X: Tensor) -> Tensor:
    """Nearest matrix with orthonormal columns, X (XᵀX)^(-1/2), through the k x k Gram form.

    In float64 throughout: the Gram form squares the condition number, and a float32 step of length 100 would
    otherwise leave an orthonormality error of 1e-4.
    """
    wide = X.double()
    S = (wide @ inverse_sqrt(wide.mT @ wide)).to(X.dtype)
    return polish(S) if X.dtype == torch.float64 else S  # float64 has no higher precision to hide the square in


def polish(S: Tensor) -> Tensor:
    """One Newton-Schulz step S (3 I - SᵀS) / 2: squares a small orthonormality error.

    A bare geodesic drifts (about 5e-5 after 1000 float32 steps); with this step it stays at rounding.
    """
    return 1.5 * S - 0.5 * matmul(S, matmul(S.mT, S))
