"""Subspaces: how directions are chosen, refreshed and stored; project and lift."""

from subspace_lab.subspaces.base import Subspace
from subspace_lab.subspaces.blind import Identity, Random
from subspace_lab.subspaces.complement import Complement
from subspace_lab.subspaces.randomized import Randomized
from subspace_lab.subspaces.span import SVD, Span
from subspace_lab.subspaces.tangent import Tangent

__all__ = ["SVD", "Complement", "Identity", "Random", "Randomized", "Span", "Subspace", "Tangent"]
