"""Fixed random maps R^d → R^D with unit columns, defined by integers and regenerated instead of stored.

`create` makes one by name; `apply` is its differentiable form. `per_layer` has the block-diagonal composite,
`distributed` the sharded products; `native`, where it is built, faster kernels with the same bits.
"""

from __future__ import annotations

from subspace_lab.projections.autograd import Lift, apply
from subspace_lab.projections.base import Projection
from subspace_lab.projections.kinds import KINDS, create
from subspace_lab.projections.per_layer import PerLayer

__all__ = ["KINDS", "Lift", "PerLayer", "Projection", "apply", "create"]
