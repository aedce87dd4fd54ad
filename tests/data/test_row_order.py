from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from subspace_lab.data.order import EpochOrder, mix, validation_batch


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 40), b=st.integers(1, 7), world=st.integers(1, 4), seed=st.integers(0, 2**31))
def test_processes_share_the_batches_of_one(n: int, b: int, world: int, seed: int) -> None:
    one = EpochOrder(n, seed)
    for index in (0, 1, 5, 23):
        together = [EpochOrder(n, seed).batch(index, b, rank, world) for rank in range(world)]
        np.testing.assert_array_equal(np.concatenate(together), one.batch(index, b * world, 0, 1))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(1, 50), seed=st.integers(0, 100))
def test_epochs_are_permutations(n: int, seed: int) -> None:
    order = EpochOrder(n, seed)
    epochs = order.rows(0, 3 * n).reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs.tolist())
    np.testing.assert_array_equal(EpochOrder(n, seed).rows(2 * n, n), epochs[2])  # without the epochs before
    np.testing.assert_array_equal(order.rows(n // 2, n), epochs.flatten()[n // 2 : n // 2 + n])


def test_seed_and_epoch_change_the_order() -> None:
    a, b = EpochOrder(100, 0), EpochOrder(100, 1)
    assert not np.array_equal(a.rows(0, 100), b.rows(0, 100))
    assert not np.array_equal(a.rows(0, 100), a.rows(100, 100))
    assert not np.array_equal(a.rows(100, 100), b.rows(0, 100)), "seed 0, epoch 1 is not seed 1, epoch 0"
    assert mix(1, 23) != mix(12, 3)


def test_order_is_the_same_on_every_machine() -> None:
    assert EpochOrder(10, 0).rows(0, 10).tolist() == [1, 9, 0, 8, 5, 2, 4, 3, 6, 7]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 7, 12, 13])
def test_validation_rows_once_each(n: int, world: int) -> None:
    size = 4
    batches = -(-n // (size * world))
    rows = [validation_batch(k, n, size, r, world).tolist() for k in range(batches) for r in range(world)]
    assert [row for batch in rows for row in batch] == list(range(n))


def test_no_rows() -> None:
    with pytest.raises(ValueError, match="at least one row"):
        EpochOrder(0, 0)
