"""Products of unit spheres: every column of S is a unit vector."""

from __future__ import annotations

import torch
from torch import Tensor

from subspace_lab.linalg.precision import full_precision, upcast
from subspace_lab.linalg.random import Key, uniform
from subspace_lab.manifolds.base import Retraction, check_method


class Sphere:
    """Points S (..., n, k) whose k columns are unit vectors of R^n, each on its own sphere.

    Unit vectors lie along the second last dimension, as on the other manifolds; use ``S.mT`` for unit rows.
    """

    def tangent(self, S: Tensor, G: Tensor) -> Tensor:
        """Tangent part g - s (s·g) of every column."""
        S = upcast(S)
        G = G.to(S.dtype)
        return G - S * (S * G).sum(dim=-2, keepdim=True)

    @full_precision
    def retract(self, S: Tensor, V: Tensor, method: Retraction = "polar") -> Tensor:
        """Move from S along the tangent V (both (..., n, k)); nothing synchronises.

        ``polar`` and ``qr`` both normalise S + V (they coincide for single columns); ``geodesic`` follows the
        great circle, cos(‖v‖) s + sin(‖v‖) v / ‖v‖, and normalises against drift.
        """
        check_method(method)
        S = upcast(S)
        V = V.to(S.dtype)
        if method == "geodesic":
            angle = V.norm(dim=-2, keepdim=True)
            X = S * angle.cos() + V * torch.sinc(angle / torch.pi)
        else:
            X = S + V
        return _normalize(X)

    def transport(self, S: Tensor, V: Tensor, S_new: Tensor) -> Tensor:
        """Projection transport: the tangent part of V at S_new."""
        return self.tangent(S_new, V)

    def random(
        self,
        shape: tuple[int, ...],
        key: Key,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """Normalised centred uniform columns: nearly but not exactly uniform on the sphere."""
        # Half a grid step off the centre, so that no column can be zero.
        X = uniform(shape, key=key, dtype=dtype, device=device) - (0.5 - 2.0**-25)
        return _normalize(X)

    def check(self, S: Tensor) -> Tensor:
        """Largest |‖s‖² - 1| over the columns (...)."""
        return (upcast(S).square().sum(dim=-2) - 1).abs().amax(dim=-1)


def _normalize(X: Tensor) -> Tensor:
    norm: Tensor = X.norm(dim=-2, keepdim=True)
    return X / norm
