"""The Flag Aggregator as a rule of a server.

Almasi et al., "Flag Aggregator: Scalable Distributed Training under Failures and Augmented Losses using Convex
Optimization", ICLR 2024, arXiv 2302.05865.  Equations and symbols: `subspace_lab.federated.flag`.

    w <- w + η Σ_i Y Yᵀ ĝ_i / r

η is ``server_lr`` times what `scheduler` makes of the learning rate: clients' updates enter by their directions ĝ_i
alone, and so the schedule is the server's.  All participants count equally.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.federated.flag import Variant, flag
from subspace_lab.methods.federated.base import FederatedMethod, Round


class Flag(FederatedMethod):
    """Updates projected onto the r-dimensional subspace that holds most of each of them.

    Args:
        r: dimension of the subspace; null: half of the participants and one half, rounded down.
        pairwise: λ, the weight of the differences of all pairs of updates.
        variant: paper: iteratively reweighted until nothing changes; release: a single step with equal weights, as the
            released code amounts to.
        server_lr: η, factor of the aggregated directions; 0.2 as in the released experiments on CIFAR-10.
    """

    name: ClassVar[str] = "flag"
    needs_each: ClassVar[bool] = True

    def __init__(
        self, r: int | None = None, pairwise: float = 0.0, variant: Variant = "paper", server_lr: float = 0.2
    ) -> None:
        if r is not None and r < 1:
            raise UserError(f"method.r={r}: expected a positive dimension, or null for half of the participants")
        if pairwise < 0:
            raise UserError(f"method.pairwise={pairwise}: expected 0 or a positive number")
        super().__init__(server_lr)
        self.r, self.pairwise, self.variant = r, pairwise, variant

    @override
    def check(self, participants: int) -> None:
        if self.r is not None and self.r > participants:
            raise UserError(
                f"method.r={self.r}: {participants} participants span no more than {participants} dimensions",
                hint=f"null takes {(participants + 1) // 2}",
            )

    @override
    def aggregate(self, updates: Tensor, weights: Tensor, parts: Sequence[slice], about: Round) -> Tensor:
        return about.lr_scale * flag(updates, self.r, self.pairwise, self.variant)
