"""Optimizers inside subspaces and on manifolds."""

from subspace_lab.optim.compound import Compound
from subspace_lab.optim.riemannian import RiemannianSGD
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer

__all__ = ["Compound", "RiemannianSGD", "SubspaceOptimizer"]
