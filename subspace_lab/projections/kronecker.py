"""Kronecker product of two small sign matrices with orthogonal columns, its rows permuted and signed.

Definition, version 1::

    N = 2^k, next power of two of D;  p1 = 2^ceil(k/2), p2 = 2^floor(k/2)
    d2 = min(p2, next power of two of ceil(sqrt(d_max))), d1 = ceil(d_max / d2)
    A (p1, d1): A[r, a] = (-1)^popcount(r & α(a)),  α = member 0 of the keyed bijections of log2(p1) bits
    C (p2, d2): C[r, b] = (-1)^popcount(r & γ(b)),  γ likewise, of log2(p2) bits
    v = member 0 of the bijections of k bits, at i
    row i < D of P is s_i c (row floor(v / p2) of A) ⊗ (row v mod p2 of C)
    keys derive_key("kronecker/1/A" | "C" | "Pi", seed); s_i = Rademacher entry i of derive_key("kronecker/1/S", seed)
    column j is (a, b) = (floor(j / d2), j mod d2);  c = 1 / sqrt(double(D));  bijections: `projections.words`
    lift: Y = A Z Cᵀ with Z = z in rows of d2, padded with zeros;  out = base + s_i (c Y[v])
    lift_exact: the same sums in fixed point of u = double(z) c (`projections.fixed_point`, terms = d_max), then rounded

All entries are ±1/sqrt(D), so columns have length 1. A and C are columns of Hadamard matrices, so before D of the N
rows are taken the columns are orthogonal; afterwards |PᵀP - I| is of the order sqrt((1 - D / N) / D), and P is
orthogonal if d = D = N.

Fastest as two small matrix products, p1 d1 d2 + p1 d2 p2 multiplications; what remains is the gather through the
permutation of all rows, which is what separates neighbouring weights (without it a layer would see few different rows
of A). It leaves the cache for large D, where orthoblock is faster. Y (N entries) is made whatever rows are asked for.
Kept: one int32 per row (int64 above 2^31), v with all bits flipped where the sign is negative.
"""

from __future__ import annotations

from math import isqrt, sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad
from typing_extensions import override

from subspace_lab.linalg.precision import matmul
from subspace_lab.linalg.random import derive_key
from subspace_lab.projections.base import Projection, add_base, chunk_size, next_power_of_two, spans
from subspace_lab.projections.fixed_point import from_fixed, to_fixed
from subspace_lab.projections.words import bijection, bit_counts, permuted, signs


class Kronecker(Projection):
    """See the module's docstring. Arguments as for `Projection`."""

    name = "kronecker"

    def __init__(self, *, D: int, d: int, seed: int, d_max: int | None = None) -> None:
        super().__init__(D=D, d=d, seed=seed, d_max=d_max)
        k = (D - 1).bit_length()
        self.p1, self.p2 = 1 << ((k + 1) // 2), 1 << (k // 2)
        self.d2 = min(self.p2, next_power_of_two(isqrt(self.d_max - 1) + 1))
        self.d1 = -(-self.d_max // self.d2)
        self.scale = 1 / sqrt(D)
        self.keys = {part: derive_key(f"{self.name}/{self.version}/{part}", seed) for part in ("A", "C", "Pi", "S")}

    @override
    def _lift(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        A, C = self._factors(z)
        Y = matmul(matmul(A, self._square(z)), C.t()).flatten().mul_(self.scale)
        self._gather(Y, base, out, start, stop)

    @override
    def _lift_exact(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        q, shift = to_fixed(z.double() * self.scale, self.d_max)
        A, C = self._factors(q)
        # Integer matrix products exist on the CPU only; sums of broadcast products are exact everywhere.
        half = torch.stack([(A * column).sum(dim=1) for column in self._square(q).t()])
        Y = torch.zeros(self.p1, self.p2, dtype=torch.int64, device=z.device)
        for b in range(self.d2):
            Y.addcmul_(half[b].unsqueeze(1), C[:, b])
        self._gather(from_fixed(Y, shift).to(z.dtype).flatten(), base, out, start, stop)

    def _gather(self, Y: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        for a, b in spans(start, stop, chunk_size(Y.device)):
            place, sign = self._rows(a, b, Y.device)
            part = slice(a - start, b - start)
            add_base(None if base is None else base[part], Y.index_select(0, place).mul_(sign), out[part])

    @override
    def _project(self, g: Tensor, out: Tensor, start: int, stop: int) -> None:
        A, C = self._factors(g)
        Y = g.new_zeros(self.p1 * self.p2)
        for a, b in spans(start, stop, chunk_size(g.device)):
            place, sign = self._rows(a, b, g.device)
            Y.scatter_(0, place.long(), g[a - start : b - start] * sign)
        Z = matmul(A.t(), matmul(Y.view(self.p1, self.p2), C))
        out.copy_(Z.flatten()[: self.d].mul_(self.scale))

    @override
    def _matrix(self, start: int, stop: int, device: torch.device) -> Tensor:
        A, C = self._factors(torch.empty(0, dtype=torch.float64, device=device))
        pieces = []
        for a, b in spans(start, stop, chunk_size(device)):
            place, sign = self._rows(a, b, device)
            place = place.long()
            rows = A[place // self.p2].unsqueeze(2) * C[place % self.p2].unsqueeze(1)
            pieces.append(rows.flatten(start_dim=1)[:, : self.d] * sign.unsqueeze(1) * self.scale)
        return torch.cat(pieces)

    def _square(self, z: Tensor) -> Tensor:
        return pad(z, (0, self.d1 * self.d2 - self.d)).view(self.d1, self.d2)

    def _factors(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and C in the dtype and on the device of `like`."""

        def make() -> tuple[Tensor, ...]:
            sides = (("A", self.p1, self.d1), ("C", self.p2, self.d2))
            return tuple(hadamard_columns(self.keys[part], p, d, like) for part, p, d in sides)

        A, C = self._cache.get(("factors", like.dtype, like.device), make)
        return A, C

    def _rows(self, start: int, stop: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Places in Y, and signs, int8, of rows that lie in one chunk."""
        first = start // chunk_size(device) * chunk_size(device)
        last = min(self.D, first + chunk_size(device))

        def make() -> tuple[Tensor, ...]:
            place = permuted(self.keys["Pi"], self.p1 * self.p2, first, last, device)
            return (torch.where(signs(self.keys["S"], first, last - first, device) < 0, ~place, place),)

        code = self._cache.get(("rows", first, device), make)[0][start - first : stop - first]
        negative = code >> (8 * code.element_size() - 1)
        return code ^ negative, negative.to(torch.int8) | 1


def hadamard_columns(key: int, p: int, d: int, like: Tensor) -> Tensor:
    """Columns κ(0) … κ(d-1) of the Sylvester matrix of order p, κ = member 0 of the keyed bijections: (p, d) of ±1."""
    index = torch.arange(p, dtype=torch.int32, device=like.device)
    bits = bit_counts(index.unsqueeze(1) & bijection(key, p.bit_length() - 1, index[:d])).sum(dim=-1) & 1
    return (1 - 2 * bits).to(like.dtype)
