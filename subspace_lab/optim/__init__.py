"""Optimizers inside subspaces."""

from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer

__all__ = ["SubspaceOptimizer"]
