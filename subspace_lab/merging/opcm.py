"""OPCM: models are merged one after the other, each outside the main directions of what is merged already.

Tang, Yang, Shen, Hu & Tao, "Merging Models on the Fly Without Retraining: A Sequential Approach to Scalable Continual
Model Merging", 2025, arXiv 2501.09522; released code tanganke/opcm.  M_1 = D_1, λ_1 = 1, and for t > 1, of a matrix:

    M_{t−1} = U diag(S) Vᵀ,   s = how many singular values sum up to a share α of all of them
    P_t     = U^T D_t V without its diagonal and its first s × s block,     C_t = U P_t Vᵀ
    M_t     = (λ_{t−1} M_{t−1} + C_t) / λ_t,     λ_t such that ‖M_t‖ = mean of ‖D_1‖ … ‖D_t‖, over all tensors together

U and V are square in the paper.  Without them, exactly,

    C_t = D_t − U_s (U_sᵀ D_t V_s) V_sᵀ − Σ_{i > s} (u_iᵀ D_t v_i) u_i v_iᵀ.

With N_t = λ_t M_t the recursion is N_t = N_{t−1} + C_t, and C_t depends on the directions in N_{t−1} alone: λ drops out
until the end, tensors do not know of one another, and the result is N_T times one factor.  What is merged after t tasks
is the merge of the first t.  Everything that is no matrix, and directions in which N_{t−1} is zero: C_t = D_t.

Two things differ between paper and release.  The release meant to zero the diagonal but edited a copy, so that its
first figures come from the block alone (`zero_diagonal: false`).  And at α = 1 its search finds no s and takes 0, the
weakest projection; here it is the strongest.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.precision import matmul
from subspace_lab.linalg.thin_svd import significant, thin_svd
from subspace_lab.merging.base import Stack
from subspace_lab.merging.spectral import SpectralMerge

if TYPE_CHECKING:
    from subspace_lab.merging.sources import Sources


class OPCM(SpectralMerge):
    """OPCM; it has its own λ.

    Args:
        alpha: share of the sum of singular values that new models may not touch.
        zero_diagonal: also take out what a new model adds to each direction that is merged already.
        order: given: models come as they are listed; shuffled: in a random order.
        seed: of the order.
    """

    scalable: ClassVar[bool] = False

    def __init__(
        self,
        alpha: float = 0.5,
        zero_diagonal: bool = True,
        order: Literal["given", "shuffled"] = "shuffled",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not 0 <= alpha <= 1:
            raise UserError(f"method.alpha must be between 0 and 1, got {alpha}")
        self.alpha, self.zero_diagonal, self.order, self.seed = alpha, zero_diagonal, order, seed
        self._squares: dict[tuple[str, int], Tensor] = {}

    @override
    def survey(self, sources: Sources) -> None:
        super().survey(sources)
        self._squares = {}

    def turns(self, T: int) -> list[int]:
        """The order in which T models are merged."""
        found = list(range(T))
        if self.order == "shuffled":
            random.Random(self.seed).shuffle(found)
        return found

    @override
    def update(self, stack: Stack) -> Tensor:
        N: Tensor | None = None
        squares = []
        for t in self.turns(stack.models):
            D = stack.delta(t)
            squares.append(_square(D))
            if N is None:
                N = D
            elif stack.kind == "matrix" and D.numel():
                N = N.add_(self.outside(N, D))
            else:
                N = N.add_(D)
        assert N is not None
        self._squares[stack.names[0], stack.start] = torch.stack([*squares, _square(N)])
        return N

    def outside(self, N: Tensor, D: Tensor) -> Tensor:
        """C (b, m, n), which takes D's place: D without what lies in the main directions of N."""
        U, S, V = thin_svd(N)
        share = S.cumsum(dim=-1) / S.sum(dim=-1, keepdim=True)
        known = significant(S)
        main = known if self.alpha == 1 else known & (share <= self.alpha)
        s = int(main.sum(dim=-1).max())
        in_s = main[..., None, :s]
        DV = matmul(D, V if self.zero_diagonal else V[..., :s])
        block = matmul(U[..., :s].mT, DV[..., :s]) * in_s * in_s.mT
        left = matmul(U[..., :s], block)
        if not self.zero_diagonal:
            return D.sub_(matmul(left, V[..., :s].mT))
        diagonal = (U * DV).sum(dim=-2) * (known & ~main)
        del DV
        U.mul_(diagonal.unsqueeze(-2))
        U[..., :s] += left
        return D.sub_(matmul(U, V.mT))

    @property
    @override
    def has_factor(self) -> bool:
        return True

    @override
    def factor(self) -> float:
        """Mean of the ‖D_t‖ divided by ‖N_T‖."""
        norms = self._norms()
        return sum(norms[:-1]) / (len(norms) - 1) / norms[-1] if norms and norms[-1] > 0 else 1.0

    def _norms(self) -> list[float]:
        """‖D_t‖ in the order of merging, and ‖N_T‖; added up in the order of names, whoever came first."""
        found = [self._squares[key].cpu() for key in sorted(self._squares)]
        norms: list[float] = torch.stack(found).sum(dim=0).sqrt().tolist() if found else []
        return norms

    @override
    def metrics(self) -> dict[str, float]:
        norms = self._norms()
        figures = {f"task_norm_{i + 1}": norm for i, norm in enumerate(norms[:-1])}
        return super().metrics() | figures | ({"lambda": 1 / self.factor()} if norms else {})


def _square(A: Tensor) -> Tensor:
    """‖A‖² of all b tensors together, in float64."""
    norm: Tensor = torch.linalg.vector_norm(A, dtype=torch.float64)
    return norm.square()
