"""What a projection is: a fixed matrix P (D, d) that is defined by integers and never has to be stored.

Every family says in its module's docstring what its entries are, as *version 1*: a change of a single bit of P is a new
version. All randomness is the counter-based generator of `subspace_lab.linalg.random` under keys named after family and
version, so P is a function of (name, version, D, d_max, seed) alone: not of the device, the number of threads or how it
is cut into chunks. Columns have length one over all D rows jointly, so that a step of length one in z is a step of
length one in θ = θ0 + P z. P is nested: for the same D, d_max and seed, P(d) is the first d columns of P(d_max).

Rounding. Inputs in float32 and float64 are computed as such, shorter ones in float32. `lift` of the butterfly families
(orthoblock, fastfood, fastfood_blocked, one_hot) is a fixed sequence of single IEEE operations per entry and gives the
same bits everywhere. The others have long sums, whose order belongs to the library: there `lift` is fast, and
`lift_exact` sums in 64-bit fixed point, where order cannot matter. `project` is deterministic on each device, not equal
across devices.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import ClassVar

import torch
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.linalg.precision import full_precision, upcast

Rows = tuple[int, int]

CPU_CHUNK = 2**18
"""Entries worked on at a time on a CPU: two buffers of them stay in the outer cache."""
GPU_CHUNK = 2**23
"""The same elsewhere, where each operation costs a kernel launch."""


def chunk_size(device: torch.device) -> int:
    """Entries to work on at a time."""
    return CPU_CHUNK if device.type == "cpu" else GPU_CHUNK


def next_power_of_two(n: int) -> int:
    """The smallest 2^k >= n >= 1."""
    return 1 << (n - 1).bit_length()


class Cache:
    """Derived integers (signs, indices) that are kept while they fit; what does not fit is made again each time.

    Copies and pickles are empty: a copy of a model does not copy what can be regenerated.
    """

    def __init__(self, limit: int = 2**30) -> None:
        self.limit = limit
        self.bytes = 0
        self._items: dict[object, tuple[Tensor, ...]] = {}

    def get(self, key: object, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Return the tensors kept under `key`, or make them, and keep them if they fit."""
        if key in self._items:
            return self._items[key]
        made = make()
        size = sum(tensor.numel() * tensor.element_size() for tensor in made)
        if self.bytes + size <= self.limit:
            self._items[key] = made
            self.bytes += size
        return made

    def __reduce__(self) -> tuple[object, ...]:
        return (Cache, (self.limit,))


