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
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.precision import matmul, subtract_product
from subspace_lab.linalg.thin_svd import gram_eigen, significant, thin_svd
from subspace_lab.merging.base import Stack
from subspace_lab.merging.spectral import SpectralMerge

if TYPE_CHECKING:
    from subspace_lab.merging.sources import Sources


_ROWS, _ENTRIES = 512, 1 << 18
_CONDITION = 1e3  # σ_max / σ_min up to which C is found without U, to the same accuracy


class Directions(NamedTuple):
    """Singular triplets of tall matrices; U is left out where N V S⁻¹ can stand for it."""

    U: Tensor | None
    S: Tensor
    V: Tensor


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
            # Before there are two matrices in memory.
            found = directions(N) if N is not None and stack.kind == "matrix" and N.numel() else None
            D = stack.delta(t)
            squares.append(_square(D))
            N = D if N is None else N.add_(D if found is None else self.outside(N, D, found))
            del D, found
        assert N is not None
        self._squares[stack.names[0], stack.start] = torch.stack([*squares, _square(N)])
        return N

    def outside(self, N: Tensor, D: Tensor, known: Directions) -> Tensor:
        """C (b, m, n), which takes D's place: D without what lies in the main directions of N."""
        if N.shape[-2] < N.shape[-1]:
            return self.outside(N.mT, D.mT, known).mT
        U, S, V = known
        share = S.cumsum(dim=-1) / S.sum(dim=-1, keepdim=True)
        there = significant(S)
        main = there if self.alpha == 1 else there & (share <= self.alpha)
        s = int(main.sum(dim=-1).max())
        V = V if self.zero_diagonal else V[..., :s]
        block, diagonal = _coordinates(N, U, V, D, s)
        if U is None:  # U = N V S⁻¹, here and where it is multiplied from the left
            block, diagonal = block / S[..., :s, None].square(), diagonal / S[..., : V.shape[-1]].square()
        in_s = main[..., None, :s]
        K = V.mT * (diagonal * (there & ~main)[..., : V.shape[-1]]).unsqueeze(-1)
        K[..., :s, :] += matmul(block * in_s * in_s.mT, V[..., :s].mT)
        return subtract_product(D, N, matmul(V, K)) if U is None else subtract_product(D, U[..., : V.shape[-1]], K)

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


def directions(N: Tensor) -> Directions:
    """Of N (b, m, n), seen as tall."""
    if N.shape[-2] < N.shape[-1]:
        return directions(N.mT)
    found = gram_eigen(N, _CONDITION)
    if found is None:
        return Directions(*thin_svd(N))
    return Directions(None, found[0].sqrt().to(N.dtype), found[1].to(N.dtype))


def _coordinates(N: Tensor, U: Tensor | None, V: Tensor, D: Tensor, s: int) -> tuple[Tensor, Tensor]:
    """First s × s block and diagonal of Uᵀ D V, or of (N V)ᵀ D V, for tall D (b, m, n) and some columns of V."""
    if U is None:
        DV = V.new_zeros(*V.shape[:-2], N.shape[-1], N.shape[-1])
        for left, right in zip(torch.split(N, _ROWS, dim=-2), torch.split(D, _ROWS, dim=-2), strict=True):
            DV += matmul(left.mT, right)
        DV = matmul(DV, V)
        return matmul(V[..., :s].mT, DV[..., :s]), (V * DV).sum(dim=-2)
    block, diagonal = V.new_zeros(*V.shape[:-2], s, s), torch.zeros_like(V[..., 0, :])
    for left, right in zip(torch.split(U, _ROWS, dim=-2), torch.split(D, _ROWS, dim=-2), strict=True):
        DV = matmul(right, V)
        block += matmul(left[..., :s].mT, DV[..., :s])
        diagonal += (left[..., : V.shape[-1]] * DV).sum(dim=-2)
    return block, diagonal


def _square(A: Tensor) -> Tensor:
    """‖A‖² of all b tensors together, in float64."""
    # From a few rows at a time: torch converts what it is given as a whole.
    norms = [torch.linalg.vector_norm(piece, dtype=torch.float64) for piece in torch.split(A.flatten(), _ENTRIES)]
    return torch.stack(norms).square().sum()
