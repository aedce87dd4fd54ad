"""The Walsh-Hadamard transform of many blocks at once, as butterflies in a fixed order.

H of order n = 2^k, unnormalised, Sylvester's order: for h = 1, 2, 4, …, n/2 every pair (a, b) at places (i, i + h)
becomes (a + b, a - b). Each entry of the result is one fixed tree of additions, so the bits do not depend on how the
work is laid out; a matrix product would add in another order.

A torch operation is fast where the pairs lie far apart, in long contiguous runs. So blocks come last in memory: K
blocks of n entries are an (n, K) array, in which a stage is one addition and one subtraction of runs of h K entries.
With few long blocks the runs of the small strides would still be short; then t = high * L + low is split, the strides
below L work on a (low, high, K) array and the others, after one transposition, on (high, low, K). Callers prepare signs
and indices in that order once, hence no transposition is needed before the first stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_LONG_RUN = 64


@dataclass(frozen=True)
class BlocksLast:
    """The torch form for K blocks of n entries: natural order (K, n), head order (low, high, K), tail order (n, K)."""

    K: int
    n: int
    tile: int
    """Entries that stay in the cache; longer arrays are worked through in tiles of columns."""

    @property
    def low(self) -> int:
        """L above: the strides below it come first."""
        return self.n if self.K >= _LONG_RUN else 1 << ((self.n.bit_length() - 1 + 1) // 2)

    def head(self, x: Tensor) -> Tensor:
        """Bring natural order, (K, n) or (1, n) for all blocks alike, to head order: a view (low, high, K or 1)."""
        return x.view(-1, self.n // self.low, self.low).permute(2, 1, 0)

    def head_sum(self, x: Tensor) -> Tensor:
        """Sum a flat array in head order over the blocks: (n,)."""
        return x.view(self.low, self.n // self.low, self.K).sum(dim=2).t().reshape(self.n)

    def tail_position(self, t: Tensor, block: Tensor) -> Tensor:
        """Flat place of entry t of a block in tail order."""
        return t * self.K + block

    def to_tail(self, x: Tensor, out: Tensor) -> None:
        """Copy natural order (K, n) into a flat array in tail order."""
        out.view(self.n, self.K).copy_(x.t()) if self.K > 1 else out.copy_(x[0])

    def from_tail(self, x: Tensor, out: Tensor) -> None:
        """Copy a flat array in tail order into natural order (K, n)."""
        out.copy_(x.view(self.n, self.K).t() if self.K > 1 else x)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """H of a flat x in head order; y is scratch of the same size. Returns the result in tail order, and scratch."""
        high = self.n // self.low
        x, y = self._stages(x, y, self.low, descending=False)
        if high > 1:
            y.view(high, self.low, self.K).squeeze(-1).copy_(x.view(self.low, high, self.K).squeeze(-1).transpose(0, 1))
            x, y = self._stages(y, x, high, descending=False)
        return x, y

    def backward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """H the other way round, from tail order to head order: the large strides first."""
        high = self.n // self.low
        if high > 1:
            x, y = self._stages(x, y, high, descending=True)
            y.view(self.low, high, self.K).squeeze(-1).copy_(x.view(high, self.low, self.K).squeeze(-1).transpose(0, 1))
            x, y = y, x
        return self._stages(x, y, self.low, descending=True)

    def _stages(self, x: Tensor, y: Tensor, m: int, *, descending: bool) -> tuple[Tensor, Tensor]:
        """All log2 m stages along the first dimension of an (m, …) array."""
        strides = [1 << i for i in range(m.bit_length() - 1)]
        if descending:
            strides.reverse()
        columns = x.numel() // m
        width = max(_LONG_RUN, self.tile // m)
        if columns <= width:
            for h in strides:
                _stage(x.view(m, columns), y.view(m, columns), h)
                x, y = y, x
            return x, y
        if not strides:
            return x, y
        for start in range(0, columns, width):
            cut = slice(start, min(start + width, columns))
            here, there = x.view(m, columns)[:, cut], y.view(m, columns)[:, cut]
            scratch = [torch.empty(m, cut.stop - cut.start, dtype=x.dtype, device=x.device) for _ in range(2)]
            for i, h in enumerate(strides):
                target = there if i == len(strides) - 1 else scratch[i % 2]
                _stage(here, target, h)
                here = target
        return y, x


def _stage(x: Tensor, y: Tensor, h: int) -> None:
    pairs, target = (a.view(-1, 2, h, a.shape[1]) for a in (x, y))
    torch.add(pairs[:, 0], pairs[:, 1], out=target[:, 0])
    torch.sub(pairs[:, 0], pairs[:, 1], out=target[:, 1])


def hadamard(x: Tensor) -> Tensor:
    """H x for an (n, m) matrix, plainly."""
    y = torch.empty_like(x)
    for i in range(x.shape[0].bit_length() - 1):
        _stage(x, y, 1 << i)
        x, y = y, x if i else torch.empty_like(x)
    return x


@dataclass(frozen=True)
class BlocksFirst:
    """The same interface over an in-place transform of natural order (K, n), such as a compiled one."""

    K: int
    n: int
    transform: object
    """Callable (x (K, n) contiguous, n) -> bool, in place."""

    def head(self, x: Tensor) -> Tensor:
        """Natural order is head order."""
        return x

    def head_sum(self, x: Tensor) -> Tensor:
        """Sum over the blocks: (n,)."""
        return x.view(self.K, self.n).sum(dim=0)

    def tail_position(self, t: Tensor, block: Tensor) -> Tensor:
        """Flat place of entry t of a block."""
        return block * self.n + t

    def to_tail(self, x: Tensor, out: Tensor) -> None:
        """Copy (K, n) into a flat array."""
        out.view(self.K, self.n).copy_(x)

    def from_tail(self, x: Tensor, out: Tensor) -> None:
        """Copy a flat array into (K, n)."""
        out.copy_(x.view(self.K, self.n))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """H in place; y is not touched."""
        if not self.transform(x.view(self.K, self.n), self.n):  # type: ignore[operator]
            raise RuntimeError("the compiled transform accepted a probe and refused the work")
        return x, y

    backward = forward


Layout = BlocksLast | BlocksFirst
