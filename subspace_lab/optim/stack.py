"""Same-shape weights as one stack of matrices (B, p, q), with their subspace and their coordinates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from subspace_lab.linalg.split_rows import SplitRows
from subspace_lab.optim.shards import group_of, is_sharded, local, sharded_dimension
from subspace_lab.subspaces.base import Members, Subspace

# Entries that one chunk may hold.  On a GPU large batches hide launch cost; on a CPU large matrices are better
# multiplied where they lie, one by one, and only small ones are worth copying together.
CHUNK_ENTRIES = {"cuda": 1 << 26, "cpu": 1 << 16}


def as_matrix(t: Tensor) -> Tensor:
    """A weight as (out, everything else): convolutions become out × (in·kh·kw), vectors one row."""
    return t.reshape(t.shape[0], -1) if t.ndim > 1 else t.reshape(1, -1)


def matrix_shape(t: Tensor) -> tuple[int, int]:
    """The shape (out, everything else) of a whole weight, also where processes hold parts of it."""
    return (t.shape[0], t.numel() // t.shape[0]) if t.ndim > 1 else (1, t.numel())


def orientation(weight: Tensor, side: str) -> bool:
    """Whether `weight` is transposed so that the basis side becomes the last dimension.

    Of a sharded weight the basis side is the one that is whole, whatever `side` says.
    """
    if is_sharded(weight):
        return sharded_dimension(weight) != 0
    m, n = matrix_shape(weight)
    return {"short": m < n, "long": m >= n, "right": False, "left": True}[side]


class Stack:
    """B weights that are stepped together.

    Attributes:
        owners: the parameters; natively oriented ones first.
        params: their tensors: of sharded parameters (DTensor, FSDP2) what this process holds, rows of every (p, q).
        rows: the processes among which p is split, None where weights are whole.
        shape: (B, p, q) as the subspace sees them; of sharded weights p is this process's own.
        group: index of the outer parameter group.
        t: steps that these weights have taken; they share it, which is what lets them share Adam's counters.
        offsets: shift of each weight's refreshes inside the interval.
        coords: the inner optimizer's parameters: one stacked (B, p, r), or one (p, r) each.
        direct: the inner optimizer moves the weights themselves, along gradients that were lifted once.
    """

    def __init__(
        self,
        named: Sequence[tuple[str, nn.Parameter]],
        subspace: Subspace,
        *,
        group: int,
        flat: bool,
        stacked: bool,
        offsets: dict[str, int],
        tracks_change: bool,
        direct: bool = False,
        t: int = 0,
    ) -> None:
        self.flat, self.group, self.direct, self.t = flat, group, direct, t
        stacked = stacked and not direct
        side = subspace.side
        if flat:
            named = sorted(named, key=lambda item: item[0])  # independent of parameter order
            self.transposed = [False]
            self.keys = [f"flat.{group}"]
            self.shape = (1, 1, sum(p.numel() for _, p in named))
        else:
            named = sorted(named, key=lambda item: (orientation(item[1], side), item[0]))
            self.transposed = [orientation(p, side) for _, p in named]
            self.keys = [n for n, _ in named]
            m, n = as_matrix(local(named[0][1].detach())).shape
            self.shape = (len(named), n, m) if self.transposed[0] else (len(named), m, n)
        self.names = [n for n, _ in named]
        self.owners = [p for _, p in named]
        self.params: list[Tensor] = [p for _, p in named]
        self.rows: SplitRows | None = None
        if is_sharded(self.owners[0]):
            self._check_split(subspace, stacked)
            self.rows = SplitRows(group_of(self.owners[0]))
            self.bind()
        self.natives = self.transposed.count(False)
        #: a single weight that is its own matrix
        self.plain = len(named) == 1 and not flat and self.params[0].ndim == 2 and not self.transposed[0]
        self.offsets = [offsets[k] for k in self.keys]
        self.device = self.params[0].device
        self.subspace = subspace.allocate(
            self.shape, names=self.keys, device=self.device, transposed=self.transposed, split=self.rows
        )
        self.subspace.tracks_change = tracks_change
        ready = self.subspace.ready()
        # Shapes without values (meta and fake tensors of an estimate) cannot be asked.
        self.unsure = type(ready) is Tensor and not ready.is_meta
        B, p, r = self.subspace.coordinates
        self.coordinates = (B, p, r)
        count = 1 if stacked else B
        self.stacked = stacked
        self._empty = (0, 0, 0) if stacked else (0, 0)  # of the right number of dimensions: Muon looks at it
        self.coords = [nn.Parameter(torch.empty(self._empty, device=self.device)) for _ in range(count)]

    @property
    def B(self) -> int:
        """Number of weights."""
        return self.shape[0]

    def _check_split(self, subspace: Subspace, stacked: bool) -> None:
        if self.flat or not subspace.splits or self.direct:
            raise ValueError(f"{type(subspace).__name__} needs whole weights, and {self.names[0]} is sharded")
        if not stacked:
            raise ValueError(
                "sharded weights need an inner optimizer that looks at one entry at a time (AdamW, Lion …)"
            )

    def bind(self) -> None:
        """Look up what this process holds of sharded weights, which FSDP may have moved."""
        if self.rows is not None:
            self.params = [local(p.detach()) for p in self.owners]

    @property
    def has_gradient(self) -> bool:
        """Whether the backward pass has left one; the weights of a stack have theirs together."""
        return self.owners[0].grad is not None

    def chunks(self) -> list[slice]:
        """Slices over the stack that keep temporary copies small."""
        limit = CHUNK_ENTRIES.get(self.device.type, CHUNK_ENTRIES["cuda"])
        size = max(1, limit // max(1, self.shape[1] * self.shape[2]))
        return [slice(i, min(i + size, self.B)) for i in range(0, self.B, size)]

    def matrix(self, t: Tensor, i: int) -> Tensor:
        """Member i's tensor (weight or gradient) as the (p, q) view the subspace sees."""
        M = as_matrix(t)
        return M.mT if self.transposed[i] else M

    def restore(self, M: Tensor, i: int) -> Tensor:
        """A matrix (p, q) in the shape of member i's weight."""
        return (M.mT if self.transposed[i] else M).reshape(self.params[i].shape)

    def gather(self, tensors: Sequence[Tensor], members: slice) -> Tensor:
        """Stack tensors shaped like the weights; a single one is viewed, not copied."""
        if self.flat:
            return torch.cat([t.reshape(-1) for t in tensors]).reshape(1, 1, -1)
        if members.stop - members.start == 1:
            return self.matrix(tensors[members.start], members.start).unsqueeze(0)
        return torch.stack([self.matrix(tensors[i], i) for i in range(members.start, members.stop)])

    def grads(self) -> list[Tensor]:
        """The weights' gradients."""
        return [local(p.grad) for p in self.owners if p.grad is not None]

    def shrink_(self, factor: float) -> None:
        """Decoupled weight decay on the full weights."""
        torch._foreach_mul_(self.params, factor)

    def add_(self, U: Tensor, members: slice) -> None:
        """W += U for U (b, p, q)."""
        if self.flat:
            self._add_parts(self.params, U.reshape(-1).split_with_sizes([p.numel() for p in self.params]))
            return
        split = min(max(self.natives, members.start), members.stop)  # natives first, then the transposed
        for begin, end in ((members.start, split), (split, members.stop)):
            if begin < end:
                part = U[begin - members.start : end - members.start]
                part = part.mT.contiguous() if self.transposed[begin] else part
                self._add_parts(self.params[begin:end], part.unbind(0))

    @staticmethod
    def _add_parts(weights: list[Tensor], parts: Sequence[Tensor]) -> None:
        updates = [u.to(w.dtype).view_as(w) for u, w in zip(parts, weights, strict=True)]
        torch._foreach_add_(weights, updates)

    def assign_(self, W: Tensor, members: slice) -> None:
        """W <- new weights (b, p, q)."""
        for i in range(members.start, members.stop):
            self.matrix(self.params[i].data, i).copy_(W[i - members.start])

    def due(self, every: int) -> list[int]:
        """Members whose basis is chosen anew at step t; all of them at t = 0."""
        if self.subspace.every_step or self.t == 0:
            return list(range(self.B))
        if every <= 0:
            return self._late()
        return [i for i, o in enumerate(self.offsets) if (self.t - o) % every == 0] or self._late()

    def _late(self) -> list[int]:
        """Members still without directions of their own (a zero or bad first gradient).

        Asked at steps 1, 2, 4, 8 … until none is left, normally once: the only read of device memory in a step.
        """
        if not self.unsure or self.t & (self.t - 1):
            return []
        ready = self.subspace.ready()
        assert ready is not None
        late = [i for i, r in enumerate(ready.tolist()) if not r]  # host read, see above
        self.unsure = bool(late)
        return late

    def refresh(self, A: Tensor, chunk: slice, due: list[int], W: Tensor | None) -> tuple[Members, Tensor | None]:
        """Refresh the members of `chunk` that are due, at least one; returns (members, change of basis)."""
        mine = [i for i in due if chunk.start <= i < chunk.stop]
        if len(mine) == chunk.stop - chunk.start:
            return chunk, self.subspace.refresh(A, chunk, W)
        rows = [i - chunk.start for i in mine]
        return mine, self.subspace.refresh(A[rows], mine, None if W is None else W[rows])

    # -- coordinates as the inner optimizer's parameters ---------------------------------------------------------

    def load_coordinates(self, Z: Tensor, start: Tensor | None) -> Tensor:
        """Set the inner parameters to `start` (zeros) with gradient Z (B, p, r); returns what the step will move."""
        step = torch.zeros_like(Z) if start is None else start.clone()
        if self.stacked:
            self.coords[0].data, self.coords[0].grad = step, Z
        else:
            for c, s, z in zip(self.coords, step.unbind(0), Z.unbind(0), strict=True):
                c.data, c.grad = s, z
        return step

    def point_at_weights(self, grads: Sequence[Tensor]) -> None:
        """Make the weights themselves the inner parameters, with these gradients in the weights' shapes."""
        for c, p, g in zip(self.coords, self.params, grads, strict=True):
            if c.data_ptr() != p.data_ptr():
                c.data = p.detach()
            c.grad = g

    def let_go(self) -> None:
        """Release the gradients that `point_at_weights` took."""
        for c in self.coords:
            c.grad = None

    def free_coordinates(self) -> None:
        """Nothing of the coordinates outlives a step but the moments."""
        for c in self.coords:
            c.grad = None
            c.data = torch.empty(self._empty, device=self.device)
