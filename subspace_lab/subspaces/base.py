"""What a subspace is: a choice of directions, and the way into them and back.

Matrices of one shape are handled together as a stack ``A`` of shape (B, p, q); a subspace acts on the LAST
dimension.  A flat parameter vector of length D is the stack (1, 1, D).  Every subclass answers three questions:

    refresh(A, members)    which directions, given gradients (or weights, or a seed)?
    project(A, members)    full space -> coordinates, Z
    lift(Z, members)       coordinates -> full space

``members`` is a slice or a list of positions in the stack, so that the optimizer can work through large stacks in
chunks and refresh only some matrices at a step.  Nothing here reads a value back to the host.
"""

from __future__ import annotations

import copy
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from subspace_lab.linalg import derive_key
from subspace_lab.linalg.split_rows import SplitRows

Members = slice | list[int]
Side = Literal["short", "long", "left", "right"]
ALL = slice(None)


class Subspace(ABC):
    """A prototype (plain settings) that `allocate` turns into the subspaces of one stack of matrices.

    Attributes:
        side: which side of a weight (out, in) the basis acts on: ``short`` (GaLore's "std": the smaller
            dimension, ``in`` when square), ``long`` ("reverse_std"), ``right`` (``in``) or ``left`` (``out``).
        state: tensors with one entry per matrix along the first dimension; all that a resumed run needs.
    """

    #: tensors of ``state`` that can be rebuilt from the others and stay out of checkpoints
    derived: ClassVar[frozenset[str]] = frozenset()
    #: chosen anew at every step whatever the refresh interval (tangent spaces)
    every_step: ClassVar[bool] = False
    #: refresh and lift want the current weights too
    needs_weight: ClassVar[bool] = False
    #: whether `refresh` returns the change of basis, for those who carry moments over
    tracks_change: bool = False
    #: leaving the subspace breaks a promise, so weight decay must stay inside as well
    protects: ClassVar[bool] = False
    #: coordinates are of the same shape as the gradient: there is no basis whose change could stale moments
    full_size: ClassVar[bool] = False
    #: a full-size constraint whose lift is linear: gradients lifted once keep a linear optimizer's steps inside
    linear_in_place: ClassVar[bool] = False
    #: `refresh` is work worth dividing among processes with the same gradients, and all it changes is in ``state``
    divides: ClassVar[bool] = False
    #: works on matrices whose rows (p) are split among processes
    splits: ClassVar[bool] = False
    #: the processes among which the rows of every matrix are split, None where they are whole
    split: SplitRows | None = None

    def __init__(self, *, side: Side = "short", seed: int = 0) -> None:
        self.side = side
        self.seed = seed
        self.state: dict[str, Tensor] = {}
        self.shape: tuple[int, int, int] = (0, 0, 0)
        self.names: tuple[str, ...] = ()
        self.native: tuple[bool, ...] = ()

    # -- life cycle ------------------------------------------------------------------------------------------

    def allocate(
        self,
        shape: tuple[int, int, int],
        *,
        names: Sequence[str],
        device: torch.device,
        transposed: Sequence[bool] | None = None,
        split: SplitRows | None = None,
    ) -> Self:
        """Return a copy that holds the subspaces of a stack.

        Args:
            shape: (B, p, q) of the stack.
            names: B parameter names; random choices depend on them and the seed only, so they are independent
                of parameter order and process count.
            device: where the stack lives.
            transposed: for each matrix, whether the stack holds its transpose.
            split: the processes among which the rows of every matrix are split; None where they are whole.
        """
        new = copy.copy(self)
        new.split = split
        new.shape, new.names = shape, tuple(names)
        new.native = tuple(not t for t in (transposed or [False] * shape[0]))
        new.state = {}
        new.setup(device)
        return new

    @abstractmethod
    def setup(self, device: torch.device) -> None:
        """Fill `state` with a valid start: orthonormal before any gradient was seen."""

    @property
    @abstractmethod
    def coordinates(self) -> tuple[int, int, int]:
        """Shape of the coordinates Z of the whole stack."""

    # -- the three questions ---------------------------------------------------------------------------------

    @abstractmethod
    def refresh(self, A: Tensor, members: Members = ALL, weight: Tensor | None = None) -> Tensor | None:
        """Choose directions for `members` from A (b, p, q).

        A matrix whose A is zero or not finite keeps the directions it has.

        Returns:
            The change of basis P_oldᵀ P_new (b, r, r) if `tracks_change` and coordinates have a basis, else None.
        """

    def skip(self, members: list[int]) -> None:  # noqa: B027 - most subspaces count nothing
        """Count a refresh of `members` that another process does; it sends what else of ``state`` has changed."""

    @abstractmethod
    def project(self, A: Tensor, members: Members = ALL, out: Tensor | None = None) -> Tensor:
        """Coordinates Z of A (b, p, q), written to `out` where given."""

    @abstractmethod
    def lift(self, Z: Tensor, members: Members = ALL) -> Tensor:
        """The full-size direction (b, p, q) that coordinates Z stand for."""

    def arrives_clean(self, names: Sequence[str]) -> bool:
        """Whether the gradients of these parameters are in the subspace as they come; asked once per step."""
        return False

    def lift_one(self, Z: Tensor) -> Tensor:
        """`lift` of the one matrix (p, q) of a stack of one."""
        return self.lift(Z.unsqueeze(0))[0]

    def factors(self, members: Members = ALL) -> Tensor | None:
        """Pᵀ (b, r, q) when the lift is the plain product Z Pᵀ, so that it can be fused into the weight; else None."""
        return None

    def retract(self, weight: Tensor, U: Tensor, members: Members = ALL) -> Tensor:
        """Move weights (b, p, q) along U; a curved space returns to itself here."""
        return weight + U

    # -- state -----------------------------------------------------------------------------------------------

    def ready(self) -> Tensor | None:
        """Bool (B,): which matrices have directions of their own choice already; None when all always have."""
        return self.state.get("ready")

    def member_state(self, i: int) -> dict[str, Tensor]:
        """Checkpoint entries of matrix i (views, no copy)."""
        return {k: v[i] for k, v in self.state.items() if k not in self.derived}

    def directions(self, i: int) -> dict[str, Tensor]:
        """Every tensor of matrix i, derived ones too (views, no copy, unless processes have parts of it)."""
        return {k: v[i] for k, v in self.state.items()}

    def load_members(self, entries: Sequence[dict[str, Tensor]]) -> None:
        """Fill the stack from per-matrix entries, in stack order.

        Raises:
            ValueError: an entry is missing, or its shape disagrees with the configured rank.
        """
        for key, now in self.state.items():
            if key in self.derived:
                continue
            for i, (name, entry) in enumerate(zip(self.names, entries, strict=True)):
                if key not in entry:
                    raise ValueError(f"checkpoint holds no '{key}' for '{name}'; it has {sorted(entry)}")
                check_shape(entry, key, tuple(now.shape[1:]), name)
                now[i].copy_(entry[key])
        self.rebuild()

    def rebuild(self) -> None:  # noqa: B027 - most subspaces derive nothing
        """Recompute `derived` entries after loading."""

    def state_bytes(self) -> int:
        """Bytes of all state, derived entries included."""
        return sum(t.numel() * t.element_size() for t in self.state.values())

    def keys(self, *parts: int | str) -> Tensor:
        """One generator key per matrix, a function of seed, parameter name and `parts` only (int64, CPU)."""
        return torch.tensor([derive_key(self.seed, n, *parts) for n in self.names], dtype=torch.int64)


def check_shape(entry: Mapping[str, Tensor], key: str, wanted: tuple[int, ...], name: str) -> None:
    """Refuse a checkpoint's tensor of another shape.

    Raises:
        ValueError: with both shapes.
    """
    if key in entry and tuple(entry[key].shape) != wanted:
        raise ValueError(
            f"'{key}' of '{name}' has shape {tuple(entry[key].shape)} in the checkpoint "
            f"but {wanted} here: was the run started with another rank or side?"
        )


def clamp_rank(rank: int | float, q: int, names: Sequence[str]) -> int:
    """Rank for a side of length q: a fraction in (0, 1) is taken of q; more than q is clamped with a note.

    Raises:
        ValueError: rank is not positive.
    """
    if rank <= 0:
        raise ValueError(f"rank must be positive, not {rank}")
    r = max(1, round(rank * q)) if isinstance(rank, float) and rank < 1 else int(rank)
    if r > q:
        warnings.warn(f"rank {r} is more than the {q} directions of {_few(names)}: clamped to {q}", stacklevel=3)
    return min(r, q)


def _few(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
