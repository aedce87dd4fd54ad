"""The span of an orthonormal basis P (B, q, r): coordinates Z = A P, lifted back as Z Pᵀ.

GaLore's projector (arXiv 2403.03507, eq. 5–7) with the basis on the last dimension of the stack.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab import linalg
from subspace_lab.subspaces.base import ALL, Members, Side, Subspace, check_shape, clamp_rank
from subspace_lab.subspaces.complement import Complement

# Of the iteration that takes LAPACK's place where no process holds a whole matrix: on spectra that fall like 1/i it
# captures the exact subspace's energy to 1e-5, on those of noise, where no subspace is much better, to a fiftieth.
SPLIT_ITERATIONS = 4
SPLIT_OVERSAMPLE = 16


class Span(Subspace):
    """Base of all spans; a subclass says in `choose` which basis a gradient suggests.

    Args:
        rank: number of directions; a fraction in (0, 1) is taken of the side's length.
        side: see `Subspace`.
        align_signs: give each new basis vector the sign that agrees with the one it replaces.  Singular vectors
            have arbitrary signs, and moments kept across a refresh depend on them.
        within: a complement in which the span must lie (CoSO, GPM + GaLore).
        seed: of the starting basis and of random choices.
    """

    divides = True

    def __init__(
        self,
        rank: int | float = 128,
        *,
        side: Side = "short",
        align_signs: bool = True,
        within: Complement | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(side=side, seed=seed)
        if rank <= 0:
            raise ValueError(f"rank must be positive, not {rank}")
        self.rank = rank
        self.align_signs = align_signs
        self.within = within

    @override
    def setup(self, device: torch.device) -> None:
        self._make_room(device)
        self.state["basis"] = self._own(self._start(device))
        self.state["ready"] = torch.zeros(self.shape[0], dtype=torch.bool, device=device)

    def _make_room(self, device: torch.device) -> None:
        """Settle the rank r, in what a complement leaves free."""
        free = self.shape[2]
        if self.within is not None:
            self.within = self.within.allocate(
                self.shape, names=self.names, device=device, transposed=[not n for n in self.native]
            )
            free = max(1, free - self.within.width)
        self.r = clamp_rank(self.rank, free, self.names)

    def _start(self, device: torch.device) -> Tensor:
        """R random coordinate axes per matrix: orthonormal at no cost, and not the same for every matrix."""
        B, _, q = self.shape
        order = linalg.uniform((q,), key=self.keys("start"), device=torch.device("cpu")).argsort(dim=-1)[:, : self.r]
        P = torch.zeros(B, self.r, q).scatter_(2, order.unsqueeze(-1), 1.0).mT.contiguous()
        return self._inside(P.to(device), ALL) if self.within is not None else P.to(device)

    def _inside(self, P: Tensor, members: Members) -> Tensor:
        assert self.within is not None
        return linalg.orthonormalize(self.within.project(P.mT, members).mT)

    def _own(self, P: Tensor) -> Tensor:
        """What this process keeps of bases P (..., q, r): all, or its part where rows are split."""
        return P if self.split is None else self.split.own(P)

    def basis_of(self, members: Members = ALL) -> Tensor:
        """P (b, q, r) of `members`, fp32, orthonormal columns; gathered where rows are split."""
        P = self.state["basis"][members]
        return P if self.split is None else self.split.gather(P, self.shape[2])

    @property
    def basis(self) -> Tensor:
        """P (B, q, r) of all matrices, fp32, orthonormal columns."""
        return self.basis_of(ALL)

    @property
    @override
    def coordinates(self) -> tuple[int, int, int]:
        return (self.shape[0], self.shape[1], self.r)

    @abstractmethod
    def choose(self, A: Tensor, P: Tensor, members: Members) -> Tensor:
        """A new basis (b, q, r) for gradients A (b, p, q), given the present basis P (b, q, r)."""

    @override
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> Tensor | None:
        P = self.basis_of(members)
        A = A.to(P.dtype)
        if self.within is not None:
            A = self.within.project(A, members)
        size = linalg.largest_entry(A, self.split)
        good = torch.isfinite(size) & (size > 0)
        new = self.choose(A, P, members)  # the kernels read matrices that are not finite as zero
        if self.within is not None:
            new = self._inside(new, members)
        if self.align_signs:
            new = linalg.align_signs(new, P)
        # A basis that LAPACK could not find is no better than a bad gradient.
        good = good & torch.isfinite(new).all(dim=(1, 2), keepdim=True)
        new = torch.where(good, new, P)
        change = P.mT @ new if self.tracks_change else None
        self.state["basis"][members] = self._own(new)
        self.state["ready"][members] |= good.flatten()
        return change

    @override
    def project(self, A: Tensor, members: Members = ALL, out: Tensor | None = None) -> Tensor:
        P = self.basis_of(members)
        return torch.bmm(A.to(P.dtype), P) if out is None else torch.bmm(A.to(P.dtype), P, out=out)

    @override
    def lift(self, Z: Tensor, members: Members = ALL) -> Tensor:
        P = self.basis_of(members)
        U = Z.to(P.dtype) @ P.mT
        return self.within.project(U, members) if self.within is not None else U

    @override
    def factors(self, members: Members = ALL) -> Tensor | None:
        return self.basis_of(members).mT if self.within is None else None

    @override
    def member_state(self, i: int) -> dict[str, Tensor]:
        entry = super().member_state(i)
        return entry if self.split is None or "basis" not in entry else entry | {"basis": self.basis_of([i])[0]}

    @override
    def directions(self, i: int) -> dict[str, Tensor]:
        return super().directions(i) | {"basis": self.basis_of([i])[0] if self.split is not None else self.basis[i]}

    @override
    def load_members(self, entries: Sequence[dict[str, Tensor]]) -> None:
        if self.split is not None:
            for name, entry in zip(self.names, entries, strict=True):
                check_shape(entry, "basis", (self.shape[2], self.r), name)
            entries = [{k: self._own(v) if k == "basis" else v for k, v in entry.items()} for entry in entries]
        super().load_members(entries)


class SVD(Span):
    """The leading right singular vectors of the gradient: GaLore's own choice (arXiv 2403.03507, eq. 12–13).

    Args:
        solver: ``svd`` (torch.linalg.svd) or ``gram`` (eigenvectors of the short side's Gram matrix: the same
            subspace up to fp32 rounding, several times faster).
        native_orientation: decompose every matrix in its own orientation, as the released code does, not the
            stack's; the subspace is the same but LAPACK may sign its vectors differently.

    Of matrices whose rows are split among processes the subspace comes from `SPLIT_ITERATIONS` power iterations with
    `SPLIT_OVERSAMPLE` extra columns, whatever the solver: neither the matrix nor its Gram matrix is sent anywhere.
    """

    splits = True

    def __init__(
        self,
        rank: int | float = 128,
        *,
        solver: Literal["svd", "gram"] = "svd",
        native_orientation: bool = False,
        side: Side = "short",
        align_signs: bool = True,
        within: Complement | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(rank, side=side, align_signs=align_signs, within=within, seed=seed)
        if solver not in ("svd", "gram"):
            raise ValueError(f"solver must be svd or gram, not {solver!r}")
        self.solver = solver
        self.native_orientation = native_orientation

    @override
    def choose(self, A: Tensor, P: Tensor, members: Members) -> Tensor:
        if self.split is not None:
            key = linalg.derive_key(self.seed, "split")
            return linalg.randomized_svd(
                A,
                self.r,
                key=key,
                oversample=SPLIT_OVERSAMPLE,
                power_iterations=SPLIT_ITERATIONS,
                rows=self.split,
            )[0]
        if self.native_orientation:
            return self._native(A, members)
        kernel = linalg.truncated_svd if self.solver == "svd" else linalg.gram_eigh
        return kernel(A, self.r)[0]

    def _native(self, A: Tensor, members: Members) -> Tensor:
        native = self.native[members] if isinstance(members, slice) else tuple(self.native[i] for i in members)
        basis = torch.empty(A.shape[0], A.shape[2], self.r, dtype=A.dtype, device=A.device)
        for own, right in ((True, True), (False, False)):
            rows = [i for i, n in enumerate(native) if n is own]
            if rows:
                M = torch.nan_to_num(A[rows] if right else A[rows].mT, posinf=0.0, neginf=0.0)
                U, _, Vh = torch.linalg.svd(M, full_matrices=False)
                full = Vh.mT if right else U
                if full.shape[-1] < self.r:  # more directions asked for than the gradient has
                    full = linalg.truncated_svd(A[rows], self.r)[0]
                basis[rows] = full[..., : self.r]
        return basis
