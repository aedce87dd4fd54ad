"""The fast code equals the definitions, transcribed literally."""

from __future__ import annotations

import pytest
import reference.projections_literal as literal
import torch

from subspace_lab.linalg import rademacher, random_bits
from subspace_lab.projections import KINDS, PerLayer, create
from subspace_lab.projections.butterfly import BlocksLast, hadamard
from subspace_lab.projections.per_layer import apportion
from subspace_lab.projections.words import bijection, bit_counts, permuted, signs, split, word_range, words

BUTTERFLIES = ("orthoblock", "fastfood", "fastfood_blocked")
SUMS = ("dense", "gaussian", "sparse", "kronecker")
SMALL = [(50, 5, 8), (37, 3, 3), (64, 9, 16), (10, 10, 10), (2, 1, 2), (1, 1, 1)]


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("D", "d", "d_max"), SMALL)
def test_matrix(name: str, D: int, d: int, d_max: int) -> None:
    expected = literal.matrix(name, D, d, d_max, 5)
    assert create(name, D=D, d=d, seed=5, d_max=d_max).matrix().tolist() == expected


def rounding(dtype: torch.dtype):
    return literal.to_float32 if dtype == torch.float32 else float


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", BUTTERFLIES)
@pytest.mark.parametrize(("D", "d", "d_max"), SMALL)
def test_butterflies_round_as_defined(name: str, D: int, d: int, d_max: int, dtype: torch.dtype) -> None:
    z, base = torch.randn(d, dtype=dtype), torch.randn(D, dtype=dtype)
    expected = literal.Blocked(name, D, d_max, 11).lift(z.tolist(), base.tolist(), rounding(dtype))
    assert create(name, D=D, d=d, seed=11, d_max=d_max).lift(z, base=base).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize(("D", "d", "d_max"), SMALL)
def test_exact_sums_are_those_of_the_definition(name: str, D: int, d: int, d_max: int, dtype: torch.dtype) -> None:
    z, base = torch.randn(d, dtype=dtype), torch.randn(D, dtype=dtype)
    a, c = literal.integers(name, D, d, d_max, 11)
    terms = 7 * d_max if name == "gaussian" else d_max
    expected = literal.lift_exact(a, c, z.tolist(), base.tolist(), terms, rounding(dtype))
    assert create(name, D=D, d=d, seed=11, d_max=d_max).lift_exact(z, base=base).tolist() == expected


@pytest.mark.parametrize("name", ["orthoblock", "dense", "one_hot"])
def test_per_layer(name: str) -> None:
    sizes, d, d_max = (3, 40, 1, 17), 9, 14
    expected = literal.per_layer(name, sizes, d, d_max, 5, literal.matrix)
    assert PerLayer(sizes, d, d_max, seed=5, kind=name).matrix().tolist() == expected


@pytest.mark.parametrize("sizes", [(3, 40, 1, 17), (5, 5, 5), (1, 1000), (7,)])
def test_apportionment(sizes: tuple[int, ...]) -> None:
    columns = min(sum(sizes), 30)
    assert apportion(sizes, columns) == literal.apportion(sizes, columns)
    everything = apportion(sizes, sum(sizes))
    assert [everything.count(i) for i in range(len(sizes))] == list(sizes)


@pytest.mark.parametrize("start", [0, 5, 2**31 - 3, 2**32 - 2, 2**40])
def test_words_and_signs_are_those_of_linalg(start: int) -> None:
    for key in (0, 987654321987654, 2**63 - 1):
        expected = random_bits(key, start, 70)
        assert torch.equal(word_range(key, start, 70).long() & 0xFFFFFFFF, expected)
        high, low = split(torch.arange(start, start + 70))
        assert torch.equal(words(key, high, low).long() & 0xFFFFFFFF, expected)
        assert torch.equal(signs(key, start, 70), rademacher((70,), key=key, offset=start, dtype=torch.int8))


def test_bits_are_counted() -> None:
    w = torch.tensor([0, -1, 1, 2**31 - 1, -(2**31), 0x01030F7F], dtype=torch.int32)
    assert bit_counts(w).tolist() == [[(int(x) >> s & 255).bit_count() for s in (0, 8, 16, 24)] for x in w]


@pytest.mark.parametrize("k", [0, 1, 2, 5, 10, 33])
def test_bijections(k: int) -> None:
    values = torch.arange(min(2**k, 1000), dtype=torch.int32 if k <= 31 else torch.int64)
    members = torch.tensor([[0], [3]])
    made = bijection(77, k, values, members)
    for row, b in zip(made, (0, 3), strict=True):
        assert row.tolist() == [literal.bijection(77, b, k, x) for x in range(len(values))]
        assert len(set(row.tolist())) == len(values)
    if k < 20:
        assert made.max() == 2**k - 1


@pytest.mark.parametrize("size", [1, 2, 3, 100, 1000, 2**33 + 1])
def test_permutations_of_any_size(size: int) -> None:
    stop = min(size, 500)
    made = permuted(5, size, 0, stop)
    assert made.tolist() == [literal.permuted(5, size, x) for x in range(stop)]
    assert len(set(made.tolist())) == stop and int(made.max()) < size
    assert torch.equal(permuted(5, size, stop // 2, stop), made[stop // 2 :])


@pytest.mark.parametrize(
    ("K", "n", "tile"), [(1, 1, 64), (40, 64, 10**6), (3, 128, 10**6), (1, 2048, 64), (5, 512, 300), (20, 256, 32)]
)
def test_layouts_of_the_transform(K: int, n: int, tile: int) -> None:
    """Every way to lay out the work gives the same bits; one adjoint of the other."""
    layout = BlocksLast(K, n, tile)
    x = torch.randn(K, n)
    expected = torch.stack([torch.tensor(literal.butterflies(row.tolist(), literal.to_float32)) for row in x])
    assert torch.equal(hadamard(x.T.contiguous()).T, expected)
    flat = layout.head(x).reshape(-1)
    made, _ = layout.forward(flat, torch.empty_like(flat))
    natural = torch.empty_like(x)
    layout.from_tail(made, natural)
    assert torch.equal(natural, expected)
    tail = torch.empty_like(flat).double()
    layout.to_tail(x.double(), tail)
    back, _ = layout.backward(tail, torch.empty_like(tail))
    transformed = hadamard(x.double().T.contiguous()).T
    torch.testing.assert_close(back, layout.head(transformed).reshape(-1))
    torch.testing.assert_close(layout.head_sum(back), transformed.sum(dim=0))
