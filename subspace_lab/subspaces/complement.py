"""The orthogonal complement of a protected space: A − A M Mᵀ, same size as A.

Gradient projection memory (Saha, Garg & Roy 2021, arXiv 2103.09762, eq. 8) and the history constraint of CoSO; with
importances Λ, A − A M Λ Mᵀ, scaled gradient projection (Saha & Roy 2023, arXiv 2302.01386, eq. 3).
The lift projects again: Adam's division by √V takes even a projected gradient out of the complement.  Where the
optimizer is linear in the gradient (SGD with or without momentum) nothing can leave it, and one projection is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.linalg.removal import Removal, complement_basis
from subspace_lab.subspaces.base import ALL, Members, Side, Subspace


class Complement(Subspace):
    """Everything orthogonal to the columns of M.

    Args:
        protected: parameter name -> M (q, k), orthonormal columns; a name that is absent is unconstrained.
        side: the side that M lives on; ``right`` is a linear layer's input space.
        importance: parameter name -> Λ (k,) in [0, 1], how much of each direction is taken out; default: all of it.
            With it gradients reach the optimizer whole and only its steps are scaled (once, which for SGD is the same).
        clean: parameter name -> asked once per step: whether the gradient lies in the complement already (see
            `subspace_lab.continual.layers.ProtectedLinear`).
    """

    protects = True
    full_size = True
    linear_in_place = True
    derived: ClassVar[frozenset[str]] = frozenset({"free"})

    def __init__(
        self,
        protected: Mapping[str, Tensor] | None = None,
        *,
        side: Side = "right",
        importance: Mapping[str, Tensor] | None = None,
        clean: Mapping[str, Callable[[], bool]] | None = None,
    ) -> None:
        super().__init__(side=side)
        self.protected = dict(protected or {})
        self.importance = dict(importance) if importance is not None else None
        self.clean = dict(clean or {})

    @override
    def setup(self, device: torch.device) -> None:
        B, _, q = self.shape
        bases = [self.protected.get(n) for n in self.names]
        for name, M in zip(self.names, bases, strict=True):
            if M is not None and (M.ndim != 2 or M.shape[0] != q or M.shape[1] > q):
                raise ValueError(f"protected basis of '{name}' has shape {tuple(M.shape)}, expected ({q}, k ≤ {q})")
        width = max((M.shape[1] for M in bases if M is not None), default=0)
        # Zero columns protect nothing, so bases of different widths share one stack.
        M_all = torch.zeros(B, q, width, device=device)
        for i, M in enumerate(bases):
            if M is not None:
                M_all[i, :, : M.shape[1]] = M.to(device)
        self.state["protected"] = M_all
        if self.importance is not None:
            weights = torch.zeros(B, width, device=device)
            for i, name in enumerate(self.names):
                if name in self.importance:
                    weights[i, : len(self.importance[name])] = self.importance[name].to(device)
            self.state["importance"] = weights
        self.rebuild()

    @override
    def rebuild(self) -> None:
        """Choose the cheaper form: without M, or onto a basis of the rest."""
        M, weights = self.state["protected"], self.state.get("importance")
        self.state.pop("free", None)
        self._singles: dict[int, Removal] = {}
        if weights is not None:
            self._removal = Removal(M, weights=weights.unsqueeze(-2))
            return
        self._removal = Removal(M)
        q, width = M.shape[1:]
        if 2 * width <= q or M.is_meta:
            return
        used = [int(n) for n in M.square().sum(1).gt(0.5).sum(1)]  # host read, once per task
        if 2 * min(used) > q:
            free = torch.zeros(len(M), q, q - min(used), device=M.device)
            for i, k in enumerate(used):
                free[i, :, : q - k] = complement_basis(M[i, :, :k])
            self.state["free"] = free
            self._removal = Removal(free, onto=True)

    @property
    def width(self) -> int:
        """The largest number of protected directions in the stack."""
        return self.state["protected"].shape[-1]

    @property
    @override
    def coordinates(self) -> tuple[int, int, int]:
        return self.shape

    @override
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> None:
        return None

    def remove(self, A: Tensor, members: Members = ALL) -> Tensor:
        """A − A M Λ Mᵀ (b, p, q)."""
        if not self.width:
            return A.to(self.state["protected"].dtype)
        whole = self._removal
        if A.shape[0] == 1 and isinstance(members, slice):  # plain matrices: a stack of one costs twice the time
            return self._alone(members.start or 0)(A[0]).unsqueeze(0)
        if members == ALL or (isinstance(members, slice) and members == slice(0, self.shape[0])):
            return whole(A)
        weights = None if whole.weights is None else whole.weights[members]
        return Removal(whole.factors[members], whole.onto, weights)(A)

    def _alone(self, i: int) -> Removal:
        if i not in self._singles:
            F, weights = self._removal.factors, self._removal.weights
            self._singles[i] = Removal(F[i], self._removal.onto, None if weights is None else weights[i])
        return self._singles[i]

    @override
    def project(self, A: Tensor, members: Members = ALL, out: Tensor | None = None) -> Tensor:
        inside = self.remove(A, members) if self.importance is None else A.to(self.state["protected"].dtype)
        return inside if out is None else out.copy_(inside)

    @override
    def lift(self, Z: Tensor, members: Members = ALL) -> Tensor:
        return self.remove(Z, members)

    @override
    def lift_one(self, Z: Tensor) -> Tensor:
        return self._alone(0)(Z) if self.width else Z

    @override
    def arrives_clean(self, names: Sequence[str]) -> bool:
        answers = [name in self.clean and self.clean[name]() for name in names]  # all are asked: it resets the question
        return all(answers)
