from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_lab.linalg import (
    energy_rank,
    extend_basis,
    lift_span,
    orthonormalize,
    overlap,
    principal_angles,
    project_complement,
    project_span,
)


def basis(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return orthonormalize(torch.randn(*shape, dtype=torch.float64, generator=g)).to(dtype)


def orthogonality(P: Tensor) -> float:
    P = P.double()
    return float((P.mT @ P - torch.eye(P.shape[-1], dtype=P.dtype)).abs().max())


def test_span_and_complement_add_up() -> None:
    P = basis(3, 20, 6)
    A = torch.randn(3, 9, 20, generator=torch.Generator().manual_seed(1))
    inside, outside = lift_span(project_span(A, P), P), project_complement(A, P)
    torch.testing.assert_close(inside + outside, A, atol=1e-5, rtol=0)
    torch.testing.assert_close(inside.double(), A.double() @ P.double() @ P.double().mT, atol=1e-5, rtol=0)
    assert float((outside @ P).abs().max()) < 1e-5
    assert project_span(A.bfloat16(), P).dtype == torch.float32


def test_projecting_twice_cleans_a_nearly_contained_matrix() -> None:
    M = basis(64, 20)
    A = 1e4 * lift_span(torch.randn(8, 20, generator=torch.Generator().manual_seed(1)), M)
    A = A + torch.randn(8, 64, generator=torch.Generator().manual_seed(2))

    def leak(B: Tensor) -> float:
        return float((B.double() @ M.double()).norm() / B.double().norm())

    once, twice = leak(project_complement(A, M)), leak(project_complement(A, M, twice=True))
    assert once > 1e-5 > 1e-6 > twice


@settings(max_examples=30, deadline=None)
@given(
    q=st.integers(1, 16),
    m=st.integers(0, 16),
    k=st.integers(0, 16),
    kind=st.sampled_from(["random", "inside", "zero"]),
)
def test_extend_basis(q: int, m: int, k: int, kind: str) -> None:
    m = min(m, q)
    k = min(k, q - m)
    M = basis(2, q, m)
    new = torch.randn(2, q, k, generator=torch.Generator().manual_seed(1))
    if kind == "inside":
        new = M @ torch.randn(2, m, k, generator=torch.Generator().manual_seed(2))
    elif kind == "zero":
        new = torch.zeros(2, q, k)
    E = extend_basis(M, new)
    assert E.shape == (2, q, m + k)
    assert torch.equal(E[..., :m], M)
    if E.numel():
        assert orthogonality(E) <= 1e-5
        torch.testing.assert_close(E @ (E.mT @ new), new, atol=1e-4, rtol=0)


def test_extend_basis_broadcasts_and_rejects() -> None:
    assert extend_basis(basis(8, 2), torch.randn(3, 8, 4)).shape == (3, 8, 6)
    with pytest.raises(ValueError, match="cannot extend"):
        extend_basis(basis(4, 3), torch.zeros(4, 2))


def test_energy_rank() -> None:
    s = torch.tensor([[2.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert energy_rank(s, 0.8).tolist() == [2, 0, 1]
    assert energy_rank(s, 0.5).tolist() == [1, 0, 1]
    assert energy_rank(s, 1.0).tolist() == [3, 0, 1]
    assert energy_rank(s, 0.0).tolist() == [0, 0, 0]
    assert energy_rank(s, 0.5, total=torch.tensor([10.0, 1.0, 2.0])).tolist() == [2, 4, 1]
    with pytest.raises(ValueError, match="threshold"):
        energy_rank(s, 1.5)


@pytest.mark.parametrize("angle", [0.0, 1e-6, 1e-4, 0.1, 0.8, 1.5, math.pi / 2 - 1e-4, math.pi / 2])
def test_principal_angles_of_a_known_rotation(angle: float) -> None:
    n, k = 40, 3
    frame = basis(n, 2 * k, dtype=torch.float64)
    P, N = frame[:, :k], frame[:, k:]
    theta = torch.tensor([0.0, angle / 2, angle], dtype=torch.float64)
    Q = (P * theta.cos() + N * theta.sin()) @ basis(k, k, seed=3, dtype=torch.float64)
    torch.testing.assert_close(principal_angles(P, Q), theta, atol=1e-12, rtol=1e-9)
    found = principal_angles(P.float(), Q.float()).double()
    # The inputs are rounded to 6e-8 per entry; arccos alone would be off by 3e-4 at small angles.
    torch.testing.assert_close(found, theta, atol=1e-6, rtol=1e-5)
    expected = theta.cos().square().mean()
    torch.testing.assert_close(overlap(P, Q), expected)


def test_angles_of_nested_and_orthogonal_spaces() -> None:
    frame = basis(2, 12, 6)
    wide, narrow = frame[..., :4], frame[..., 1:3]
    for pair in ((wide, narrow), (narrow, wide)):
        assert principal_angles(*pair).shape == (2, 2)
        assert float(principal_angles(*pair).max()) < 1e-6
        torch.testing.assert_close(overlap(*pair), torch.ones(2))
    torch.testing.assert_close(principal_angles(narrow, frame[..., 4:]), torch.full((2, 2), math.pi / 2))
    assert float(overlap(narrow, frame[..., 4:]).max()) < 1e-10
    broken = wide.clone()
    broken[1] = float("nan")
    angles = principal_angles(broken, narrow)
    assert torch.isnan(angles[1]).all() and torch.isfinite(angles[0]).all()
    with pytest.raises(ValueError, match="different spaces"):
        principal_angles(basis(5, 2), basis(6, 2))
