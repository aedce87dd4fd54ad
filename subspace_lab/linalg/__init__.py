"""Stateless, batched, device-resident kernels on plain tensors."""

from __future__ import annotations

from subspace_lab.linalg.angles import overlap, principal_angles
from subspace_lab.linalg.orthonormalize import orthonormalize
from subspace_lab.linalg.precision import largest_entry
from subspace_lab.linalg.projection import (
    energy_rank,
    extend_basis,
    lift_span,
    project_complement,
    project_span,
)
from subspace_lab.linalg.random import derive_key, rademacher, random_bits, uniform
from subspace_lab.linalg.svd import (
    align_signs,
    captured_energy,
    gram_eigh,
    randomized_svd,
    subspace_iteration,
    truncated_svd,
)

__all__ = [
    "align_signs",
    "captured_energy",
    "derive_key",
    "energy_rank",
    "extend_basis",
    "gram_eigh",
    "largest_entry",
    "lift_span",
    "orthonormalize",
    "overlap",
    "principal_angles",
    "project_complement",
    "project_span",
    "rademacher",
    "random_bits",
    "randomized_svd",
    "subspace_iteration",
    "truncated_svd",
    "uniform",
]
