"""The leading directions of a gradient inside a complement, with a sketch of all gradients seen so far: CoSO.

Cheng, Wan, Wu, Hou & Zhang, NeurIPS 2025, arXiv 2505.11816.  For gradients A (p, q) with the basis on the last
dimension and M the directions of earlier tasks:

    A' = A (I − M Mᵀ)         P = the r leading right singular vectors of A'
    S  = frequent directions (Ghashami, Liberty, Phillips & Woodruff, SICOMP 2016) of all A' at refreshes: SSᵀ ≈ Σ A'ᵀA'

The sketch is state of the subspace, so it lives, is saved and is resumed with the optimizer's moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab import linalg
from subspace_lab.linalg.frequent_directions import FrequentDirections
from subspace_lab.linalg.precision import sanitize
from subspace_lab.subspaces.base import ALL, Members, Side, clamp_rank
from subspace_lab.subspaces.complement import Complement
from subspace_lab.subspaces.span import Span


class Sketched(Span):
    """Span of an SVD taken inside a complement, keeping a sketch of what it was given.

    Args:
        rank: r, directions of the basis; clamped to what the complement leaves free.
        protected: parameter name -> M (q, k), orthonormal columns on the side's dimension.
        sketch: l, columns of the sketch; clamped to the side's length, where it is exact.
        shrink: ``single`` is plain frequent directions on the whole gradient, one shrinkage by the (l+1)-th squared
            singular value; ``double`` shrinks each gradient's own spectrum before it joins, too.
        solver: ``gram`` or ``svd``, as for `SVD`.
        side: ``right`` (inputs of a linear layer) or ``left`` (its outputs).
        align_signs: see `Span`.
    """

    protects = True

    def __init__(
        self,
        rank: int | float,
        protected: Mapping[str, Tensor],
        *,
        sketch: int,
        shrink: Literal["single", "double"] = "single",
        solver: Literal["gram", "svd"] = "gram",
        side: Side = "right",
        align_signs: bool = True,
        seed: int = 0,
    ) -> None:
        within = Complement(protected, side=side)
        super().__init__(rank, side=side, align_signs=align_signs, within=within, seed=seed)
        if sketch < 1:
            raise ValueError(f"sketch must be at least 1, not {sketch}")
        self.columns = sketch
        self.shrink = shrink
        self.solver = solver
        self.protected = protected

    @override
    def setup(self, device: torch.device) -> None:
        super().setup(device)
        B, _, q = self.shape
        self.width = clamp_rank(self.columns, q, self.names)
        self.state["sketch"] = torch.zeros(B, q, self.width, device=device)
        # A weight whose every direction is protected may not move, not even by the rounding of a projection.
        free = [n not in self.protected or self.protected[n].shape[1] < q for n in self.names]
        self.free = torch.tensor(free, device=device)[:, None, None].to(torch.float32)

    @property
    def sketch(self) -> Tensor:
        """S (B, q, l), fp32: orthogonal columns, longest first."""
        return self.state["sketch"]

    @override
    def _inside(self, P: Tensor, members: Members) -> Tensor:
        # Columns that a gradient of low rank leaves open may lie in M; the first pass replaces those by others, the
        # second takes these into the complement.
        return super()._inside(super()._inside(P, members), members)

    @override
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> Tensor | None:
        assert self.within is not None
        P, S = self.basis[members], self.sketch[members]
        A = self.within.project(A, members)
        size = linalg.largest_entry(A)
        good = torch.isfinite(size) & (size > 0)
        V, s = self._leading(A, max(self.r, self.width + 1))
        new = self._inside(V[..., : self.r], members)
        if self.align_signs:
            new = linalg.align_signs(new, P)
        good = good & torch.isfinite(new).all(dim=(1, 2), keepdim=True)
        new = torch.where(good, new, P)
        change = P.mT @ new if self.tracks_change else None
        self.basis[members] = new
        self.sketch[members] = torch.where(good, self._absorb(S, A, V, s), S)
        self.state["ready"][members] |= good.flatten()
        return change

    @override
    def choose(self, A: Tensor, P: Tensor, members: Members) -> Tensor:
        return self._leading(A, self.r)[0]

    def _leading(self, A: Tensor, k: int) -> tuple[Tensor, Tensor]:
        kernel = linalg.gram_eigh if self.solver == "gram" else linalg.truncated_svd
        return kernel(A, min(k, A.shape[-1]))

    def _absorb(self, S: Tensor, A: Tensor, V: Tensor, s: Tensor) -> Tensor:
        """The sketch (b, q, l) after gradients A (b, p, q) with leading singular pairs V, s."""
        rows = A
        if self.shrink == "double":
            energy = s.square()
            cut = energy[..., self.width :][..., :1].sum(dim=-1, keepdim=True)  # nothing, where the sketch is exact
            kept = (energy[..., : self.width] - cut).clamp_min(0).sqrt()
            rows = (V[..., : self.width] * kept.unsqueeze(-2)).mT
        joined = FrequentDirections(self.width)
        joined.sketch = S.mT
        joined.update(sanitize(rows))
        return joined.sketch.mT

    @override
    def lift(self, Z: Tensor, members: Members = ALL) -> Tensor:
        return super().lift(Z, members) * self.free[members]
