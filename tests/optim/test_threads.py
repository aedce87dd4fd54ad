"""Work spread over threads: results in order, also where there is no work."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from subspace_lab.optim.threads import in_parallel


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("items", [[], [3], [3, 1, 2]])
def test_results_come_in_order_and_none_where_a_process_has_no_share(items: list[int]) -> None:
    assert in_parallel(lambda item: item * item, items) == [item * item for item in items]
    assert torch.get_num_threads() == 2
