from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_lab import linalg
from subspace_lab.linalg import svd

Route = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def warm(A: Tensor, r: int) -> tuple[Tensor, Tensor]:
    start = linalg.orthonormalize(torch.randn(*A.shape[:-2], A.shape[-1], r, dtype=torch.float64))
    return linalg.subspace_iteration(
        A, start.to(torch.float64 if A.dtype == torch.float64 else torch.float32), iterations=2
    )


ROUTES: dict[str, Route] = {
    "truncated_svd": linalg.truncated_svd,
    "gram_eigh": linalg.gram_eigh,
    "randomized_svd": lambda A, r: linalg.randomized_svd(A, r, key=7),
    "subspace_iteration": warm,
}


def orthogonality(P: Tensor) -> float:
    P = P.double()
    return float((P.mT @ P - torch.eye(P.shape[-1], dtype=P.dtype)).abs().max())


def decaying(p: int, q: int, decades: float = 8.0, power: float | None = None, seed: int = 0) -> Tensor:
    """float64 (p, q) with singular values 10^(0 … -decades), or i^-power."""
    g = torch.Generator().manual_seed(seed)
    m = min(p, q)
    U = torch.linalg.qr(torch.randn(p, m, dtype=torch.float64, generator=g)).Q
    V = torch.linalg.qr(torch.randn(q, m, dtype=torch.float64, generator=g)).Q
    i = torch.arange(1, m + 1, dtype=torch.float64)
    s = i**-power if power is not None else torch.logspace(0, -decades, m, dtype=torch.float64)
    A: Tensor = (U * s) @ V.mT
    return A


def best_energy(A: Tensor, r: int) -> Tensor:
    s = torch.linalg.svdvals(A.double())
    fraction: Tensor = s[..., :r].square().sum(-1) / s.square().sum(-1)
    return fraction


