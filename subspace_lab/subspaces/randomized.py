"""Spans with random choices: what they count, and randomized subspace iteration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab import linalg
from subspace_lab.subspaces.base import Members, Side
from subspace_lab.subspaces.complement import Complement
from subspace_lab.subspaces.span import Span


class Drawn(Span):
    """A span that counts, for each matrix, how often it drew: random choices depend on it, so it is state.

    Plain numbers, so that choosing needs no look at device memory; a checkpoint holds them as int64 scalars.
    """

    @override
    def setup(self, device: torch.device) -> None:
        self.draws = [0] * self.shape[0]
        super().setup(device)

    def drawn(self, members: Members) -> list[int]:
        """How often each of `members` drew."""
        return self.draws[members] if isinstance(members, slice) else [self.draws[i] for i in members]

    def count(self, members: Members) -> None:
        """Each of `members` draws once more."""
        for i in range(*members.indices(len(self.draws))) if isinstance(members, slice) else members:
            self.draws[i] += 1

    @override
    def skip(self, members: list[int]) -> None:
        self.count(members)

    @override
    def member_state(self, i: int) -> dict[str, Tensor]:
        return super().member_state(i) | {"draws": torch.tensor(self.draws[i])}

    @override
    def load_members(self, entries: Sequence[dict[str, Tensor]]) -> None:
        for name, entry in zip(self.names, entries, strict=True):
            if "draws" not in entry:
                raise ValueError(f"checkpoint holds no 'draws' for '{name}'; it has {sorted(entry)}")
        self.draws = [int(entry["draws"]) for entry in entries]
        super().load_members(entries)


class Randomized(Drawn):
    """Randomized subspace iteration (Halko, Martinsson & Tropp 2011), warm-started from the last basis.

    The first basis of a matrix comes from a Rademacher sketch, later ones from `power_iterations` steps starting
    at the present basis, each with Rayleigh–Ritz so that the columns mimic the order of an SVD.
    """

    splits = True

    def __init__(
        self,
        rank: int | float = 128,
        *,
        power_iterations: int = 1,
        oversample: int = 8,
        warm_start: bool = True,
        side: Side = "short",
        align_signs: bool = True,
        within: Complement | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rank, side=side, align_signs=align_signs, within=within, seed=seed)
        if power_iterations < 0 or oversample < 0:
            raise ValueError("power_iterations and oversample must not be negative")
        self.power_iterations = power_iterations
        self.oversample = oversample
        self.warm_start = warm_start

    @override
    def choose(self, A: Tensor, P: Tensor, members: Members) -> Tensor:
        draws = self.drawn(members)
        key = linalg.derive_key(self.seed, "sketch", max(draws))
        self.count(members)
        if self.warm_start and min(draws) > 0:
            return linalg.subspace_iteration(A, P, iterations=max(1, self.power_iterations), rows=self.split)[0]
        return linalg.randomized_svd(
            A,
            self.r,
            key=key,
            oversample=self.oversample,
            power_iterations=self.power_iterations,
            rows=self.split,
        )[0]
