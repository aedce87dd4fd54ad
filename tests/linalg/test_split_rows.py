"""Bases of matrices whose rows are split, on one process that has all rows (on several: tests/distributed)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from subspace_lab import linalg
from subspace_lab.linalg.split_rows import SplitRows, orthonormal_columns
from subspace_lab.subspaces.span import SPLIT_ITERATIONS, SPLIT_OVERSAMPLE


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SplitRows]:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    yield SplitRows()
    dist.destroy_process_group()


def matrices(p: int, q: int, fall: float) -> torch.Tensor:
    A = torch.randn(3, p, q, generator=torch.Generator().manual_seed(0))
    U, _, Vh = torch.linalg.svd(A, full_matrices=False)
    return A if not fall else (U * torch.arange(1, min(p, q) + 1) ** -fall) @ Vh


@pytest.mark.parametrize("fall,loss", [(0.0, 2e-2), (1.0, 1e-5)])
@pytest.mark.parametrize("p,q", [(512, 256), (256, 256), (100, 256)])
def test_iteration_captures_what_the_svd_does(rows: SplitRows, p: int, q: int, fall: float, loss: float) -> None:
    A = matrices(p, q, fall)
    best = linalg.captured_energy(A, linalg.truncated_svd(A, 32)[0])
    P = linalg.randomized_svd(A, 32, key=1, oversample=SPLIT_OVERSAMPLE, power_iterations=SPLIT_ITERATIONS, rows=rows)[
        0
    ]
    assert (P.mT @ P - torch.eye(32)).abs().max() < 1e-5
    assert (1 - linalg.captured_energy(A, P) / best).max() < loss


def test_split_kernels_are_the_whole_ones(rows: SplitRows) -> None:
    A = matrices(40, 24, 0.5)
    for whole, split in (
        (linalg.randomized_svd(A, 5, key=3)[0], linalg.randomized_svd(A, 5, key=3, rows=rows)[0]),
        (linalg.subspace_iteration(A, P0(A))[0], linalg.subspace_iteration(A, P0(A), rows=rows)[0]),
    ):
        torch.testing.assert_close(linalg.align_signs(split, whole), whole, rtol=0, atol=2e-4)


def P0(A: torch.Tensor) -> torch.Tensor:
    return linalg.randomized_svd(A, 5, key=7, power_iterations=0)[0]


def test_bad_and_poor_matrices_do_no_harm(rows: SplitRows) -> None:
    A = matrices(40, 24, 0.5)
    A[1, 3, 4] = float("inf")
    A[2] = A[2, :, :1] @ A[2, :1]  # of rank one
    P = linalg.randomized_svd(A, 5, key=3, rows=rows)[0]
    assert torch.isfinite(P).all()
    assert (P.mT @ P - torch.eye(5)).abs().max() < 1e-5
    assert linalg.captured_energy(A[2], P[2]) > 0.999
    assert torch.equal(linalg.largest_entry(A, rows).isfinite().flatten(), torch.tensor([True, False, True]))
    assert linalg.largest_entry(A[:, :0], rows).abs().max() == 0  # a process without a row


def test_orthonormal_columns_of_an_ill_conditioned_matrix(rows: SplitRows) -> None:
    Y = torch.randn(60, 8, generator=torch.Generator().manual_seed(1)) @ torch.diag(10.0 ** -torch.arange(8))
    Y[:, 5] = 0
    Q = orthonormal_columns(Y, rows)
    lengths = Q.norm(dim=0)
    known = lengths > 0.5
    assert int(known.sum()) >= 5 and torch.all(lengths[~known] == 0)
    inside = Q[:, known]
    assert (inside.mT @ inside - torch.eye(int(known.sum()))).abs().max() < 1e-5


def test_parts_of_a_basis_make_the_whole(rows: SplitRows) -> None:
    P = torch.randn(3, 7, 2, generator=torch.Generator().manual_seed(2))
    assert torch.equal(rows.gather(rows.own(P), 7), P)
