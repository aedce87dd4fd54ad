"""The definitions of all projections, version 1, in Python integers and loops: slow, and read off the docstrings alone.

Floats appear at the end only: scales, and the one rounding per operation of the products.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Callable, Sequence

MASK = 2**32 - 1


def derive_key(*parts: int | str) -> int:
    data = b""
    for part in parts:
        text = str(part).encode()
        data += f"{'i' if isinstance(part, int) else 's'}{len(text)}:".encode() + text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def mix(x: int) -> int:
    for shift, multiplier in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = ((x ^ (x >> shift)) * multiplier) & MASK
    return x ^ (x >> 14)


def word(key: int, i: int) -> int:
    k0, k1 = (mix(mix((key & MASK) ^ c) ^ (key >> 32)) for c in (0x243F6A88, 0x85A308D3))
    return mix(mix(((i & MASK) + k0) & MASK) ^ k1 ^ mix(i >> 32))


def sign(key: int, i: int) -> int:
    return 1 - 2 * ((word(key, i // 32) >> (i % 32)) & 1)


def bijection(key: int, b: int, k: int, x: int) -> int:
    if k == 0:
        return x
    m, s = 2**k - 1, (k + 1) // 2
    w = [word(key, 8 * b + r) for r in range(6)]
    for r in range(3):
        x = (x * (w[2 * r] | 1) + w[2 * r + 1]) & m
        x ^= x >> s
    return x


def permuted(key: int, size: int, x: int) -> int:
    k = (size - 1).bit_length()
    x = bijection(key, 0, k, x)
    while x >= size:
        x = bijection(key, 0, k, x)
    return x


def next_power_of_two(n: int) -> int:
    return 2 ** (n - 1).bit_length()


def hadamard(i: int, j: int) -> int:
    return (-1) ** (i & j).bit_count()


class Blocked:
    """Parts of the three families of two transforms."""

    def __init__(self, name: str, D: int, d_max: int, seed: int) -> None:
        self.name, self.D = name, D
        self.n = next_power_of_two(D if name == "fastfood" else d_max)
        self.B, self.G, self.Pi = (
            derive_key(f"{name}/1/{part}", seed) for part in ("B", "S" if name == "orthoblock" else "G", "Pi")
        )

    def b(self, block: int, t: int) -> int:
        return sign(self.B, block * self.n + t)

    def g(self, block: int, t: int) -> int:
        i = block * self.n + t
        return sign(self.G, i) if self.name == "orthoblock" else 2 * (word(self.G, i) >> 1).bit_count() - 31

    def pi(self, block: int, t: int) -> int:
        return bijection(self.Pi, block, self.n.bit_length() - 1, t)

    def c(self, block: int) -> float:
        return 1 / math.sqrt(float(self.D) * float(sum(self.g(block, t) ** 2 for t in range(self.n))))

    def matrix(self, d: int) -> list[list[float]]:
        rows = []
        for block in range(-(-self.D // self.n)):
            g, pi = ([f(block, t) for t in range(self.n)] for f in (self.g, self.pi))
            b, c = [self.b(block, j) for j in range(d)], self.c(block)
            for r in range(min(self.n, self.D - block * self.n)):
                row = []
                for j in range(d):
                    total = sum(hadamard(r, t) * g[t] * hadamard(pi[t], j) for t in range(self.n))
                    row.append(total * b[j] * c)
                rows.append(row)
        return rows

    def lift(self, z: Sequence[float], base: Sequence[float], rounded: Callable[[float], float]) -> list[float]:
        """Each operation rounds once, in the order of the definition."""
        out: list[float] = []
        for block in range(-(-self.D // self.n)):
            x = [self.b(block, t) * v for t, v in enumerate([*z, *[0.0] * (self.n - len(z))])]
            x = butterflies(x, rounded)
            x = [rounded(self.g(block, t) * x[self.pi(block, t)]) for t in range(self.n)]
            c = rounded(self.c(block))
            out += [rounded(c * y) for y in butterflies(x, rounded)]
        return [rounded(b + y) for b, y in zip(base, out[: self.D], strict=True)]


def butterflies(x: list[float], rounded: Callable[[float], float]) -> list[float]:
    x, h = list(x), 1
    while h < len(x):
        for i in range(len(x)):
            if not i & h:
                x[i], x[i + h] = rounded(x[i] + x[i + h]), rounded(x[i] - x[i + h])
        h *= 2
    return x


def to_float32(x: float) -> float:
    """A sum, difference or product of two float32 numbers is exact enough in double to be rounded once more."""
    return float(struct.unpack("f", struct.pack("f", x))[0])


def integers(name: str, D: int, d: int, d_max: int, seed: int) -> tuple[list[list[int]], list[float]]:
    """Integer entries a (D, d) and column scales c (d,) of the other families."""
    make = {"dense": dense, "gaussian": gaussian, "sparse": sparse, "one_hot": one_hot, "kronecker": kronecker}[name]
    return make(D, d, d_max, seed)


def dense(D: int, d: int, d_max: int, seed: int) -> tuple[list[list[int]], list[float]]:
    key = derive_key("dense/1", seed)
    return [[sign(key, i * 2**32 + j) for j in range(d)] for i in range(D)], [1 / math.sqrt(D)] * d


def gaussian(D: int, d: int, d_max: int, seed: int) -> tuple[list[list[int]], list[float]]:
    key = derive_key("gaussian/1", seed)

    def entry(i: int, j: int) -> int:
        byte = (word(key, i * 2**30 + j // 4) >> (8 * (j % 4))) & 255
        return 2 * (byte & 127).bit_count() - 7

    a = [[entry(i, j) for j in range(d)] for i in range(D)]
    return a, [1 / math.sqrt(sum(row[j] ** 2 for row in a)) for j in range(d)]


def sparse(D: int, d: int, d_max: int, seed: int) -> tuple[list[list[int]], list[float]]:
    key, m = derive_key("sparse/1", seed), math.floor(math.sqrt(D) + 0.5)
    a = [[0] * d for _ in range(D)]
    for t in range(m):
        first, size = t * D // m, (t + 1) * D // m - t * D // m
        for j in range(d):
            w = word(key, t * 2**32 + j)
            a[first + w * size // 2**32][j] = 1 - 2 * (w % 2)
    return a, [1 / math.sqrt(m)] * d


def one_hot(D: int, d: int, d_max: int, seed: int) -> tuple[list[list[int]], list[float]]:
    place, signs = derive_key("one_hot/1/Pi", seed), derive_key("one_hot/1/S", seed)
    a = [[0] * d_max for _ in range(D)]
    for i in range(D):
        a[i][permuted(place, D, i) % d_max] = sign(signs, i)
    return [row[:d] for row in a], [1 / math.sqrt(sum(row[j] != 0 for row in a)) for j in range(d)]


def kronecker(D: int, d: int, d_max: int, seed: int) -> tuple[list[list[int]], list[float]]:
    keys = {part: derive_key(f"kronecker/1/{part}", seed) for part in ("A", "C", "Pi", "S")}
    k = (D - 1).bit_length()
    k1, k2 = (k + 1) // 2, k // 2
    d2 = min(2**k2, next_power_of_two(math.ceil(math.sqrt(d_max))))
    a = []
    for i in range(D):
        v = bijection(keys["Pi"], 0, k, i)
        row = []
        for j in range(d):
            left = hadamard(v // 2**k2, bijection(keys["A"], 0, k1, j // d2))
            right = hadamard(v % 2**k2, bijection(keys["C"], 0, k2, j % d2))
            row.append(sign(keys["S"], i) * left * right)
        a.append(row)
    return a, [1 / math.sqrt(D)] * d


def lift_exact(
    a: list[list[int]],
    c: list[float],
    z: Sequence[float],
    base: Sequence[float],
    terms: int,
    rounded: Callable[[float], float],
) -> list[float]:
    """The sum in fixed point, rounded to double, to the dtype, and added to the base."""
    u = [v * s for v, s in zip(z, c, strict=True)]
    shift = 62 - math.ceil(math.log2(terms)) - math.frexp(max(abs(v) for v in u))[1]
    q = [round(math.ldexp(v, shift)) for v in u]
    sums = [math.ldexp(float(sum(x * y for x, y in zip(row, q, strict=True))), -shift) for row in a]
    return [rounded(b + rounded(y)) for b, y in zip(base, sums, strict=True)]


def apportion(sizes: Sequence[int], columns: int) -> list[int]:
    layers = list(range(len(sizes)))
    while len(layers) < columns:
        open_layers = [i for i, size in enumerate(sizes) if layers.count(i) < size]
        layers.append(max(open_layers, key=lambda i: (sizes[i] / layers.count(i), -i)))
    return layers


def per_layer(
    name: str, sizes: Sequence[int], d: int, d_max: int, seed: int, matrix: Callable[..., list[list[float]]]
) -> list[list[float]]:
    """Block by block; `matrix(name, D, d, d_max, seed)` makes a layer's own projection."""
    layers = apportion(sizes, d_max)
    rows: list[list[float]] = []
    for layer, size in enumerate(sizes):
        columns = [j for j in range(d) if layers[j] == layer]
        own = matrix(name, size, len(columns), layers.count(layer), derive_key("per_layer/1", seed, layer))
        for line in own:
            row = [0.0] * d
            for j, value in zip(columns, line, strict=True):
                row[j] = value
            rows.append(row)
    return rows


def matrix(name: str, D: int, d: int, d_max: int, seed: int) -> list[list[float]]:
    """P (D, d) in doubles."""
    if name in ("orthoblock", "fastfood", "fastfood_blocked"):
        return Blocked(name, D, d_max, seed).matrix(d)
    a, c = integers(name, D, d, d_max, seed)
    return [[x * s for x, s in zip(row, c, strict=True)] for row in a]
