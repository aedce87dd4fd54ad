"""DARE: drop entries of the task vectors at random and make up for them (Yu et al., ICML 2024, arXiv 2311.03099).

D'_t = (1 − M_t) ∘ D_t / (1 − p) with M_t ~ Bernoulli(p) (eq. 1 and 2);  W = W0 + λ Σ_t D'_t.  The expectation of D'_t
is D_t.  mergekit makes up differently (`rescale=l1`): a tensor's kept entries get the L1 norm that all of them had.

Which entries are dropped depends on the seed, the model's number, the tensor's name and the entry's index alone: not on
device, order, or how tensors are cut.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.linalg.random_words import bernoulli
from subspace_lab.merging.base import Merge, Stack
from subspace_lab.merging.sources import Sources
from subspace_lab.merging.stacks import flat_stacks


class DARE(Merge):
    """Task arithmetic of randomly thinned task vectors.

    Args:
        scale: λ.
        p: share of the entries that is dropped.
        rescale: probability: kept entries are divided by 1 − p (the paper); l1: each tensor's L1 norm is kept
            (mergekit).
        seed: of the draws.

    Raises:
        UserError: p is not in [0, 1).
    """

    elementwise: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True

    def __init__(
        self,
        scale: float = 0.3,
        p: float = 0.5,
        rescale: Literal["probability", "l1"] = "probability",
        seed: int = 0,
    ) -> None:
        if not 0 <= p < 1:
            raise UserError(f"method.p must be at least 0 and below 1, got {p}")
        super().__init__(scale)
        self.p, self.rescale, self.seed = p, rescale, seed
        self._factors: dict[str, list[float]] = {}

    @override
    def survey(self, sources: Sources) -> None:
        self._factors = {}
        if self.rescale == "probability":
            return
        names = list(sources.infos())
        before, after = (
            {name: torch.zeros(sources.models, dtype=torch.float64, device=sources.device) for name in names}
            for _ in range(2)
        )
        for stack in flat_stacks(sources):
            name = stack.names[0]
            for t, D in enumerate(stack.deltas()):
                magnitudes = D.abs_()
                before[name][t] += magnitudes.sum(dtype=torch.float64)
                after[name][t] += self._thin(magnitudes, t, name, stack.start).sum(dtype=torch.float64)
        for name in names:
            # Nothing kept: nothing to scale.
            ratio = torch.where(after[name] > 0, before[name] / after[name], 1.0)
            self._factors[name] = [float(one) for one in ratio.tolist()]

    @override
    def update(self, stack: Stack) -> Tensor:
        U: Tensor | None = None
        for t, D in enumerate(stack.deltas()):
            for name, row in zip(stack.names, D, strict=True):
                self._thin(row, t, name, stack.start)
                row.mul_(self._factors[name][t] if self._factors else 1 / (1 - self.p))
            U = D if U is None else U.add_(D)
        assert U is not None
        return U

    def _thin(self, values: Tensor, t: int, name: str, start: int) -> Tensor:
        """Drop entries of one tensor, or of a piece that begins at entry `start`, in place."""
        if self.p == 0:
            return values
        dropped = bernoulli(derive_key("dare", self.seed, t, name), start, values.numel(), self.p, values.device)
        return values.mul_(~dropped.view(values.shape))
