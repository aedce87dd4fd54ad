"""Very sparse projection: about sqrt(D) entries ±1/sqrt(m) in each column, global density 1/sqrt(D).

Li, Hastie, Church, "Very sparse random projections" (KDD 2006), with the number of entries of a column fixed, so that
its length is exactly 1, and one entry in each of m strata of rows, so that no cell is drawn twice. Definition, version
1::

    m = floor(sqrt(D) + 1/2) in integers (isqrt(4 D) + 1) // 2
    stratum t = 0 … m-1 is rows floor(t D / m) … floor((t + 1) D / m) - 1; s_t their number
    w = word t 2^32 + j of derive_key("sparse/1", seed)      (column j)
    column j has in stratum t one entry, in row floor(t D / m) + floor(w s_t / 2^32), of sign 1 - 2 (w mod 2)
    P_ij = ± c, c = 1 / sqrt(double(m))
    lift: y_i = Σ over the row's columns in ascending order (CPU; elsewhere in fixed point), out = base + c y
    lift_exact: u = double(z) c, the sum in fixed point (`projections.fixed_point`, terms = d_max), rounded to the dtype

With d far below sqrt(D) most rows are empty: exp(-d / sqrt(D)) of the weights do not move (18.6 % at d = 750, D =
199,210).

Kept: for each stratum d row numbers (int32) and signs (int8), 5 d sqrt(D) bytes up to a gigabyte, beyond which they are
made again each time. One form serves both products: a stratum's rows are few and lie together, so scattering to them
and gathering from them stay in the cache (index_add: 0.5 ms; the transposed copy with segment sums or a CSR product:
1.7 to 2.4 ms). Rows are addressable: a range of rows is a range of strata.
"""

from __future__ import annotations

from math import isqrt, sqrt

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.linalg.random import derive_key
from subspace_lab.projections.base import Projection, add_base, chunk_size
from subspace_lab.projections.fixed_point import from_fixed, to_fixed
from subspace_lab.projections.words import words


class Sparse(Projection):
    """See the module's docstring. Arguments as for `Projection`."""

    name = "sparse"

    def __init__(self, *, D: int, d: int, seed: int, d_max: int | None = None) -> None:
        super().__init__(D=D, d=d, seed=seed, d_max=d_max)
        self.m = (isqrt(4 * D) + 1) // 2
        self.scale = 1 / sqrt(self.m)
        self.key = derive_key(f"{self.name}/{self.version}", seed)

    @override
    def _lift(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        if z.device.type != "cpu":
            # Float atomics add in any order.
            return self._lift_exact(z, base, out, start, stop)
        scale = float(torch.tensor(self.scale, dtype=torch.float64).to(z.dtype))
        for first, last, low, high in self._chunks(start, stop, z.device):
            index, sign = self._state(first, last, z.device)
            y = z.new_zeros(high - low).index_add_(0, index.view(-1), (z * sign).view(-1)).mul_(scale)
            self._write(y, low, high, base, out, start, stop)
        return None

    @override
    def _lift_exact(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        q, shift = to_fixed(z.double() * self.scale, self.d_max)
        for first, last, low, high in self._chunks(start, stop, z.device):
            index, sign = self._state(first, last, z.device)
            total = q.new_zeros(high - low).index_add_(0, index.view(-1), (q * sign).view(-1))
            self._write(from_fixed(total, shift).to(z.dtype), low, high, base, out, start, stop)

    @staticmethod
    def _write(y: Tensor, low: int, high: int, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        """Rows low … high are made; write those of start … stop."""
        a, b = max(start, low), min(stop, high)
        part = slice(a - start, b - start)
        add_base(None if base is None else base[part], y[a - low : b - low], out[part])

    @override
    def _project(self, g: Tensor, out: Tensor, start: int, stop: int) -> None:
        out.zero_()
        for first, last, low, high in self._chunks(start, stop, g.device):
            index, sign = self._state(first, last, g.device)
            a, b = max(start, low), min(stop, high)
            part = g[a - start : b - start]
            if b - a < high - low:
                part = torch.nn.functional.pad(part, (a - low, high - b))
            out += part.index_select(0, index.view(-1)).view(index.shape).mul_(sign).sum(dim=0)
        out.mul_(self.scale)

    @override
    def _matrix(self, start: int, stop: int, device: torch.device) -> Tensor:
        P = torch.zeros(stop - start, self.d, dtype=torch.float64, device=device)
        columns = torch.arange(self.d, device=device)
        for first, last, low, _ in self._chunks(start, stop, device):
            index, sign = self._state(first, last, device)
            row, column = index.long() + low - start, columns.expand(index.shape)
            inside = (row >= 0) & (row < stop - start)
            P[row[inside], column[inside]] = sign[inside].double() * self.scale
        return P

    def _chunks(self, start: int, stop: int, device: torch.device) -> list[tuple[int, int, int, int]]:
        """Ranges of strata, and their rows, that together hold the given rows; always cut at the same places."""
        size = max(1, chunk_size(device) // self.d)
        # Row i lies in stratum ceil((i + 1) m / D) - 1, or equivalently floor(((i + 1) m - 1) / D).
        first, last = ((start + 1) * self.m - 1) // self.D, (stop * self.m - 1) // self.D
        cuts = [(t, min(t + size, self.m)) for t in range(first // size * size, last + 1, size)]
        return [(a, b, a * self.D // self.m, b * self.D // self.m) for a, b in cuts]

    def _state(self, first: int, last: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows, counted from the first of stratum `first`, int32, and signs, int8, each (strata, d)."""
        index, sign = self._cache.get((first, device), lambda: self._make_state(first, last, device))
        return index, sign

    def _make_state(self, first: int, last: int, device: torch.device) -> tuple[Tensor, ...]:
        bounds = torch.tensor([t * self.D // self.m for t in range(first, last + 1)], dtype=torch.int64)
        begin, size = (x.to(device).unsqueeze(1) for x in (bounds[:-1] - bounds[0], bounds.diff()))
        strata = torch.arange(first, last, dtype=torch.int32, device=device).unsqueeze(1)
        w = words(self.key, strata, torch.arange(self.d, dtype=torch.int32, device=device)).to(torch.int64) & 0xFFFFFFFF
        return (begin + ((w * size) >> 32)).to(torch.int32), (1 - 2 * (w & 1)).to(torch.int8)
