"""A subspace of its own for each layer: P block-diagonal, every column inside one layer.

Definition, version 1: layers are consecutive ranges of rows. Column j belongs to layer L(j)::

    the first m columns one to each layer, in order; each further one to the layer with the largest quotient
    size / (columns so far) in IEEE double, the first such layer if several, among those with fewer columns than rows

so the layers of the first d columns do not depend on d (nested), and each has columns in proportion to its size
(Jefferson's, or D'Hondt's, rule). Within layer l the columns are, in order, those of the projection of the given kind
with D = size_l, d_max = columns of l among d_max, and seed = derive_key("per_layer/1", seed, l): of length 1 over that
layer.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.projections.base import Projection
from subspace_lab.projections.kinds import create


class PerLayer(Projection):
    """Block-diagonal projection.

    Args:
        sizes: rows of each of the m layers.
        d: columns, m <= d <= d_max.
        d_max: columns of the nested family; default d.
        seed: any integer.
        kind: family used within the layers.

    Raises:
        UserError: fewer columns than layers, or an empty layer, or sizes out of range.
    """

    name = "per_layer"

    def __init__(
        self, sizes: Sequence[int], d: int, d_max: int | None = None, *, seed: int, kind: str = "orthoblock"
    ) -> None:
        super().__init__(D=sum(sizes), d=d, seed=seed, d_max=d_max)
        if min(sizes) < 1:
            raise UserError("a layer without parameters cannot have a subspace")
        if d < len(sizes):
            raise UserError(
                f"one subspace per layer needs d of at least the {len(sizes)} layers, got {d}",
                hint=f"method.d={len(sizes)} or more, or method.scope=global",
            )
        self.sizes, self.kind = tuple(sizes), kind
        self.layers = apportion(self.sizes, self.d_max)
        self.parts: list[Projection] = []
        for layer, size in enumerate(self.sizes):
            own, most = self.layers[:d].count(layer), self.layers.count(layer)
            key = derive_key(f"{self.name}/{self.version}", seed, layer)
            self.parts.append(create(kind, D=size, d=own, d_max=most, seed=key))
        order = sorted(range(d), key=lambda j: (self.layers[j], j))
        self._order = torch.tensor(order)

    @override
    def fingerprint(self) -> str:
        """Hex digest of what defines the nested family; d is not part of it."""
        parts = (self.name, self.version, self.parts[0].name, self.parts[0].version, self.sizes, self.d_max, self.seed)
        return hashlib.sha256("/".join(str(part) for part in parts).encode()).hexdigest()

    @override
    def state_bytes(self) -> int:
        """Bytes of regenerable integers kept at the moment."""
        return sum(part.state_bytes() for part in self.parts)

    @override
    def _lift(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        self._each(lambda part: part._lift, z, base, out, start, stop)

    @override
    def _lift_exact(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        self._each(lambda part: part._lift_exact, z, base, out, start, stop)

    def _each(
        self,
        kernel: Callable[[Projection], Callable[[Tensor, Tensor | None, Tensor, int, int], None]],
        z: Tensor,
        base: Tensor | None,
        out: Tensor,
        start: int,
        stop: int,
    ) -> None:
        grouped = z[self._sorted(z.device)]
        for part, columns, (first, a, b) in self._pieces(start, stop):
            rows = slice(a - start, b - start)
            own = None if base is None else base[rows]
            kernel(part)(grouped[columns], own, out[rows], a - first, b - first)

    @override
    def _project(self, g: Tensor, out: Tensor, start: int, stop: int) -> None:
        grouped = torch.zeros_like(out)
        for part, columns, (first, a, b) in self._pieces(start, stop):
            part._project(g[a - start : b - start], grouped[columns], a - first, b - first)
        out[self._sorted(g.device)] = grouped

    @override
    def _matrix(self, start: int, stop: int, device: torch.device) -> Tensor:
        grouped = torch.zeros(stop - start, self.d, dtype=torch.float64, device=device)
        for part, columns, (first, a, b) in self._pieces(start, stop):
            grouped[a - start : b - start, columns] = part._matrix(a - first, b - first, device)
        P = torch.empty_like(grouped)
        P[:, self._sorted(device)] = grouped
        return P

    def _sorted(self, device: torch.device) -> Tensor:
        """Columns in order of their layers; the copy to a device happens once."""
        if self._order.device != device:
            self._order = self._order.to(device)
        return self._order

    def _pieces(self, start: int, stop: int) -> list[tuple[Projection, slice, tuple[int, int, int]]]:
        """Layers that meet the rows: projection, its columns in sorted order, its first row and the rows wanted."""
        pieces, row, column = [], 0, 0
        for part in self.parts:
            a, b = max(start, row), min(stop, row + part.D)
            if a < b:
                pieces.append((part, slice(column, column + part.d), (row, a, b)))
            row, column = row + part.D, column + part.d
        return pieces


def apportion(sizes: Sequence[int], columns: int) -> list[int]:
    """The layer of each column, as defined above.

    Args:
        sizes: rows of each layer.
        columns: how many, at most Σ sizes.
    """
    layers = list(range(len(sizes)))[:columns]
    queue = [(-float(size), layer, 1) for layer, size in enumerate(sizes) if size > 1]
    heapq.heapify(queue)
    while len(layers) < columns:
        _, layer, count = heapq.heappop(queue)
        layers.append(layer)
        if count + 1 < sizes[layer]:
            heapq.heappush(queue, (-(sizes[layer] / (count + 1)), layer, count + 1))
    return layers
