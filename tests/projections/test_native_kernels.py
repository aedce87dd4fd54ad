"""The C kernels against a transcription of the definition in Python integers and numpy float32, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from subspace_lab.linalg.random import derive_key
from subspace_lab.projections import native
from subspace_lab.projections.native import build, cpu

MASK = 0xFFFFFFFF
KEYS = tuple(derive_key(f"orthoblock/1/{part}", 3) for part in ("B", "S", "Pi"))

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C compiler")


@pytest.fixture(scope="module", autouse=True)
def library(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUBSPACE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("SUBSPACE_NATIVE", raising=False)
        cpu._library.cache_clear()
        assert cpu._library() is not None
        yield
        cpu._library.cache_clear()


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def mix(x):
    for shift, times in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = ((x ^ (x >> shift)) * times) & MASK
    return x ^ (x >> 14)


def words(key, i):
    """Words i (uint64 array) of a stream, uint64: the arithmetic stays below 2^64."""
    low, high = key & MASK, key >> 32
    k0, k1 = (mix(mix(low ^ pi) ^ high) for pi in (0x243F6A88, 0x85A308D3))
    return mix(mix(((i & MASK) + k0) & MASK) ^ k1 ^ mix(i >> np.uint64(32)))


def signs(key, first, count):
    i = np.arange(first, first + count, dtype=np.uint64)
    return 1 - 2 * (words(key, i >> np.uint64(5)) >> (i & np.uint64(31)) & 1).astype(np.float32)


def sign_rows(key, rows, d):
    """Signs of `dense`: entry (i, j) is entry i 2^32 + j of the stream, so in word i 2^27 + j / 32."""
    i, j = np.arange(*rows, dtype=np.uint64)[:, None], np.arange(d, dtype=np.uint64)
    return 1 - 2 * (words(key, (i << np.uint64(27)) + (j >> np.uint64(5))) >> (j & np.uint64(31)) & 1).astype(
        np.float64
    )


def hadamard(v):
    v, h = v.copy(), 1
    while h < len(v):
        w = v.reshape(-1, 2, h)
        a, b = w[:, 0].copy(), w[:, 1].copy()
        w[:, 0], w[:, 1] = a + b, a - b
        h *= 2
    return v


def places(n, block):
    k = n.bit_length() - 1
    w = [int(x) for x in words(KEYS[2], np.arange(8 * block, 8 * block + 6, dtype=np.uint64))]
    x, s = np.arange(n, dtype=np.uint64), np.uint64((k + 1) // 2)
    for r in range(3):
        x = (x * np.uint64(w[2 * r] | 1) + np.uint64(w[2 * r + 1])) & np.uint64(n - 1)
        x ^= x >> s
    return x.astype(np.int64) if k else np.zeros(1, np.int64)


def lift(z, base, n, c, rows):
    x, out = np.zeros(n, np.float32), []
    x[: len(z)] = z
    first, last = rows[0] // n, -(-rows[1] // n)
    for b in range(first, last):
        B, S = signs(KEYS[0], b * n, n), signs(KEYS[1], b * n, n)
        out.append(hadamard(S * hadamard(B * x)[places(n, b)]))
    y = np.float32(c) * np.concatenate(out)[rows[0] - first * n : rows[1] - first * n]
    return y if base is None else base + y


def project(g, d, n, c, rows):
    first, last = rows[0] // n, -(-rows[1] // n)
    padded, total = np.zeros((last - first) * n, np.float32), np.zeros(n, np.float32)
    padded[rows[0] - first * n : rows[1] - first * n] = g
    for b in range(first, last):
        B, S = signs(KEYS[0], b * n, n), signs(KEYS[1], b * n, n)
        v = np.empty(n, np.float32)
        v[places(n, b)] = S * hadamard(padded[(b - first) * n : (b - first + 1) * n])
        total += B * hadamard(v)
    return np.float32(c) * total[:d]


def same(tensor, array):
    return np.array_equal(tensor.numpy().view(np.uint32), array.view(np.uint32))


CASES = [  # n, d, rows: tiny blocks, whole ones, cut at either end, every radix of the last pass, wide permutations
    (1, 1, (0, 100)),
    (1, 1, (37, 38)),
    (2, 2, (0, 131)),
    (4, 3, (5, 77)),
    (8, 8, (0, 64)),
    (8, 5, (63, 66)),
    (32, 20, (65, 999)),
    (64, 64, (0, 1000)),
    (64, 33, (1, 63)),
    (128, 100, (3, 900)),
    (256, 200, (0, 512)),
    (512, 300, (100, 5000)),
    (1024, 750, (0, 5000)),
    (1024, 1, (1024, 2048)),
    (2048, 2000, (2047, 4097)),
    (4096, 3000, (0, 9000)),
    (8192, 5000, (10, 20000)),
    (16384, 10000, (0, 40000)),
    (32768, 20000, (5, 40000)),
    (65536, 60000, (0, 70000)),
    (131072, 100000, (10, 140000)),
]


@pytest.mark.parametrize(("n", "d", "rows"), CASES)
def test_orthoblock_has_the_bits_of_the_definition(n, d, rows):
    rng = np.random.default_rng(n + d)
    count, c = rows[1] - rows[0], float(np.float32(1 / np.sqrt(float(rows[1]) * n)))
    z, g, base = (rng.standard_normal(k).astype(np.float32) for k in (d, count, count))
    for start in (None, base):
        out = torch.full((count,), torch.nan)
        given = None if start is None else torch.from_numpy(start)
        assert native.orthoblock_lift(torch.from_numpy(z), given, out, rows[1], n, KEYS, c, rows)
        assert same(out, lift(z, start, n, c, rows))
    out = torch.full((d,), torch.nan)
    assert native.orthoblock_project(torch.from_numpy(g), out, rows[1], n, KEYS, c, rows)
    assert same(out, project(g, d, n, c, rows))


@pytest.mark.parametrize("n", [8, 128, 1024, 8192])
@pytest.mark.parametrize("kind", ["zeros", "negative zeros", "some zeros", "cancelling", "tiny", "infinite"])
def test_zeros_keep_their_sign_and_nothing_is_flushed(n, kind):
    d, count = n * 2 // 3, 2 * n + 3
    z = np.arange(1, d + 1, dtype=np.float32) - np.float32(d // 2)
    if kind == "zeros":
        z[:] = 0
    elif kind == "negative zeros":
        z[:] = -0.0
    elif kind == "some zeros":
        z[::3] = -0.0
    elif kind == "cancelling":
        z[:] = 1
    elif kind == "tiny":
        z *= np.float32(1e-43)
    else:
        z[1] = np.inf
    base = np.tile(np.array([0.0, -0.0, 1.0], np.float32), count)[:count]
    for start in (None, base):
        out = torch.empty(count)
        given = None if start is None else torch.from_numpy(start)
        assert native.orthoblock_lift(torch.from_numpy(z), given, out, count, n, KEYS, 0.25)
        with np.errstate(invalid="ignore"):
            wanted = lift(z, start, n, 0.25, (0, count))
        finite = ~np.isnan(wanted)  # which NaN comes out is the processor's choice
        assert np.array_equal(np.isnan(out.numpy()), ~finite)
        assert np.array_equal(out.numpy().view(np.uint32)[finite], wanted.view(np.uint32)[finite])


@pytest.mark.parametrize(("n", "d"), [(16, 11), (1024, 750), (16384, 10000)])
def test_any_number_of_threads_and_any_cut_of_the_rows(n, d, threads):
    D = 300_001
    z, g, base = torch.randn(d), torch.randn(D), torch.randn(D)
    up, down, key = [], [], derive_key("dense/1", 0)
    for count in (1, 2, 3):
        threads(count)
        out, back = torch.empty(D), torch.empty(d)
        assert native.orthoblock_lift(z, base, out, D, n, KEYS, 0.1)
        assert native.orthoblock_project(g, back, D, n, KEYS, 0.1)
        up.append(out)
        down.append(back)
    assert all(torch.equal(a, up[0]) for a in up)
    assert all(torch.equal(a, down[0]) for a in down)
    for a, b in ((0, 1), (1, 777), (777, 150_000), (150_000, D)):
        out = torch.empty(b - a)
        assert native.orthoblock_lift(z, base[a:b].clone(), out, D, n, KEYS, 0.1, (a, b))
        assert torch.equal(out, up[0][a:b])
    up, down = [], []
    for count in (1, 2):
        threads(count)
        out, back = torch.empty(D), torch.empty(40)
        assert native.sign_lift(z[:11], base, out, D, key, 0.1)
        assert native.sign_project(g, back, D, key, 0.1)
        up.append(out)
        down.append(back)
    assert torch.equal(up[0], up[1])
    assert torch.equal(down[0], down[1])
    out = torch.empty(1000)
    assert native.sign_lift(z[:11], base[77:1077].clone(), out, D, key, 0.1, (77, 1077))
    assert torch.equal(out, up[0][77:1077])


def test_lift_in_place_is_lift():
    theta, z = torch.randn(5000), torch.randn(300)
    out = torch.empty(5000)
    assert native.orthoblock_lift(z, theta, out, 5000, 512, KEYS, 0.1)
    assert native.orthoblock_lift(z, theta, theta, 5000, 512, KEYS, 0.1)
    assert torch.equal(out, theta)


@pytest.mark.parametrize("n", [1, 2, 8, 32, 64, 128, 1024, 4096, 1 << 15, 1 << 18])
def test_transform_alone(n):
    x = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    out = torch.from_numpy(x.copy())
    assert native.fwht_(out, n)
    for row, given in zip(out, x, strict=True):
        assert same(row.contiguous(), hadamard(given))


@pytest.mark.parametrize(
    ("d", "rows"), [(1, (0, 40)), (11, (5, 6000)), (33, (31, 33)), (750, (0, 700)), (32, (0, 66_000))]
)
def test_sign_products(d, rows):
    key, count = derive_key("dense/1", 1), rows[1] - rows[0]
    A = sign_rows(key, rows, d)
    z, g, base = torch.randn(d), torch.randn(count), torch.randn(count)
    out, back = torch.empty(count), torch.empty(d)
    assert native.sign_lift(z, base, out, rows[1], key, 0.5, rows)
    assert native.sign_project(g, back, rows[1], key, 0.5, rows)
    close = {"rtol": 0, "atol": 2e-6 * d**0.5 + 1e-6}
    torch.testing.assert_close(out.double(), base.double() + 0.5 * torch.from_numpy(A) @ z.double(), **close)
    close = {"rtol": 0, "atol": 2e-6 * count**0.5 + 1e-6}
    torch.testing.assert_close(back.double(), 0.5 * torch.from_numpy(A).T @ g.double(), **close)


def test_rows_far_beyond_2_to_the_32():
    rows, key = ((1 << 33) + 5, (1 << 33) + 105), derive_key("dense/1", 1)
    z, out = np.ones(40, np.float32), torch.empty(100)
    assert native.orthoblock_lift(torch.from_numpy(z), None, out, rows[1], 64, KEYS, 1.0, rows)
    assert same(out, lift(z, None, 64, 1.0, rows))
    assert native.sign_lift(torch.from_numpy(z), None, out, rows[1], key, 1.0, (1 << 33, (1 << 33) + 100))
    assert np.array_equal(out.numpy(), sign_rows(key, (1 << 33, (1 << 33) + 100), 40).sum(axis=1))


def test_declines_what_it_cannot_do():
    z, out = torch.randn(10), torch.empty(100)
    arguments = (100, 16, KEYS, 1.0)
    assert not native.orthoblock_lift(z.double(), None, out.double(), *arguments)
    assert not native.orthoblock_lift(torch.randn(20)[::2], None, out, *arguments)
    assert not native.orthoblock_lift(z.to("meta"), None, out.to("meta"), *arguments)
    whole = torch.randn(150)
    assert not native.orthoblock_lift(z, whole[10:110], whole[:100], *arguments), "rows that are still to be read"
    assert not native.sign_lift(z, out, out, 100, 5, 1.0), "not in place"
    assert not native.fwht_(torch.empty(1, 8).as_subclass(type("Wrapped", (torch.Tensor,), {})), 8)
