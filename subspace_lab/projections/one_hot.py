"""One nonzero in each row: every weight follows one coordinate, with a sign (the P of Uni-LoRA, and of HashedNets).

Definition, version 1::

    v = keyed bijection of {0 … D-1} (`projections.words`) of derive_key("one_hot/1/Pi", seed), at i
    row i has its one entry in column v mod d_max, of sign = Rademacher entry i of derive_key("one_hot/1/S", seed)
    a column j holds r_j = ceil((D - j) / d_max) rows;  P_ij = ± c_j, c_j = 1 / sqrt(double(r_j))
    lift: y_i = ± (z_j · dtype(c_j)), out = base + y

Columns have length 1 and do not overlap: PᵀP = I exactly for every D, and P is orthogonal for d = D. As d_max fixes the
assignment, rows of columns d … d_max - 1 do not move at all: compare dimensions with d_max = d unless nestedness is
wanted.

Kept: one int32 per row (int64 from 2^30 columns), the column, plus d_max where the sign is negative.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from subspace_lab.linalg.random import derive_key
from subspace_lab.projections.base import Projection, add_base, chunk_size, spans
from subspace_lab.projections.fixed_point import from_fixed, inverse_roots, to_fixed
from subspace_lab.projections.words import permuted, signs


class OneHot(Projection):
    """See the module's docstring. Arguments as for `Projection`."""

    name = "one_hot"

    def __init__(self, *, D: int, d: int, seed: int, d_max: int | None = None) -> None:
        super().__init__(D=D, d=d, seed=seed, d_max=d_max)
        self.keys = tuple(derive_key(f"{self.name}/{self.version}/{part}", seed) for part in ("Pi", "S"))

    @override
    def _lift(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        w = pad(z * self._scales(z), (0, self.d_max - self.d))
        both = torch.cat([w, -w])
        for first, a, b in self._chunks(start, stop, z.device):
            y = both.index_select(0, self._codes(first, z.device)[a - first : b - first])
            part = slice(a - start, b - start)
            add_base(None if base is None else base[part], y, out[part])

    @override
    def _project(self, g: Tensor, out: Tensor, start: int, stop: int) -> None:
        if g.device.type == "cpu":
            total = self._sum(g, start, stop)
        else:
            # Float atomics add in any order, integer ones give one result.
            q, shift = to_fixed(g, stop - start)
            total = from_fixed(self._sum(q, start, stop), shift).to(g.dtype)
        out.copy_(total * self._scales(g))

    def _sum(self, g: Tensor, start: int, stop: int) -> Tensor:
        total = g.new_zeros(2 * self.d_max)
        for first, a, b in self._chunks(start, stop, g.device):
            total.index_add_(0, self._codes(first, g.device)[a - first : b - first], g[a - start : b - start])
        return (total[: self.d_max] - total[self.d_max :])[: self.d]

    @override
    def _matrix(self, start: int, stop: int, device: torch.device) -> Tensor:
        codes = torch.cat(
            [self._codes(first, device)[a - first : b - first] for first, a, b in self._chunks(start, stop, device)]
        )
        column = codes.long() % self.d_max
        values = torch.where(codes < self.d_max, 1.0, -1.0).double() * self._scales(column.double(), self.d_max)[column]
        P = torch.zeros(stop - start, self.d_max, dtype=torch.float64, device=device)
        return P.scatter_(1, column.unsqueeze(1), values.unsqueeze(1))[:, : self.d]

    def _scales(self, like: Tensor, columns: int | None = None) -> Tensor:
        """c, in the dtype and on the device of `like`, (columns,)."""

        def make() -> tuple[Tensor, ...]:
            j = torch.arange(columns or self.d, dtype=torch.int64)
            rows = torch.div(self.D - j + self.d_max - 1, self.d_max, rounding_mode="floor")
            return (inverse_roots(rows).to(like.dtype).to(like.device),)

        return self._cache.get(("scales", columns, like.dtype, like.device), make)[0]

    def _chunks(self, start: int, stop: int, device: torch.device) -> list[tuple[int, int, int]]:
        """First row of each chunk, and the part of it that is asked for."""
        size = chunk_size(device)
        return [(a // size * size, a, b) for a, b in spans(start, stop, size)]

    def _codes(self, first: int, device: torch.device) -> Tensor:
        def make() -> tuple[Tensor, ...]:
            last = min(self.D, first + chunk_size(device))
            column = permuted(self.keys[0], self.D, first, last, device) % self.d_max
            code = column + self.d_max * (signs(self.keys[1], first, last - first, device) < 0)
            return (code.to(torch.int32 if self.d_max < 2**30 else torch.int64),)

        return self._cache.get((first, device), make)[0]
