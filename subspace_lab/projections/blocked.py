"""Projections of two Walsh-Hadamard transforms: orthoblock, fastfood_blocked and fastfood.

All three are c_b · H · G_b · Π_b · H · B_b · pad(z), one such n × n block below the other, and differ in n and in the
diagonal G. Definition, version 1 (words, Rademacher entries, `derive_key`: `subspace_lab.linalg.random`)::

    n = next power of two of d_max (orthoblock, fastfood_blocked) or of D (fastfood: one block)
    block b = 0 … ceil(D / n) - 1 makes rows b n … b n + n - 1, the last one cut at D
    out = base + c_b · H(G_b ⊙ Π_b(H(B_b ⊙ pad(z, n))))
    B_b[t] = Rademacher entry b n + t of derive_key("<name>/1/B", seed)
    (Π_b v)[t] = v[π_b(t)], π_b = member b of the bijections (`projections.words`) of derive_key("<name>/1/Pi", seed)
    G_b[t]: orthoblock: Rademacher entry b n + t of derive_key("orthoblock/1/S", seed)
            fastfood…:  2 (number of one bits among bits 1 … 31 of word b n + t of derive_key("<name>/1/G", seed)) - 31
    c_b = 1 / sqrt(double(D) · double(Σ_t G_b[t]²)) in IEEE double, rounded to the dtype; Σ over all n entries
    H: unnormalised, butterflies with strides 1, 2, 4, … (`projections.butterfly`); every operation rounds once

fastfood is the layout of the public release of Li et al. (ICLR 2018, arXiv 1804.08838), y[:D] / (sqrt(n ΣG²) sqrt(D /
n)), with a centred binomial (odd, so never zero; excess kurtosis -2/31) in place of a library's normal numbers.
fastfood_blocked is the layout of Le, Sarlós, Smola (ICML 2013): gathers stay in the cache. orthoblock has signs for G,
so that each full block is a multiple of an orthogonal matrix: PᵀP = I up to the last, cut block, exactly if n divides
D.

Columns have length 1 exactly over full blocks, and within sampling error (about 1e-2 for small D / n) with a cut one.
All columns of a block share Σ G², so every block carries its share n / D of each column's energy: no layer is favoured.

`project` adds what the blocks of a chunk contribute in torch's own order of summation, then the chunks in ascending
order. fastfood computes its one block whatever rows are asked for.
"""

from __future__ import annotations

from math import sqrt
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.projections import seam
from subspace_lab.projections.base import CPU_CHUNK, Projection, add_base, chunk_size, next_power_of_two, spans
from subspace_lab.projections.butterfly import BlocksFirst, BlocksLast, Layout, hadamard
from subspace_lab.projections.fixed_point import inverse_roots
from subspace_lab.projections.words import bijection, bit_counts, signs, word_range


