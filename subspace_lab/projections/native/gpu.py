"""orthoblock on CUDA tensors of float32: passes of one Triton kernel over groups of blocks that stay in the L2 cache.

Memory traffic beyond the cache is base, out and g alone. A size of block is tried against the definition before it is
used on a device; if Triton is missing or disagrees, the caller takes its torch form.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import Tensor

from subspace_lab.linalg.random import _PI
from subspace_lab.projections.native import check
from subspace_lab.projections.native.cpu import overlap

LOG = logging.getLogger(__name__)
TILE = 12  # log2 of the numbers a program has in registers
BITS = (6, 20)  # log2 n from … to: one or two passes a transform
GROUP = 1 << 22  # numbers in a work buffer; two of them are well within the L2 cache of a large GPU

Keys = tuple[int, int, int]
Rows = tuple[int, int]


def orthoblock_lift(z: Tensor, base: Tensor | None, out: Tensor, n: int, keys: Keys, c: float, rows: Rows) -> bool:
    """As in the package; False if this is not for Triton."""
    tensors = (z, out) if base is None else (z, out, base)
    if not _fits(n, *tensors) or overlap(base, out) or overlap(z, out):
        return False
    with torch.cuda.device(z.device):
        if not _trusted(z.device, n):
            return False
        lift(z, base, out, n, keys, c, rows)
    return True


def orthoblock_project(g: Tensor, out: Tensor, n: int, keys: Keys, c: float, rows: Rows) -> bool:
    """As in the package; False if this is not for Triton."""
    if not _fits(n, g, out):
        return False
    with torch.cuda.device(g.device):
        if not _trusted(g.device, n):
            return False
        project(g, out, n, keys, c, rows)
    return True


def lift(z: Tensor, base: Tensor | None, out: Tensor, n: int, keys: Keys, c: float, rows: Rows) -> None:
    """Set out to base + c P[rows] z, whatever the device Triton has."""
    from subspace_lab.projections.native import triton_kernels as k

    first, last = rows[0] // n, -(-rows[1] // n)
    for a in range(first, last, max(1, GROUP // n)):
        blocks = min(max(1, GROUP // n), last - a)
        u, v = z.new_empty(2, blocks * n)
        run = _passes(n, blocks, a, rows, len(z), keys, c)
        run(z, u, None, k.FROM_Z, k.PLAIN, u, signs=keys[0])
        run(u, out, base, k.GATHER, k.TO_ROWS, v, signs=keys[1])


def project(g: Tensor, out: Tensor, n: int, keys: Keys, c: float, rows: Rows) -> None:
    """Set out to c P[rows]ᵀ g, whatever the device Triton has. The blocks of a group are added in torch's order."""
    from subspace_lab.projections.native import triton_kernels as k

    first, last = rows[0] // n, -(-rows[1] // n)
    total = g.new_zeros(n)
    for a in range(first, last, max(1, GROUP // n)):
        blocks = min(max(1, GROUP // n), last - a)
        u, v = g.new_empty(2, blocks * n)
        run = _passes(n, blocks, a, rows, len(out), keys, c)
        run(g, u, None, k.FROM_ROWS, k.SIGNED, u, after=keys[1])
        run(u, v, None, k.GATHER_BACK, k.SIGNED, v, after=keys[0])
        total += v.view(blocks, n).sum(dim=0)
    torch.mul(total[: len(out)], c, out=out)


def _passes(n: int, blocks: int, first: int, rows: Rows, d: int, keys: Keys, c: float) -> Any:
    """What transforms all blocks, from `source` to `target` in one pass, or in two by way of `work`."""
    from subspace_lab.projections.native import triton_kernels as k

    bits = n.bit_length() - 1
    low = min(bits, TILE)

    def launch(
        source: Tensor, target: Tensor, base: Tensor | None, read: Any, write: Any, at: int, streams: Any
    ) -> None:
        steps = low if at == 0 else bits - low
        columns = 0 if at == 0 else TILE - steps
        grid = (blocks << (bits - steps - columns),)
        given = target if base is None else base
        # fmt: off
        k.butterflies[grid](
            source, target, given, c, first, *rows, d, *streams, BITS=bits, LOW=at, STEPS=steps, COLUMNS=columns,
            READ=read, WRITE=write, HAS_BASE=base is not None, num_warps=8, enable_fp_fusion=False,
        )
        # fmt: on

    def run(
        source: Tensor, target: Tensor, base: Tensor | None, read: Any, write: Any, work: Tensor,
        signs: int = 0, after: int = 0,
    ) -> None:  # fmt: skip
        streams = (*_stream(signs), *_stream(after), *_stream(keys[2]))
        if low == bits:
            launch(source, target, base, read, write, 0, streams)
            return
        launch(source, work, None, read, k.PLAIN, 0, streams)
        launch(work, target, base, k.PLAIN, write, low, streams)

    return run


def _stream(key: int) -> tuple[int, int]:
    """k0 and k1 of `linalg.random` as signed 32-bit numbers, so that their type never changes."""

    def mix(x: int) -> int:
        for shift, times in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
            x = (x ^ x >> shift) * times & 0xFFFFFFFF
        return x ^ x >> 14

    low, high = key & 0xFFFFFFFF, key >> 32
    k0, k1 = (mix(mix(low ^ pi) ^ high) for pi in _PI)
    return k0 - (k0 >> 31 << 32), k1 - (k1 >> 31 << 32)


def _fits(n: int, *tensors: Tensor) -> bool:
    device = tensors[0].device
    return BITS[0] <= n.bit_length() - 1 <= BITS[1] and all(
        t.dtype == torch.float32
        and t.device == device
        and t.is_contiguous()
        and type(t) in (Tensor, torch.nn.Parameter)
        for t in tensors
    )


@functools.cache
def _trusted(device: torch.device, n: int) -> bool:
    """Whether Triton works here and has the bits of the definition, tried on a block and a half."""
    rows, keys, c = (n // 3, n + n // 2), (5, 7, 11), 0.37109375
    d = n - n // 4
    z, g = _wave(d, device), _wave(rows[1] - rows[0], device)
    up, down = torch.empty_like(g), torch.empty_like(z)
    try:
        lift(z, g, up, n, keys, c, rows)
        project(g, down, n, keys, c, rows)
    except Exception as error:  # a compiler's: of any kind
        LOG.warning("Triton kernels do not run on %s, projections run in torch alone: %r", device, error)
        return False
    wanted = check.project(g, d, rows[1], n, keys, c, rows)
    close = torch.allclose(down, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))
    if not close or not check.same_bits(up, check.lift(z, g, rows[1], n, keys, c, rows)):
        LOG.warning("Triton kernels disagree with their definition on %s: projections run in torch alone", device)
        return False
    return True


def _wave(count: int, device: torch.device) -> Tensor:
    """Numbers of all magnitudes below 1, the same everywhere (a library's sine is not)."""
    return (torch.arange(1, count + 1, device=device) * 7919 % 10007).float() / 10007 - 0.4
