"""Coder, frequency models, quantisers, payload: exact round trips and the lengths that theory promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_lab.compression import frequencies, payload, quantize
from subspace_lab.compression.arithmetic import Frequencies, decode, encode
from subspace_lab.compression.quantize import Levels, Quantized


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_coder_gives_back_any_symbols(data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 5000), min_size=1, max_size=40))
    increment = data.draw(st.sampled_from([0, 1, 2, 1000, 2**20]))
    symbols = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=300))
    coded = encode(symbols, Frequencies(counts, increment))
    assert decode(coded, len(symbols), Frequencies(counts, increment)) == symbols


@pytest.mark.parametrize("symbols", [[0] * 3000, [1] * 3000, [2] * 50, [0, 2] * 400, []])
def test_coder_at_the_edges_of_its_interval(symbols: list[int]) -> None:
    """Long runs of the first, the last and an almost impossible symbol; the total as large as it may be."""
    for counts in ([2**24 - 2, 1, 1], [1, 1, 2**24 - 2], [1, 2**23, 1], [1, 1, 1]):
        coded = encode(symbols, Frequencies(counts))
        assert decode(coded, len(symbols), Frequencies(counts)) == symbols
        total = sum(counts)
        content = sum(math.log2(total / counts[s]) for s in symbols)
        assert 8 * len(coded) <= content + 2 + 7 + 1e-3 * len(symbols)


def test_adaptive_code_needs_no_table() -> None:
    rng = np.random.default_rng(0)
    symbols = rng.choice(5, size=2000, p=[0.7, 0.15, 0.1, 0.04, 0.01])
    p = np.bincount(symbols) / len(symbols)
    entropy = -(p * np.log2(p)).sum() * len(symbols)
    coded = encode(symbols.tolist(), frequencies.create("flat", 0, 5))
    # Krichevsky & Trofimov: at most (levels − 1)/2 · log2 n + O(1) bits above the empirical entropy.
    assert entropy <= 8 * len(coded) <= entropy + 2 * math.log2(2000) + 16


def test_gaussian_code_is_within_a_few_bytes_of_the_entropy() -> None:
    z = np.random.default_rng(1).normal(size=750) * 2.2
    quantized = quantize.full_range(z, 31)
    assert quantized.shape == "gaussian"
    p = np.bincount(quantized.indices) / 750
    entropy = -(p[p > 0] * np.log2(p[p > 0])).sum() * 750 / 8
    size = len(payload.pack(quantized, {}, []))
    flat = len(payload.pack(Quantized(quantized.levels, quantized.indices, "flat"), {}, []))
    assert size <= entropy + 16 and size < flat


def test_bell_tables_are_these_integers_for_ever() -> None:
    """The decoder of an old file computes them again: a changed table is a changed format."""
    assert frequencies.table("gaussian", 48, 9) == (9, 291, 3538, 15856, 26142, 15856, 3538, 291, 9)
    assert frequencies.table("laplace", 48, 9) == (561, 1523, 4139, 11251, 30583, 11251, 4139, 1523, 561)
    assert frequencies.table("gaussian", 0, 4) == (1, 32767, 32767, 1)
    for shape in ("gaussian", "laplace"):
        for width in (0, 20, 77, 255):
            for levels in (1, 2, 5, 300, 4096):
                made = frequencies.table(shape, width, levels)  # type: ignore[arg-type]
                assert min(made) >= 1 and made == made[::-1] and sum(made) <= 2**16


def test_bells_match_the_functions_they_stand_for() -> None:
    for width, sigma in ((48, 1.0), (80, 4.0), (32, 0.5)):
        made = np.array(frequencies.table("gaussian", width, 41), dtype=float)
        k = np.arange(-20, 21)
        exact = np.exp(-(k**2) / (2 * sigma**2))
        assert np.allclose(made / made.sum(), exact / exact.sum(), atol=1e-3)
        made = np.array(frequencies.table("laplace", width, 41), dtype=float)
        exact = np.exp(-np.abs(k) / sigma)
        assert np.allclose(made / made.sum(), exact / exact.sum(), atol=1e-3)


@given(st.integers(2, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_quantisers_stay_within_half_a_step(count: int, seed: int) -> None:
    z = np.random.default_rng(seed).standard_t(3, size=200)
    whole = quantize.full_range(z, count)
    assert np.abs(whole.values() - z).max() <= whole.levels.step * 0.5001 + 0.01 * np.abs(z).max()
    errors = [np.square(q.values() - z).sum() for q in (quantize.clipped(z, count), whole)]
    assert errors[0] <= errors[1] * (1 + 1e-6)
    book = quantize.kmeans(z, count)
    assert len(book.levels.values()) <= count
    assert np.all(np.diff(book.levels.values()) > 0)


@pytest.mark.parametrize("z", [np.zeros(5), np.full(3, -2.5), np.array([1e-30, 3e30]), np.array([0.25])])
def test_degenerate_numbers_are_coded(z: np.ndarray) -> None:  # type: ignore[type-arg]
    for quantized in (quantize.full_range(z, 3), quantize.clipped(z, 4), quantize.kmeans(z, 4)):
        back, _ = payload.unpack(payload.pack(quantized, {}, []), [])
        assert np.array_equal(back.values(), quantized.values())
        assert np.isfinite(quantized.values()).all()


@given(st.data())
@settings(max_examples=80, deadline=None)
def test_payload_gives_back_the_very_floats(data: st.DataObject) -> None:
    count = data.draw(st.integers(2, 40))
    z = np.array(data.draw(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=100)), dtype=float)
    make = data.draw(st.sampled_from([quantize.full_range, quantize.clipped, quantize.kmeans]))
    quantized = make(z, count)
    extras = {
        "lambdas": torch.tensor([1.0, 0.3333333]),
        "mean": torch.randn(2, 3),
        "var": torch.tensor([1e-6, 7e4, 2.0]),
        "count": torch.tensor(12345),
        "double": torch.tensor([0.1], dtype=torch.float64),
        "signed": torch.tensor([-3, 0, 2**40]),
        "mask": torch.tensor([True, False]),
    }
    spec = [(n, list(t.shape), str(t.dtype).removeprefix("torch.")) for n, t in extras.items()]
    spec.insert(2, ("as_built", [4], "float32"))
    packed = payload.pack(quantized, extras, spec)
    back, found = payload.unpack(packed, spec)
    assert back.values().tobytes() == quantized.values().tobytes()
    assert set(found) == set(extras)
    for name, value in extras.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape
        assert torch.equal(found[name], payload.coded(value))
        assert torch.allclose(found[name].double(), value.double(), rtol=2**-10, atol=0)
    assert found["count"] == 12345 and torch.equal(found["signed"], extras["signed"])
    assert torch.equal(found["var"], extras["var"])  # a half would lose them: kept as float32


def test_halves_are_used_where_they_hold_the_numbers() -> None:
    z = quantize.full_range(np.linspace(-1, 1, 50), 5)
    spec = [("mean", [100], "float32")]
    empty, half = payload.pack(z, {}, spec), payload.pack(z, {"mean": torch.linspace(-3, 3, 100)}, spec)
    single = payload.pack(z, {"mean": torch.full((100,), 1e9)}, spec)
    assert len(half) - len(empty) == 200 and len(single) - len(empty) == 400


@given(st.binary(max_size=60))
@settings(max_examples=200, deadline=None)
def test_any_bytes_decode_or_are_called_damaged(data: bytes) -> None:
    try:
        quantized, _ = payload.unpack(data[:1] and bytes([min(data[0], 100)]) + data[1:], [("b", [2], "float32")])
    except payload.Damaged:
        return
    assert len(quantized.indices) <= 100


def test_steps_are_bfloat16() -> None:
    for value in (1.0, 0.1, 3.14159, 1e-20, 2.5e30):
        rounded = quantize.round_bfloat16(value)
        assert abs(rounded / value - 1) <= 2**-8
        assert torch.tensor(rounded).bfloat16().float().item() == rounded
    grid = Levels(4, 0.5).values()
    assert grid.tolist() == [-0.75, -0.25, 0.25, 0.75]