@pytest.mark.parametrize("route", ROUTES)
@settings(max_examples=25, deadline=None)
@given(
    batch=st.sampled_from([(), (3,), (2, 2)]),
    p=st.integers(1, 20),
    q=st.integers(1, 20),
    r=st.integers(1, 20),
    rank=st.integers(0, 20),
    log_scale=st.integers(-30, 30),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 99),
)
def test_any_matrix_gives_an_orthonormal_basis(
    route: str,
    batch: tuple[int, ...],
    p: int,
    q: int,
    r: int,
    rank: int,
    log_scale: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    r, rank = min(r, q), min(rank, p, q)
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    A = torch.randn(*batch, p, rank, dtype=torch.float64, generator=g) @ torch.randn(
        *batch, rank, q, dtype=torch.float64, generator=g
    )
    A = (A * 10.0**log_scale).to(dtype)
    P, s = ROUTES[route](A, r)
    assert P.shape == (*batch, q, r) and s.shape == (*batch, r)
    assert P.dtype == s.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert orthogonality(P) <= 5e-6
    assert (s >= 0).all()
    if r >= min(p, q) or (rank <= r and dtype != torch.bfloat16):
        # Everything fits: all energy must be captured (bf16 rounding raises the rank).
        energy = linalg.captured_energy(A, P)
        torch.testing.assert_close(energy, torch.full_like(energy, float(rank > 0)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("route", ["truncated_svd", "gram_eigh"])
@pytest.mark.parametrize(("p", "q", "r"), [(40, 24, 6), (24, 40, 6), (24, 24, 24), (24, 40, 24), (9, 9, 1)])
def test_exact_routes_equal_torch_svd_in_float64(route: str, p: int, q: int, r: int) -> None:
    A = torch.stack([decaying(p, q, decades=2, seed=seed) for seed in range(3)])
    P, s = ROUTES[route](A, r)
    expected = torch.linalg.svd(A, full_matrices=False)
    V = expected.Vh.mT[..., :r]
    torch.testing.assert_close(s, expected.S[..., :r], atol=1e-9, rtol=1e-7)
    # Column by column up to sign, not only the span.
    torch.testing.assert_close((P * V).sum(-2).abs(), torch.ones(3, r, dtype=A.dtype), atol=1e-9, rtol=0)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("p", "q", "r"), [(96, 64, 16), (64, 96, 16), (64, 64, 64)])
def test_spectrum_decaying_to_1e_8_in_float32(route: str, p: int, q: int, r: int) -> None:
    A = decaying(p, q, decades=8)
    torch.manual_seed(0)
    P, s = ROUTES[route](A.float(), r)
    exact = torch.linalg.svdvals(A)[:r]
    assert orthogonality(P) <= 5e-6
    assert float(linalg.captured_energy(A, P.double())) >= 0.9999 * float(best_energy(A, r))
    # Squaring costs gram_eigh half the digits; two iterations from random leave the tail unconverged.
    clear = exact > 3e-2
    torch.testing.assert_close(s.double()[clear], exact[clear], rtol=1e-3, atol=0)
    # Ordered like the SVD: the image of every clear direction has its singular value.
    torch.testing.assert_close((A @ P.double()).norm(dim=0)[clear], exact[clear], rtol=1e-3, atol=0)


@pytest.mark.parametrize(("p", "q"), [(128, 256), (256, 128)])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_randomized_captures_nearly_the_best_energy(p: int, q: int, power: float) -> None:
    A = decaying(p, q, power=power).float()
    best = best_energy(A, 16)
    sketch = linalg.captured_energy(A, linalg.randomized_svd(A, 16, key=3, power_iterations=0)[0])
    once = linalg.captured_energy(A, linalg.randomized_svd(A, 16, key=3)[0])
    assert float(once / best) >= 0.995
    assert float(once) > float(sketch)  # the power step must do something
    assert float(once) <= float(best) + 1e-6


def test_randomized_is_reproducible_and_takes_one_key_per_matrix() -> None:
    A = torch.stack([decaying(30, 40, power=0.5, seed=seed) for seed in range(3)]).float()
    same = linalg.randomized_svd(A, 4, key=5)[0]
    assert torch.equal(same, linalg.randomized_svd(A, 4, key=5)[0])
    assert not torch.equal(same, linalg.randomized_svd(A, 4, key=6)[0])
    keyed = linalg.randomized_svd(A, 4, key=torch.tensor([5, 6, 7]))[0]
    for index, key in enumerate((5, 6, 7)):
        torch.testing.assert_close(keyed[index], linalg.randomized_svd(A[index], 4, key=key)[0], atol=1e-4, rtol=0)


def test_warm_start_beats_the_stale_basis_and_nears_the_exact_one() -> None:
    old, noise = decaying(96, 64, power=0.7), decaying(96, 64, power=0.7, seed=1)
    A = (math.cos(0.4) * old + math.sin(0.4) * noise).float()
    stale = linalg.truncated_svd(old.float(), 12)[0]
    best = float(best_energy(A, 12))
    energies = [float(linalg.captured_energy(A, stale)) / best]
    for iterations in (1, 2, 4):
        P, _ = linalg.subspace_iteration(A, stale, iterations=iterations)
        energies.append(float(linalg.captured_energy(A, P)) / best)
    assert energies == sorted(energies)
    assert energies[0] < 0.93 and energies[1] > 0.97 and energies[3] > 0.997, energies


def test_rayleigh_ritz_keeps_the_span_and_finds_the_singular_vectors_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(3, 50, 30, generator=generator) * torch.logspace(0, -2, 30)
    start = linalg.orthonormalize(torch.randn(3, 30, 8, generator=torch.Generator().manual_seed(1)))
    raw, _ = linalg.subspace_iteration(A, start, rayleigh_ritz=False)
    P, _ = linalg.subspace_iteration(A, start)
    torch.testing.assert_close(raw @ raw.mT, P @ P.mT, atol=1e-4, rtol=0)
    for _ in range(5):  # as a run does, refresh after refresh
        P, s = linalg.subspace_iteration(A, P)
    image = A @ P
    gram = image.mT @ image
    largest = gram.diagonal(dim1=1, dim2=2)
    assert (largest[:, :-1] >= largest[:, 1:]).all()
    torch.testing.assert_close(s[:, :4], torch.linalg.svdvals(A)[:, :4], rtol=1e-2, atol=0)
    off = gram - torch.diag_embed(largest)
    assert off[:, :4, :4].abs().max() < 0.02 * largest.max()
    assert (s.diff(dim=-1) <= 0).all()


def test_exact_basis_is_a_fixed_point_of_subspace_iteration() -> None:
    A = decaying(40, 30, decades=2)
    exact, _ = linalg.truncated_svd(A, 6)
    again, _ = linalg.subspace_iteration(A, exact)
    torch.testing.assert_close(linalg.align_signs(again, exact), exact, atol=1e-10, rtol=0)


def test_zero_matrix_keeps_the_old_basis() -> None:
    old = linalg.orthonormalize(torch.randn(2, 10, 3, generator=torch.Generator().manual_seed(0)))
    A = torch.randn(2, 12, 10, generator=torch.Generator().manual_seed(1))
    A[0] = 0
    for rayleigh_ritz in (True, False):
        P, s = linalg.subspace_iteration(A, old, rayleigh_ritz=rayleigh_ritz)
        assert torch.equal(P[0], old[0]) and not torch.allclose(P[1], old[1])
        assert (s[0] == 0).all()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_matrix_neither_raises_nor_touches_its_neighbours(route: str, bad: float) -> None:
    A = torch.randn(3, 12, 10, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    clean, _ = ROUTES[route](A, 4)
    A[1, 2, 3] = bad
    torch.manual_seed(0)
    P, s = ROUTES[route](A, 4)
    assert torch.isfinite(P).all() and (s[1] == 0).all()
    assert orthogonality(P) <= 5e-6
    torch.testing.assert_close(P[::2], clean[::2])
    torch.testing.assert_close(linalg.captured_energy(A, P)[1], torch.tensor(0.0))


def test_lapack_failure_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    A = decaying(20, 15, decades=2).float()
    expected, s = linalg.truncated_svd(A, 4)
    real_eigh = torch.linalg.eigh

    def no_svd(*_: object, **__: object) -> None:
        raise svd._LinAlgError("did not converge")

    def only_double(G: Tensor) -> tuple[Tensor, Tensor]:
        if G.dtype != torch.float64:
            raise svd._LinAlgError("did not converge")
        values, vectors = real_eigh(G)
        return values, vectors

    monkeypatch.setattr(torch.linalg, "svd", no_svd)
    monkeypatch.setattr(torch.linalg, "eigh", only_double)
    P, s_fallback = linalg.truncated_svd(A, 4)
    torch.testing.assert_close(linalg.align_signs(P, expected), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(s_fallback, s, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("r", [0, 6])
def test_rank_out_of_range(route: str, r: int) -> None:
    with pytest.raises(ValueError, match=r"rank must be|orthonormal columns"):
        ROUTES[route](torch.zeros(8, 5), r)


def test_align_signs() -> None:
    old = linalg.orthonormalize(torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0)))
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0])
    torch.testing.assert_close(linalg.align_signs(old * flips, old), old)
    orthogonal = torch.eye(4)[:, 2:]
    assert torch.equal(linalg.align_signs(orthogonal, torch.eye(4)[:, :2]), orthogonal)  # 0 counts as +1


def test_captured_energy() -> None:
    A = torch.diag(torch.tensor([2.0, 1.0, 0.0])) * 1e25  # squares overflow float32
    torch.testing.assert_close(linalg.captured_energy(A, torch.eye(3)[:, :1]), torch.tensor(0.8))
    small = A * 1e-30 * 1e-30  # and underflow
    torch.testing.assert_close(linalg.captured_energy(small, torch.eye(3)[:, 1:2]), torch.tensor(0.2))
    assert float(linalg.captured_energy(torch.zeros(3, 3), torch.eye(3))) == 0


def test_autocast_and_reduced_matmul_precision_do_not_leak_in() -> None:
    A = decaying(64, 48, decades=3).float()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for route in ROUTES.values():
                P, _ = route(A, 8)
                assert P.dtype == torch.float32 and orthogonality(P) <= 5e-6
    finally:
        torch.set_float32_matmul_precision(before)
