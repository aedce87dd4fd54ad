"""What the methods that decompose matrices share."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from typing_extensions import override

from subspace_lab.linalg.thin_svd import fallbacks
from subspace_lab.merging.base import Merge

if TYPE_CHECKING:
    from subspace_lab.merging.sources import Sources


class SpectralMerge(Merge):
    """A merge by singular value decompositions, whose failures in float32 it reports."""

    concurrent: ClassVar[bool] = True

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__(scale)
        self._before = fallbacks()

    @override
    def survey(self, sources: Sources) -> None:
        self._before = fallbacks()

    @override
    def metrics(self) -> dict[str, float]:
        return {f"svd_fallbacks_{step}": float(n - self._before[step]) for step, n in fallbacks().items()}
