"""SLERP: from one model to another along the arc between them, tensor by tensor (Shoemake, SIGGRAPH 1985).

With v_1, v_2 the flat weights of a tensor and θ the angle between them:
W = sin((1 − t) θ) / sin θ · v_1 + sin(t θ) / sin θ · v_2, and (1 − t) v_1 + t v_2 where |cos θ| > 0.9995 (as mergekit).
"""

from __future__ import annotations

import math
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging.base import Merge, Stack
from subspace_lab.merging.sources import Sources
from subspace_lab.merging.stacks import flat_stacks

_PARALLEL = 0.9995


class SLERP(Merge):
    """Spherical interpolation of two models; the base has no part in it.

    Args:
        t: 0 is the first model, 1 the second.

    Raises:
        UserError: t is not in [0, 1].
    """

    scalable: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    least: ClassVar[int] = 2
    most: ClassVar[int | None] = 2
    elementwise: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True

    def __init__(self, t: float = 0.5) -> None:
        if not 0 <= t <= 1:
            raise UserError(f"method.t must be between 0 and 1, got {t}")
        super().__init__(1.0)
        self.t = t
        self._shares: dict[str, tuple[float, float]] = {}
        self._arcs = 0

    @override
    def survey(self, sources: Sources) -> None:
        # <v1, v1>, <v2, v2>, <v1, v2> of every tensor, in float64: θ is read off a cosine close to 1.
        products = {name: torch.zeros(3, dtype=torch.float64, device=sources.device) for name in sources.infos()}
        for stack in flat_stacks(sources):
            a, b = (stack.tuned(model).view(-1).double() for model in (0, 1))
            products[stack.names[0]] += torch.stack([a.dot(a), b.dot(b), a.dot(b)])
        self._shares = {name: self._share(*found.tolist()) for name, found in products.items()}
        lines = (1 - self.t, self.t)
        self._arcs = sum(share != lines for share in self._shares.values())

    def _share(self, first: float, second: float, product: float) -> tuple[float, float]:
        lengths = math.sqrt(first * second)
        cos = product / lengths if lengths > 0 else 1.0
        if abs(cos) > _PARALLEL or self.t in (0, 1):
            return 1 - self.t, self.t
        angle = math.acos(cos)
        return math.sin((1 - self.t) * angle) / math.sin(angle), math.sin(self.t * angle) / math.sin(angle)

    @override
    def update(self, stack: Stack) -> Tensor:
        U = stack.tuned(0)
        for name, row, second in zip(stack.names, U, stack.tuned(1), strict=True):
            row.mul_(self._shares[name][0]).add_(second, alpha=self._shares[name][1])
        return U.sub_(stack.base())

    @override
    def metrics(self) -> dict[str, float]:
        return {"arcs": float(self._arcs), "lines": float(len(self._shares) - self._arcs)}
