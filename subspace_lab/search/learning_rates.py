"""Learning-rate factors as rungs of a ladder: every scan uses the same numbers, and so finds the same finished runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from subspace_lab.errors import UserError


class Ladder:
    """The configured factors and, beyond both ends, their continuation with the outermost ratio.

    Args:
        factors: positive, e.g. 1/3, 1, 3; sorted here.

    Raises:
        UserError: none at all, one twice, or one that is not positive.
    """

    def __init__(self, factors: Sequence[float]) -> None:
        ordered = sorted(factors)
        if not ordered or ordered[0] <= 0 or any(b <= a for a, b in pairwise(ordered)):
            raise UserError(
                f"protocol.lr_factors={list(factors)}: expected different positive numbers", hint="[0.333, 1, 3]"
            )
        self._factors = ordered

    @property
    def middle(self) -> int:
        """The rung around which a scan without a better guess lies."""
        return len(self._factors) // 2

    def factor(self, rung: int) -> float:
        """Return the factor of a rung, to four digits: 0 is the smallest configured one, -1 the one below."""
        factors, last = self._factors, len(self._factors) - 1
        if rung < 0:
            value = factors[0] * (factors[0] / factors[1]) ** -rung
        elif rung > last:
            value = factors[last] * (factors[last] / factors[last - 1]) ** (rung - last)
        else:
            value = factors[rung]
        return float(f"{value:.4g}")

    def scan(self, centre: int) -> list[int]:
        """Return as many neighbouring rungs as there are configured factors, `centre` in their middle."""
        first = centre - self.middle
        return list(range(first, first + len(self._factors)))

    def beyond(self, scores: Mapping[int, float]) -> int | None:
        """Return the rung to try after a scan whose best is at an edge; None: it is inside, or there is no scan.

        Args:
            scores: rung -> validation score.
        """
        if len(self._factors) < 2:
            return None
        best = self.best(scores)
        if best == max(scores):
            return best + 1
        return best - 1 if best == min(scores) else None

    @staticmethod
    def best(scores: Mapping[int, float]) -> int:
        """Return the rung with the highest score; of equals the one nearest to the middle of those tried."""
        middle = (min(scores) + max(scores)) / 2
        return min(scores, key=lambda rung: (-scores[rung], abs(rung - middle), rung))
