"""Two processes over gloo: each makes its own rows, and only d numbers travel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from contracts.projections import sharded_rank

from subspace_lab.projections import KINDS, create


@pytest.mark.slow
def test_two_ranks_hold_the_rows_of_one_projection(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(sharded_rank, (2, str(tmp_path / "store"), str(tmp_path), KINDS), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    generator = torch.Generator().manual_seed(0)
    x, y, base = (torch.randn(n, generator=generator) for n in (60, 3001, 3001))
    for name in KINDS:
        whole = create(name, D=3001, d=60, seed=4)
        assert torch.equal(torch.cat([first[name][0], second[name][0]]), whole.matrix()), name
        assert torch.equal(torch.cat([first[name][1], second[name][1]]), whole.lift(x, base=base)), name
        assert torch.equal(first[name][2], second[name][2])
        assert (first[name][2] - whole.project(y)).norm() <= 1e-5 * y.norm()
        for report in (first[name], second[name]):
            assert report[3] == [("all_reduce", 4 * 60)]  # d numbers and nothing else
