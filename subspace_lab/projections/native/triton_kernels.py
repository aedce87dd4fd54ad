"""One Triton kernel for all passes of a blocked Walsh-Hadamard transform, signs, permutation and scale included.

A program has 2^(STEPS + COLUMNS) numbers of one block in registers: 2^STEPS streams, 2^LOW apart, of 2^COLUMNS numbers
next to each other; it does the butterflies of strides 2^LOW … 2^(LOW + STEPS - 1). Additions are those of the C kernel
and of the torch form, in their order, and nothing may be contracted (launch with enable_fp_fusion=False).
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a pass reads: a work buffer; z with the signs of B; rows of g; or the buffer through the permutation, with the
# signs of S, or through its inverse. What it writes: the buffer; the buffer with signs; base + c times the result.
PLAIN, FROM_Z, FROM_ROWS, GATHER, GATHER_BACK = (tl.constexpr(i) for i in range(5))
SIGNED, TO_ROWS = tl.constexpr(1), tl.constexpr(2)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _mix(x):  # type: ignore[no-untyped-def]
    x = x ^ (x >> 17)
    x = x * 0xED5AD4BB
    x = x ^ (x >> 11)
    x = x * 0xAC4C1B51
    x = x ^ (x >> 15)
    x = x * 0x31848BAB
    return x ^ (x >> 14)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _word(k0, k1, i):  # type: ignore[no-untyped-def]
    low = (i & 0xFFFFFFFF).to(tl.uint32)
    high = (i >> 32).to(tl.uint32)
    return _mix(_mix(low + k0) ^ k1 ^ _mix(high))


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _flip(x, k0, k1, entry):  # type: ignore[no-untyped-def]
    bit = (_word(k0, k1, entry >> 5) >> (entry & 31).to(tl.uint32)) & 1
    return (x.to(tl.uint32, bitcast=True) ^ (bit << 31)).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _permuted(t, k0, k1, block, BITS: tl.constexpr, BACK: tl.constexpr):  # type: ignore[no-untyped-def]
    x = t.to(tl.uint32)
    for step in tl.static_range(3):
        at = 8 * block + (4 - 2 * step if BACK else 2 * step)
        times = _word(k0, k1, at) | 1
        plus = _word(k0, k1, at + 1)
        if BACK:
            inverse = times
            for _ in tl.static_range(4):  # Newton: 3, 6, 12, 24, 48 right bits
                inverse = inverse * (2 - times * inverse)
            x = x ^ (x >> ((BITS + 1) // 2))
            x = ((x - plus) * inverse) & ((1 << BITS) - 1)
        else:
            x = (x * times + plus) & ((1 << BITS) - 1)
            x = x ^ (x >> ((BITS + 1) // 2))
    return x.to(tl.int32)


@triton.jit(do_not_specialize=["first", "start", "stop", "d", "a0", "a1", "b0", "b1", "p0", "p1"])  # type: ignore[untyped-decorator, unused-ignore]
def butterflies(  # type: ignore[no-untyped-def]
    source,  # z (d,), g (rows,) or work (blocks, n)
    target,  # work, or out (rows,)
    base,  # (rows,), or anything if HAS_BASE is 0
    scale,
    first,  # number of the first block
    start,  # rows start … stop - 1 exist
    stop,
    d,
    a0,  # stream of the signs on reading
    a1,
    b0,  # stream of the signs on writing
    b1,
    p0,  # stream of the permutation
    p1,
    BITS: tl.constexpr,  # log2 n
    LOW: tl.constexpr,
    STEPS: tl.constexpr,
    COLUMNS: tl.constexpr,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    HAS_BASE: tl.constexpr,
):
    """One pass of a transform; see the module's docstring."""
    SIZE: tl.constexpr = 1 << (STEPS + COLUMNS)
    PARTS: tl.constexpr = 1 << (BITS - STEPS - COLUMNS)
    RUNS: tl.constexpr = 1 << (LOW - COLUMNS)  # programs side by side in one stream
    program = tl.program_id(0)
    local = (program // PARTS).to(tl.int64)
    part = program % PARTS
    block = local + first
    e = tl.arange(0, SIZE)
    t = (part // RUNS << (LOW + STEPS)) + (e >> COLUMNS << LOW) + (part % RUNS << COLUMNS) + (e & ((1 << COLUMNS) - 1))
    row = (block << BITS) + t
    here = (local << BITS) + t

    if READ == FROM_Z:
        x = _flip(tl.load(source + t, mask=t < d, other=0.0), a0.to(tl.uint32), a1.to(tl.uint32), row)
    elif READ == FROM_ROWS:
        x = tl.load(source + (row - start), mask=(row >= start) & (row < stop), other=0.0)
    elif READ == GATHER:
        place = _permuted(t, p0.to(tl.uint32), p1.to(tl.uint32), block, BITS, False)
        x = _flip(tl.load(source + ((local << BITS) + place)), a0.to(tl.uint32), a1.to(tl.uint32), row)
    elif READ == GATHER_BACK:
        x = tl.load(source + ((local << BITS) + _permuted(t, p0.to(tl.uint32), p1.to(tl.uint32), block, BITS, True)))
    else:
        x = tl.load(source + here)

    for step in tl.static_range(STEPS):
        x = tl.reshape(x, (SIZE >> (COLUMNS + step + 1), 2, 1 << (COLUMNS + step)))
        a, b = tl.split(tl.permute(x, (0, 2, 1)))
        x = tl.permute(tl.join(a + b, a - b), (0, 2, 1))
    x = tl.reshape(x, (SIZE,))

    if WRITE == TO_ROWS:
        there = (row >= start) & (row < stop)
        y = x * scale
        if HAS_BASE:
            y = tl.load(base + (row - start), mask=there, other=0.0) + y
        tl.store(target + (row - start), y, mask=there)
    elif WRITE == SIGNED:
        tl.store(target + here, _flip(x, b0.to(tl.uint32), b1.to(tl.uint32), row))
    else:
        tl.store(target + here, x)
