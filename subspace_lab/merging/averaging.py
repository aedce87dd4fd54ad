"""The two sums that everything else is compared with: the average of the weights, and task arithmetic.

Average: W = 1/T Σ_t W_t (Wortsman et al., ICML 2022, arXiv 2203.05482, "uniform soup").
Task arithmetic: W = W0 + λ Σ_t (W_t − W0) (Ilharco et al., ICLR 2023, arXiv 2212.04089, eq. of §3); λ = 1/T is the
average, T = 1 with λ = 1 the fine-tuned model.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from subspace_lab.merging.base import Merge, Stack


class SimpleAverage(Merge):
    """Mean of the models; the base has no part in it."""

    scalable: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    elementwise: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True

    def __init__(self) -> None:
        super().__init__(1.0)

    @override
    def update(self, stack: Stack) -> Tensor:
        return stack.mean()


class TaskArithmetic(Merge):
    """Base plus λ times the sum of the task vectors.

    Args:
        scale: λ; 0.3 is what papers with eight tasks give where they validate nothing.
    """

    elementwise: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True

    def __init__(self, scale: float = 0.3) -> None:
        super().__init__(scale)

    @override
    def update(self, stack: Stack) -> Tensor:
        return stack.total()
