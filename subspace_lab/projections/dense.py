"""Projections with an independent random entry everywhere: dense (±1) and gaussian (centred binomials).

Definition, version 1 (words, Rademacher entries, `derive_key`: `subspace_lab.linalg.random`)::

    dense:    a_ij = Rademacher entry i 2^32 + j of derive_key("dense/1", seed);  c_j = 1 / sqrt(double(D))
    gaussian: a_ij = 2 (number of one bits among the lower 7 bits of byte j mod 4 of word i 2^30 + floor(j / 4) of
              derive_key("gaussian/1", seed)) - 7, byte 0 being the lowest;  c_j = 1 / sqrt(double(Σ_i a_ij²))
              (odd, so that no column is zero; variance 7, excess kurtosis -2/7)
    P_ij = a_ij c_j in IEEE double; all columns have length 1
    lift: P z, the scale applied to z:  u_j = double(z_j) c_j, out = base + Σ_j a_ij u_j
    lift_exact: the sum in fixed point (`projections.fixed_point`, terms = d_max, for gaussian 7 d_max), then rounded

Nothing is stored but, as a cache, the float32 matrix a if it takes 100 MB or less; otherwise blocks of rows are made
again in every product. The reference for the fast families, and no more: D d operations where those need D log d.
gaussian needs one pass over all of P for its scales before the first product.
"""

from __future__ import annotations

from abc import abstractmethod
from math import sqrt

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.linalg.random import derive_key
from subspace_lab.projections import seam
from subspace_lab.projections.base import CPU_CHUNK, Projection, add_base, chunk_size, spans
from subspace_lab.projections.fixed_point import from_fixed, inverse_roots, to_fixed
from subspace_lab.projections.words import bit_counts, split, words

STORED_BYTES = 100_000_000


class DenseProjection(Projection):
    """What the two share: products with regenerated blocks of rows."""

    largest: int
    """Largest |a_ij|."""

    def __init__(self, *, D: int, d: int, seed: int, d_max: int | None = None) -> None:
        super().__init__(D=D, d=d, seed=seed, d_max=d_max)
        self.key = derive_key(f"{self.name}/{self.version}", seed)

    @abstractmethod
    def _entries(self, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """a[start:stop], (stop - start, d)."""

    @abstractmethod
    def _column_scales(self, device: torch.device) -> Tensor:
        """c, float64 (d,)."""

    def _blocks(self, start: int, stop: int, device: torch.device) -> list[tuple[int, int, int, int]]:
        """Aligned blocks of rows that are multiplied as a whole, and the part of each that is asked for.

        A library may add up a row differently in a matrix of another height: so it never sees one.
        """
        # Four times as much as elsewhere: the hash is many operations on few words.
        size = max(1, 4 * chunk_size(device) // self.d)
        parts = spans(start, stop, size)
        return [(a // size * size, min(self.D, a // size * size + size), a, b) for a, b in parts]

    def _rows(self, first: int, last: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if dtype != torch.float32 or 4 * self.D * self.d > STORED_BYTES:
            return self._entries(first, last, dtype, device)
        return self._cache.get((first, last, device), lambda: (self._entries(first, last, dtype, device),))[0]

    @override
    def _lift(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        u = (z.double() * self._column_scales(z.device)).to(z.dtype)
        for first, last, a, b in self._blocks(start, stop, z.device):
            y = torch.mv(self._rows(first, last, z.dtype, z.device), u)[a - first : b - first]
            part = slice(a - start, b - start)
            add_base(None if base is None else base[part], y, out[part])

    @override
    def _lift_exact(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        q, shift = to_fixed(z.double() * self._column_scales(z.device), self.largest * self.d_max)
        for first, last, a, b in self._blocks(start, stop, z.device):
            total = (self._entries(first, last, torch.int64, z.device) * q).sum(dim=1)[a - first : b - first]
            part = slice(a - start, b - start)
            add_base(None if base is None else base[part], from_fixed(total, shift).to(z.dtype), out[part])

    @override
    def _project(self, g: Tensor, out: Tensor, start: int, stop: int) -> None:
        out.zero_()
        for first, last, a, b in self._blocks(start, stop, g.device):
            out += torch.mv(
                self._rows(first, last, g.dtype, g.device)[a - first : b - first].t(), g[a - start : b - start]
            )
        out.copy_(out.double() * self._column_scales(g.device))

    @override
    def _matrix(self, start: int, stop: int, device: torch.device) -> Tensor:
        return self._entries(start, stop, torch.float64, device) * self._column_scales(device)

    def _bytes(self, start: int, stop: int, row_words: int, count: int, device: torch.device) -> Tensor:
        """Words 0 … count - 1 of the rows, int32 (rows, count); row i begins at word i * row_words (a power of two)."""
        high, low = split(torch.arange(start, stop, device=device).unsqueeze(1) * row_words)
        return words(self.key, high, low + torch.arange(count, dtype=torch.int32, device=device))


class Dense(DenseProjection):
    """Signs. See the module's docstring."""

    name = "dense"
    largest = 1

    @override
    def _entries(self, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        octets = self._bytes(start, stop, 2**27, (self.d + 31) // 32, device).view(torch.uint8)
        shifts = torch.arange(8, dtype=torch.uint8, device=device)
        table = 1 - 2 * ((torch.arange(256, dtype=torch.uint8, device=device).unsqueeze(1) >> shifts) & 1).to(dtype)
        rows = table.index_select(0, octets.flatten().to(torch.int32)).view(stop - start, -1)
        return rows[:, : self.d]

    @override
    def _column_scales(self, device: torch.device) -> Tensor:
        return torch.full((self.d,), self._scale(), dtype=torch.float64, device=device)

    def _scale(self) -> float:
        return 1 / sqrt(self.D)

    @override
    def _lift(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        if base is not None and base.data_ptr() == out.data_ptr():
            base = base.clone()  # the kernel uses `out` for partial sums
        if not seam.call("sign_lift", z, base, out, self.D, self.key, self._scale(), rows=(start, stop)):
            super()._lift(z, base, out, start, stop)

    @override
    def _project(self, g: Tensor, out: Tensor, start: int, stop: int) -> None:
        if not seam.call("sign_project", g, out, self.D, self.key, self._scale(), rows=(start, stop)):
            super()._project(g, out, start, stop)


class Gaussian(DenseProjection):
    """Centred binomials. See the module's docstring."""

    name = "gaussian"
    largest = 7

    @override
    def _entries(self, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        counts = bit_counts(self._bytes(start, stop, 2**30, (self.d + 3) // 4, device) & 0x7F7F7F7F)
        values = counts.view(torch.int8).mul_(2).sub_(7)
        return values.flatten(start_dim=1)[:, : self.d].to(dtype)

    @override
    def _column_scales(self, device: torch.device) -> Tensor:
        return self._cache.get(("scales", device), lambda: (self._make_scales(device),))[0]

    def _make_scales(self, device: torch.device) -> Tensor:
        squares = torch.zeros(self.d, dtype=torch.int64, device=device)
        for a, b in spans(0, self.D, max(1, 4 * CPU_CHUNK // self.d)):
            # Integers: exact in float64 in any order.
            squares += (
                self._entries(a, b, torch.float32, device).square_().sum(dim=0, dtype=torch.float64).to(torch.int64)
            )
        return inverse_roots(squares)
