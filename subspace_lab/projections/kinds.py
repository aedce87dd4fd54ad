"""The families by name."""

from __future__ import annotations

from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.projections.base import Projection
from subspace_lab.projections.blocked import Fastfood, FastfoodBlocked, Orthoblock
from subspace_lab.projections.dense import Dense, Gaussian
from subspace_lab.projections.kronecker import Kronecker
from subspace_lab.projections.one_hot import OneHot
from subspace_lab.projections.sparse import Sparse

_FAMILIES: dict[str, type[Projection]] = {
    family.name: family
    for family in (Orthoblock, Fastfood, FastfoodBlocked, Dense, Gaussian, Sparse, OneHot, Kronecker)
}

KINDS: tuple[str, ...] = tuple(_FAMILIES)


def create(name: str, *, D: int, d: int, seed: int, d_max: int | None = None) -> Projection:
    """Make the projection `name` (one of `KINDS`).

    Args:
        name: family.
        D: rows.
        d: columns, 1 <= d <= d_max.
        seed: any integer.
        d_max: columns of the nested family, at most D; default d.

    Raises:
        UserError: unknown name, or sizes out of range.
    """
    if name not in _FAMILIES:
        raise UserError(
            f"unknown projection {name!r}, expected {', '.join(KINDS)}", hint=did_you_mean(name, KINDS) or None
        )
    return _FAMILIES[name](D=D, d=d, seed=seed, d_max=d_max)
