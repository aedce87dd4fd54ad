from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_lab.linalg import orthonormalize

METHODS = ["auto", "qr", "cholesky"]


def orthogonality(Q: Tensor) -> float:
    Q = Q.double()
    return float((Q.mT @ Q - torch.eye(Q.shape[-1], dtype=Q.dtype)).abs().max())


def with_spectrum(n: int, k: int, s: Tensor, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(n, k, dtype=torch.float64, generator=g)).Q
    V = torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=g)).Q
    A: Tensor = (U * s) @ V.mT
    return A


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=30, deadline=None)
@given(
    batch=st.sampled_from([(), (3,), (2, 2), (0,)]),
    n=st.integers(1, 24),
    k=st.integers(1, 24),
    rank=st.integers(0, 24),
    log_scale=st.integers(-30, 30),
    column_decades=st.sampled_from([0, 8, 30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_columns_are_orthonormal_for_any_input(
    method: str,
    batch: tuple[int, ...],
    n: int,
    k: int,
    rank: int,
    log_scale: int,
    column_decades: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    k = min(n, k)
    rank = min(rank, k)
    g = torch.Generator().manual_seed(seed)
    left = torch.randn(*batch, n, rank, dtype=torch.float64, generator=g)
    Y = left @ torch.randn(*batch, rank, k, dtype=torch.float64, generator=g)
    Y = Y * torch.logspace(0, -column_decades, k, dtype=torch.float64) * 10.0**log_scale
    Q = orthonormalize(Y.to(dtype), method=method)  # type: ignore[arg-type]
    assert Q.shape == Y.shape
    assert Q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    if Q.numel():
        assert orthogonality(Q) <= (1e-12 if dtype == torch.float64 else 2e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("n", "k"), [(256, 64), (96, 96), (130, 129)])
@pytest.mark.parametrize("decades", [0, 4, 8, 20])
def test_ill_conditioned(method: str, n: int, k: int, decades: int) -> None:
    Y = with_spectrum(n, k, torch.logspace(0, -decades, k, dtype=torch.float64)).float()
    assert orthogonality(orthonormalize(Y, method=method)) <= 2e-6  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_degenerate_matrices(method: str, dtype: torch.dtype) -> None:
    n, k = 64, 64
    g = torch.Generator().manual_seed(1)
    half = torch.randn(n, 32, dtype=dtype, generator=g)
    cases = torch.stack(
        [
            torch.zeros(n, k, dtype=dtype),
            torch.ones(n, k, dtype=dtype),
            torch.cat([half, half], dim=-1),
            torch.cat([half, torch.zeros(n, 32, dtype=dtype)], dim=-1),
            torch.eye(n, k, dtype=dtype),
            torch.full((n, k), torch.finfo(dtype).max, dtype=dtype),
            torch.full((n, k), torch.finfo(dtype).tiny, dtype=dtype),
        ]
    )
    Q = orthonormalize(cases, method=method)  # type: ignore[arg-type]
    for index, matrix in enumerate(Q):
        assert orthogonality(matrix) <= (1e-12 if dtype == torch.float64 else 2e-6), index


@pytest.mark.parametrize("method", ["qr", "cholesky"])
def test_is_the_unique_qr_factor(method: str) -> None:
    Y = with_spectrum(60, 12, torch.logspace(0, -2, 12, dtype=torch.float64))
    Q, R = torch.linalg.qr(Y)
    expected = Q * R.diagonal().sign()
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 5e-5)):
        torch.testing.assert_close(
            orthonormalize(Y.to(dtype), method=method).double(),  # type: ignore[arg-type]
            expected,
            atol=tolerance,
            rtol=0,
        )


@pytest.mark.parametrize("method", ["qr", "cholesky"])
def test_keeps_the_span_of_a_rank_deficient_matrix_in_front(method: str) -> None:
    """Nested spans: the first 5 columns determine the first 5 of Q, whatever garbage follows."""
    Y = with_spectrum(40, 5, torch.logspace(0, -3, 5, dtype=torch.float64)).float()
    Q = orthonormalize(torch.cat([Y, Y], dim=-1), method=method)  # type: ignore[arg-type]
    residual = Y.double() - Q[:, :5].double() @ (Q[:, :5].double().mT @ Y.double())
    assert float(residual.norm() / Y.norm()) < 1e-6
    assert orthogonality(Q) <= 2e-6


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_input_does_not_raise_nor_touch_its_neighbours(method: str, bad: float) -> None:
    Y = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(0))
    Y[1, 2, 3] = bad
    Q = orthonormalize(Y, method=method)  # type: ignore[arg-type]
    for index in (0, 2):
        torch.testing.assert_close(Q[index], orthonormalize(Y[index], method=method))  # type: ignore[arg-type]


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_reduced_precision_matmuls_and_autocast_do_not_leak_in(setting: str) -> None:
    Y = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for method in ("qr", "cholesky"):
                Q = orthonormalize(Y, method=method)
                assert Q.dtype == torch.float32 and orthogonality(Q) <= 2e-6
    finally:
        torch.set_float32_matmul_precision(before)


def test_rejects_what_cannot_be_done() -> None:
    with pytest.raises(ValueError, match="orthonormal columns"):
        orthonormalize(torch.zeros(3, 4))
    with pytest.raises(ValueError, match="unknown method"):
        orthonormalize(torch.zeros(4, 3), method="lu")  # type: ignore[arg-type]
