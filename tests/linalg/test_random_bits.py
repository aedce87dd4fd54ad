from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_lab.linalg import derive_key, rademacher, random_bits, uniform

MASK = 2**32 - 1


def mix(x: int) -> int:
    for shift, multiplier in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = ((x ^ (x >> shift)) * multiplier) & MASK
    return x ^ (x >> 14)


def word(key: int, i: int) -> int:
    """The definition of the module docstring in Python integers."""
    key %= 2**64
    k0, k1 = (mix(mix((key & MASK) ^ c) ^ (key >> 32)) for c in (0x243F6A88, 0x85A308D3))
    return mix(mix(((i & MASK) + k0) & MASK) ^ k1 ^ mix(i >> 32))


def test_golden_words() -> None:
    """Frozen: a change here silently changes every random basis ever saved as (key, offset)."""
    assert random_bits(0, 0, 4).tolist() == [2336574895, 2871891971, 47115194, 3424340825]
    assert random_bits(torch.tensor([0, 1]), 2**32 - 1, 3).tolist() == [
        [1502605965, 2912592062, 2771269327],
        [3141544228, 1096759381, 2400485376],
    ]
    assert derive_key("a", 1) == 7188804247344528085


@settings(max_examples=30, deadline=None)
@given(key=st.integers(-(2**63), 2**64 - 1), start=st.integers(0, 2**62), count=st.integers(0, 5))
def test_words_equal_the_definition(key: int, start: int, count: int) -> None:
    assert random_bits(key, start, count).tolist() == [word(key, start + i) for i in range(count)]


@settings(max_examples=30, deadline=None)
@given(
    key=st.integers(0, 2**63 - 1),
    offset=st.integers(0, 200),
    size=st.integers(0, 120),
    cut=st.integers(0, 120),
)
def test_streams_do_not_depend_on_chunks(key: int, offset: int, size: int, cut: int) -> None:
    cut = min(cut, size)
    for stream in (rademacher, uniform):
        whole = stream((size,), key=key, offset=offset)
        parts = [stream((cut,), key=key, offset=offset), stream((size - cut,), key=key, offset=offset + cut)]
        assert torch.equal(whole, torch.cat(parts))
        assert torch.equal(whole, stream((offset + size,), key=key)[offset:])


def test_entries_equal_the_definition_and_rows_are_addressable() -> None:
    signs = rademacher((7, 11), key=42, offset=5)
    expected = [1 - 2 * ((word(42, i // 32) >> (i % 32)) & 1) for i in range(5, 5 + 77)]
    assert signs.flatten().tolist() == expected
    assert torch.equal(signs[3], rademacher((11,), key=42, offset=5 + 3 * 11))
    assert uniform((3,), key=42, offset=2).tolist() == [(word(42, i) >> 8) / 2**24 for i in range(2, 5)]


def test_batched_keys() -> None:
    keys = torch.tensor([[3, 2**62], [-1, 0]])
    for stream in (rademacher, uniform):
        batch = stream((4, 5), key=keys, offset=3)
        assert batch.shape == (2, 2, 4, 5)
        for i in range(2):
            for j in range(2):
                assert torch.equal(batch[i, j], stream((4, 5), key=int(keys[i, j]), offset=3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8])
def test_rademacher_is_exact_in_every_dtype(dtype: torch.dtype) -> None:
    signs = rademacher((100,), key=1, dtype=dtype)
    assert signs.dtype == dtype
    assert torch.equal(signs.float(), rademacher((100,), key=1))


def test_statistics() -> None:
    n = 1 << 18
    bound = 5 / n**0.5
    streams = [rademacher((n,), key=key) for key in (0, 1, 2, 2**32, 2**32 + 1)]
    for i, a in enumerate(streams):
        assert abs(float(a.mean())) < bound
        for lag in (1, 2, 31, 32, 33, 1024):
            assert abs(float((a[lag:] * a[:-lag]).mean())) < bound * 1.1
        for b in streams[:i]:
            for shift in (0, 32, 64):  # neighbouring keys must not give shifted copies
                assert abs(float((a[shift:] * b[: n - shift]).mean())) < bound * 1.1
    u = uniform((n,), key=9, dtype=torch.float64)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < bound and abs(float(u.var()) - 1 / 12) < bound
    counts = torch.histc(u, 256, 0, 1)
    chi2 = float(((counts - n / 256) ** 2 / (n / 256)).sum())
    assert 150 < chi2 < 380  # 255 degrees of freedom
    words = random_bits(5, 0, 1 << 14)
    ones = torch.stack([(words >> bit & 1).double().mean() for bit in range(32)])
    assert float((ones - 0.5).abs().max()) < 2.5 / (1 << 14) ** 0.5
    assert len(set(words.tolist())) == words.numel()  # a bijection of the counter


def test_derive_key_separates_parts() -> None:
    keys = [derive_key(*parts) for parts in (("ab", "c"), ("a", "bc"), (1,), ("1",), (1, 1), (11,), (-1,), ())]
    assert len(set(keys)) == len(keys) and all(0 <= key < 2**63 for key in keys)


def test_rejects() -> None:
    with pytest.raises(ValueError, match="non-negative"):
        random_bits(0, -1, 3)
    with pytest.raises(ValueError, match="non-negative"):
        rademacher((3,), key=0, offset=-1)
    with pytest.raises(ValueError, match="float32"):
        uniform((3,), key=0, dtype=torch.bfloat16)


def test_a_number_of_its_own_is_a_stream_s_first() -> None:
    assert uniform((), key=3).shape == () and uniform((), key=3) == uniform((4,), key=3)[0]
    assert rademacher((), key=3) == rademacher((4,), key=3)[0]
