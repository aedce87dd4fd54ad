"""Subspaces that never look at a gradient: random ones, and all directions."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab import linalg
from subspace_lab.subspaces.base import ALL, Members, Subspace
from subspace_lab.subspaces.randomized import Drawn


class Random(Drawn):
    """A random subspace: the orthonormalised columns of a Rademacher (±1) matrix.

    Never looks at the gradient.  The basis is a function of seed, parameter name and draw count, so checkpoints
    hold the count only.
    """

    derived = frozenset({"basis"})
    divides = False  # every process draws the same
    splits = True

    @override
    def setup(self, device: torch.device) -> None:
        B, _, q = self.shape
        self._make_room(device)
        self.draws = [0] * B
        self.state["basis"] = self._own(torch.empty(B, q, self.r, device=device))
        self.rebuild()

    @override
    def rebuild(self) -> None:
        self.state["basis"].copy_(self._own(self._draw(ALL)))

    def _draw(self, members: Members) -> Tensor:
        names = self.names[members] if isinstance(members, slice) else [self.names[i] for i in members]
        keys = [linalg.derive_key(self.seed, n, "draw", d) for n, d in zip(names, self.drawn(members), strict=True)]
        device = self.state["basis"].device
        signs = linalg.rademacher((self.shape[2], self.r), key=torch.tensor(keys), device=device)
        P = linalg.orthonormalize(signs)
        return self._inside(P, members) if self.within is not None else P

    @override
    def choose(self, A: Tensor, P: Tensor, members: Members) -> Tensor:
        self.count(members)
        return self._draw(members)

    @override
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> Tensor | None:
        P = self.basis_of(members) if self.tracks_change else A
        new = self.choose(A, P, members)
        change = P.mT @ new if self.tracks_change else None
        self.state["basis"][members] = self._own(new)
        return change


class Identity(Subspace):
    """All directions: coordinates are the gradient itself (the control that must equal the inner optimizer)."""

    full_size = True
    splits = True

    @override
    def setup(self, device: torch.device) -> None:
        self.state = {}

    @property
    @override
    def coordinates(self) -> tuple[int, int, int]:
        return self.shape

    @override
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> None:
        return None

    @override
    def project(self, A: Tensor, members: Members = ALL, out: Tensor | None = None) -> Tensor:
        return A.float() if out is None else out.copy_(A)

    @override
    def lift(self, Z: Tensor, members: Members = ALL) -> Tensor:
        return Z