class Projection(ABC):
    """A fixed linear map R^d → R^D with unit columns.

    Args:
        D: number of rows: parameters.
        d: number of columns in use.
        seed: any integer; another seed is another P.
        d_max: columns of the whole nested family, d <= d_max <= D; default d.

    Raises:
        UserError: sizes out of range.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def __init__(self, *, D: int, d: int, seed: int, d_max: int | None = None) -> None:
        d_max = d if d_max is None else d_max
        if not 1 <= d <= d_max <= D:
            raise UserError(
                f"a projection needs 1 <= d <= d_max <= D, got d={d}, d_max={d_max}, D={D}",
                hint="D is the number of parameters in the subspace's scope",
            )
        self.D, self.d, self.d_max, self.seed = D, d, d_max, seed
        self._cache = Cache()

    @torch.no_grad()
    @full_precision
    def lift(
        self, z: Tensor, *, base: Tensor | None = None, out: Tensor | None = None, rows: Rows | None = None
    ) -> Tensor:
        """Return base + P[rows] z. Not recorded by autograd: see `subspace_lab.projections.apply`.

        Args:
            z: (d,), any floating dtype; its device is where everything happens.
            base: (rows,) of the same dtype and device; None is zero.
            out: (rows,) of the same dtype, may be `base` itself.
            rows: (start, stop), default all. The bits of a row do not depend on which rows are asked for.

        Returns:
            (rows,) in the dtype of z.
        """
        return self._run_lift(self._lift, z, base, out, rows)

    @torch.no_grad()
    @full_precision
    def lift_exact(
        self, z: Tensor, *, base: Tensor | None = None, out: Tensor | None = None, rows: Rows | None = None
    ) -> Tensor:
        """The same as `lift`, with the same bits on every device: what a saved solution is rebuilt with."""
        return self._run_lift(self._lift_exact, z, base, out, rows)

    @torch.no_grad()
    @full_precision
    def project(self, g: Tensor, *, out: Tensor | None = None, rows: Rows | None = None) -> Tensor:
        """P[rows]ᵀ g (d,), the adjoint of `lift` and so its gradient.

        Args:
            g: (rows,), any floating dtype.
            out: (d,) of the same dtype.
            rows: (start, stop), default all. The sum of all parts is the whole, up to rounding.
        """
        start, stop = self._check_rows(rows)
        _check_vector("g", g, stop - start)
        work = upcast(g).contiguous()
        z = torch.empty(self.d, dtype=work.dtype, device=work.device)
        if stop > start:
            self._project(work, z, start, stop)
        else:
            z.zero_()
        if out is None:
            return z.to(g.dtype)
        _check_vector("out", out, self.d)
        return out.copy_(z)

    def matrix(
        self, rows: Rows | None = None, *, dtype: torch.dtype = torch.float64, device: torch.device | str | None = None
    ) -> Tensor:
        """P[rows] (rows, d), made from its integers: for tests and hashes, not for products."""
        start, stop = self._check_rows(rows)
        where = torch.device("cpu" if device is None else device)
        pieces = [self._matrix(a, b, where).to(dtype) for a, b in spans(start, stop, max(1, CPU_CHUNK // self.d))]
        return torch.cat(pieces) if pieces else torch.empty(0, self.d, dtype=dtype, device=where)

    def fingerprint(self) -> str:
        """Hex digest of what defines the nested family; d is not part of it."""
        text = "/".join(str(part) for part in (self.name, self.version, self.D, self.d_max, self.seed))
        return hashlib.sha256(text.encode()).hexdigest()

    def state_bytes(self) -> int:
        """Bytes of regenerable integers kept at the moment, on all devices together."""
        return self._cache.bytes

    def __repr__(self) -> str:
        return f"{type(self).__name__}(D={self.D}, d={self.d}, d_max={self.d_max}, seed={self.seed})"

    @abstractmethod
    def _lift(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        """Write base + P[start:stop] z to `out`; all float32 or all float64, contiguous, on one device."""

    def _lift_exact(self, z: Tensor, base: Tensor | None, out: Tensor, start: int, stop: int) -> None:
        self._lift(z, base, out, start, stop)

    @abstractmethod
    def _project(self, g: Tensor, out: Tensor, start: int, stop: int) -> None:
        """Write P[start:stop]ᵀ g to `out`."""

    @abstractmethod
    def _matrix(self, start: int, stop: int, device: torch.device) -> Tensor:
        """P[start:stop], float64 (stop - start, d)."""

    def _check_rows(self, rows: Rows | None) -> Rows:
        start, stop = (0, self.D) if rows is None else rows
        if not 0 <= start <= stop <= self.D:
            raise ValueError(f"rows must lie in 0 … {self.D}, got {start} … {stop}")
        return start, stop

    def _run_lift(
        self,
        kernel: Callable[[Tensor, Tensor | None, Tensor, int, int], None],
        z: Tensor,
        base: Tensor | None,
        out: Tensor | None,
        rows: Rows | None,
    ) -> Tensor:
        start, stop = self._check_rows(rows)
        _check_vector("z", z, self.d)
        for name, vector in (("base", base), ("out", out)):
            if vector is not None:
                _check_vector(name, vector, stop - start)
                if vector.dtype != z.dtype:
                    raise ValueError(f"{name} is {vector.dtype}, z is {z.dtype}")
        work = upcast(z).contiguous()
        start_at = None if base is None else upcast(base).contiguous()
        direct = out is not None and out.dtype == work.dtype and out.is_contiguous()
        result = out if out is not None and direct else work.new_empty(stop - start)
        if stop > start:
            kernel(work, start_at, result, start, stop)
        if direct or out is None:
            return result.to(z.dtype)
        return out.copy_(result)


def spans(start: int, stop: int, size: int) -> Iterator[Rows]:
    """Cut start … stop at the multiples of `size`: pieces of a part are parts of the pieces of the whole."""
    while start < stop:
        end = min(stop, (start // size + 1) * size)
        yield start, end
        start = end


def add_base(base: Tensor | None, y: Tensor, out: Tensor) -> None:
    """Write base + y, or y, to `out`: one rounding, after all others."""
    if base is None:
        out.copy_(y)
    else:
        torch.add(base, y, out=out)


def _check_vector(name: str, x: Tensor, size: int) -> None:
    if x.shape != (size,) or not x.is_floating_point():
        raise ValueError(f"{name} must be a floating vector of {size} entries, got {tuple(x.shape)} {x.dtype}")
