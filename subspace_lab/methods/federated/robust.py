"""Rules of a server that survive f clients who send anything: Krum, median, trimmed mean and Bulyan.

Papers, equations and symbols: `subspace_lab.federated.robust`.  All participants count equally: a number of examples
would be what clients say of themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.federated import robust
from subspace_lab.methods.federated.base import FederatedMethod, Round


class RobustMethod(FederatedMethod):
    """A rule for p participants of which f may send anything.

    Args:
        f: participants in a round that may send anything, as the server believes; how many there are
            (``federation.byzantine``) it does not know.
        server_lr: factor of the aggregated update.

    Attributes:
        needs: participants that the rule needs for each f, and besides.
    """

    needs_each: ClassVar[bool] = True
    needs: ClassVar[tuple[int, int]]

    def __init__(self, f: int = 1, server_lr: float = 1.0) -> None:
        if f < 0:
            raise UserError(f"method.f={f}: expected 0 or a positive number of clients")
        super().__init__(server_lr)
        self.f = f

    @override
    def check(self, participants: int) -> None:
        each, besides = self.needs
        if participants < each * self.f + besides:
            most = (participants - besides) // each
            raise UserError(
                f"method.f={self.f}: {self.name} needs at least {each} f + {besides} = {each * self.f + besides} "
                f"participants in a round, and there are {participants}",
                hint=f"f={most} is the most" if most >= 0 else "more clients or a larger federation.participation",
            )


class Krum(RobustMethod):
    """The update that is nearest to most others; or the mean of the m best of them (Multi-Krum).

    Args:
        f: as in `RobustMethod`; p ≥ 2 f + 3.
        m: updates to average, at most p − f − 2; null: that many.
        server_lr: factor of the aggregated update.
    """

    name: ClassVar[str] = "krum"
    needs: ClassVar[tuple[int, int]] = (2, 3)

    def __init__(self, f: int = 1, m: int | None = 1, server_lr: float = 1.0) -> None:
        if m is not None and m < 1:
            raise UserError(f"method.m={m}: expected a positive number of updates, or null")
        super().__init__(f, server_lr)
        self.m = m

    @override
    def check(self, participants: int) -> None:
        super().check(participants)
        most = participants - self.f - 2
        if self.m is not None and self.m > most:
            raise UserError(
                f"method.m={self.m}: with {participants} participants and f={self.f} at most {most} can be averaged",
                hint="m=null takes as many",
            )

    @override
    def aggregate(self, updates: Tensor, weights: Tensor, parts: Sequence[slice], about: Round) -> Tensor:
        return robust.krum(updates, self.f, self.m)


class Median(FederatedMethod):
    """The median of each coordinate: right as long as more than half of the participants are."""

    name: ClassVar[str] = "median"
    needs_each: ClassVar[bool] = True

    @override
    def aggregate(self, updates: Tensor, weights: Tensor, parts: Sequence[slice], about: Round) -> Tensor:
        return robust.median(updates)


class TrimmedMean(RobustMethod):
    """The mean of each coordinate without its f largest and f smallest values; p > 2 f."""

    name: ClassVar[str] = "trimmed_mean"
    needs: ClassVar[tuple[int, int]] = (2, 1)

    @override
    def aggregate(self, updates: Tensor, weights: Tensor, parts: Sequence[slice], about: Round) -> Tensor:
        return robust.trimmed_mean(updates, self.f)


class Bulyan(RobustMethod):
    """Krum's choice p − 2 f times, of each coordinate the mean of those values nearest to the median; p ≥ 4 f + 3."""

    name: ClassVar[str] = "bulyan"
    needs: ClassVar[tuple[int, int]] = (4, 3)

    @override
    def aggregate(self, updates: Tensor, weights: Tensor, parts: Sequence[slice], about: Round) -> Tensor:
        return robust.bulyan(updates, self.f)
