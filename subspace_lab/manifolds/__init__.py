"""Grassmann, Stiefel and sphere manifolds: tangent projection, retraction, transport."""

from __future__ import annotations

from subspace_lab.manifolds.base import Manifold, Retraction, inverse_sqrt
from subspace_lab.manifolds.grassmann import Grassmann
from subspace_lab.manifolds.sphere import Sphere
from subspace_lab.manifolds.stiefel import Stiefel

__all__ = ["Grassmann", "Manifold", "Retraction", "Sphere", "Stiefel", "inverse_sqrt"]