class BlockHadamard(Projection):
    """What the three share. Arguments as for `Projection`."""

    diagonal: ClassVar[str] = "G"

    def __init__(self, *, D: int, d: int, seed: int, d_max: int | None = None) -> None:
        super().__init__(D=D, d=d, seed=seed, d_max=d_max)
        self.n = self._block_size()
        self.blocks = -(-D // self.n)
        self.keys = tuple(derive_key(f"{self.name}/{self.version}/{part}", seed) for part in ("B", self.diagonal, "Pi"))

    def _block_size(self) -> int:
        return next_power_of_two(self.d_max)

    def _diagonal(self, first: int, count: int, device: torch.device) -> Tensor:
        """Entries of G, int8 (count,)."""
        upper = word_range(self.keys[1], first, count, device) & -2
        return 2 * bit_counts(upper).sum(dim=1, dtype=torch.int8) - 31

    # -- products ------------------------------------------------------------------------------------------------------

    @override
    def _lift(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        padded = pad(z, (0, self.n - self.d)).view(1, self.n)
        for first, last in self._chunks(start, stop, z.device):
            layout = self._layout(last - first, z)
            B, index, G, c = self._state(layout, first, z.dtype, z.device)
            x, y = z.new_empty(layout.K * self.n), z.new_empty(layout.K * self.n)
            torch.mul(B, layout.head(padded), out=x.view(B.shape))
            x, y = layout.forward(x, y)
            torch.index_select(x, 0, index, out=y)
            x, y = layout.forward(y.mul_(G), x)
            layout.from_tail(x, y.view(layout.K, self.n))
            y.view(layout.K, self.n).mul_(c)
            a, b = max(start, first * self.n), min(stop, last * self.n)
            made = y[a - first * self.n : b - first * self.n]
            part = slice(a - start, b - start)
            add_base(None if base is None else base[part], made, out[part])

    @override
    def _project(self, g: Tensor, out: Tensor, start: int, stop: int) -> None:
        total = g.new_zeros(self.n)
        for first, last in self._chunks(start, stop, g.device):
            layout = self._layout(last - first, g)
            B, index, G, c = self._state(layout, first, g.dtype, g.device)
            x, y = g.new_empty(layout.K * self.n), g.new_empty(layout.K * self.n)
            a, b = max(start, first * self.n), min(stop, last * self.n)
            x[: a - first * self.n] = 0
            x[b - first * self.n :] = 0
            x[a - first * self.n : b - first * self.n] = g[a - start : b - start]
            x.view(layout.K, self.n).mul_(c)
            layout.to_tail(x.view(layout.K, self.n), y)
            x, y = layout.backward(y, x)
            x.mul_(G)
            for a, b in spans(0, len(index), chunk_size(g.device)):
                y.scatter_(0, index[a:b].long(), x[a:b])  # indices are unique: no order to speak of
            x, y = layout.backward(y, x)
            total += layout.head_sum(x.view(B.shape).mul_(B).view(-1))
        out.copy_(total[: self.d])

    @override
    def _matrix(self, start: int, stop: int, device: torch.device) -> Tensor:
        # Entries of H G Π H B are sums of fewer than 2^53 units: exact in float64 by any route.
        out = torch.empty(stop - start, self.d, dtype=torch.float64, device=device)
        width = min(self.d, max(1, CPU_CHUNK // self.n))
        for a, b in spans(start, stop, self.n * max(1, CPU_CHUNK // (self.n * width))):
            first, K = a // self.n, -(-b // self.n) - a // self.n
            *integers, c = self._integers(first, K, device)
            B, places, G = (x.T for x in integers)
            index = places.long().unsqueeze(2)
            for left in range(0, self.d, width):
                columns = torch.arange(left, min(left + width, self.d), device=device)
                x = torch.zeros(self.n, K, len(columns), dtype=torch.float64, device=device)
                x[columns, :, columns - left] = B[columns].double()
                x = hadamard(x.flatten(1)).view_as(x).gather(0, index.expand_as(x))
                y = hadamard((x * G.unsqueeze(2)).flatten(1)).view_as(x) * c.unsqueeze(1)
                rows = y.transpose(0, 1).flatten(0, 1)[a - first * self.n : b - first * self.n]
                out[a - start : b - start, left : left + width] = rows
        return out

    # -- state ---------------------------------------------------------------------------------------------------------

    def _chunks(self, start: int, stop: int, device: torch.device) -> list[tuple[int, int]]:
        """Blocks to work on together, always the same ones whatever rows are asked for."""
        size = max(1, chunk_size(device) // self.n)
        first, last = start // self.n // size * size, -(-stop // self.n)
        return [(a, min(a + size, self.blocks)) for a, _ in spans(first, last, size)]

    def _layout(self, K: int, like: Tensor) -> Layout:
        if seam.transforms(self.n, like.dtype, like.device):
            return BlocksFirst(K, self.n, lambda x, n: seam.call("fwht_", x, n))
        return BlocksLast(K, self.n, chunk_size(like.device))

    def _state(
        self, layout: Layout, first: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Signs B (head order), gather index (flat), diagonal G (flat, head order), scale (K, 1): 6 bytes per entry."""

        def make() -> tuple[Tensor, ...]:
            return self._make_state(layout, first, device)

        key = (type(layout), first, layout.K, device)
        B, index, G, c = self._cache.get(key, make)
        return B, index, G, c.to(dtype)

    def _make_state(self, layout: Layout, first: int, device: torch.device) -> tuple[Tensor, ...]:
        B, places, G, c = self._integers(first, layout.K, device)
        blocks = torch.arange(layout.K, dtype=torch.int32, device=device).unsqueeze(1)
        index = layout.tail_position(places, blocks)
        return layout.head(B).contiguous(), layout.head(index).reshape(-1), layout.head(G).reshape(-1), c.unsqueeze(1)

    def _integers(self, first: int, K: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """B int8, π int32 and G int8, each (K, n), and c float64 (K,), of blocks first … first + K - 1."""
        n = self.n
        B, G = (torch.empty(K, n, dtype=torch.int8, device=device) for _ in range(2))
        places = torch.empty(K, n, dtype=torch.int32, device=device)
        for a, b in spans(0, K * n, chunk_size(device)):
            B.view(-1)[a:b] = signs(self.keys[0], first * n + a, b - a, device)
            G.view(-1)[a:b] = self._diagonal(first * n + a, b - a, device)
        squares = torch.zeros(K, dtype=torch.int64, device=device)
        members = torch.arange(first, first + K, device=device).unsqueeze(1)
        for a, b in spans(0, n, max(1, chunk_size(device) // K)):
            t = torch.arange(a, b, dtype=torch.int32, device=device)
            places[:, a:b] = bijection(self.keys[2], n.bit_length() - 1, t, members)
            squares += G[:, a:b].to(torch.int16).square_().sum(dim=1, dtype=torch.int64)
        return B, places, G, inverse_roots(squares, float(self.D))


class Fastfood(BlockHadamard):
    """One global block, as released. See the module's docstring."""

    name = "fastfood"

    @override
    def _block_size(self) -> int:
        if self.D > 2**31:
            raise UserError("projection fastfood has one block of at most 2^31 rows", hint="take fastfood_blocked")
        return next_power_of_two(self.D)


class FastfoodBlocked(BlockHadamard):
    """Blocks of the size of the subspace, with a Gaussian-like diagonal. See the module's docstring."""

    name = "fastfood_blocked"


class Orthoblock(BlockHadamard):
    """Blocks with signs on the diagonal: orthogonal. See the module's docstring."""

    name = "orthoblock"
    diagonal = "S"

    @override
    def _diagonal(self, first: int, count: int, device: torch.device) -> Tensor:
        return signs(self.keys[1], first, count, device)

    @override
    def _lift(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        keys, c = self.keys, self._scale(z.dtype)
        if not seam.call("orthoblock_lift", z, base, out, self.D, self.n, keys, c, rows=(start, stop)):
            super()._lift(z, base, out, start, stop)

    @override
    def _project(self, g: Tensor, out: Tensor, start: int, stop: int) -> None:
        keys, c = self.keys, self._scale(g.dtype)
        if not seam.call("orthoblock_project", g, out, self.D, self.n, keys, c, rows=(start, stop)):
            super()._project(g, out, start, stop)

    def _scale(self, dtype: torch.dtype) -> float:
        """1 / sqrt(D n), rounded to the dtype."""
        return float(torch.tensor(1 / sqrt(float(self.D) * float(self.n)), dtype=torch.float64).to(dtype))
