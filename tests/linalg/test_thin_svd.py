"""Thin SVDs, leading triplets and polar factors against torch.linalg in float64, and where LAPACK fails."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace_lab.linalg import thin_svd as module
from subspace_lab.linalg.polar import nuclear_norm, polar, polar_beside
from subspace_lab.linalg.thin_svd import fallbacks, gram_factors, thin_svd, top_k

SHAPES = [(40, 40), (130, 40), (40, 130), (50, 41)]


def matrix(m: int, n: int, s: Tensor, seed: int = 0) -> Tensor:
    """A (m, n) with these singular values, float64."""
    g = torch.Generator().manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(k, len(s), generator=g, dtype=torch.float64)).Q for k in (m, n))
    return U * s @ V.mT


def spectrum(name: str, r: int) -> Tensor:
    spectra = {
        "decaying": torch.arange(1, r + 1).double().pow(-0.7),
        "flat": torch.ones(r).double(),
        "steep": torch.logspace(0, -4, r).double(),
        "low rank": torch.cat([torch.linspace(2, 1, r // 4), torch.zeros(r - r // 4)]).double(),
    }
    return spectra[name]


def orthogonality(U: Tensor) -> float:
    return float((U.double().mT @ U.double() - torch.eye(U.shape[-1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", ["decaying", "flat", "steep", "low rank"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_thin_svd(shape: tuple[int, int], name: str, dtype: torch.dtype) -> None:
    s = spectrum(name, min(shape))
    A = torch.stack([1e-3 * matrix(*shape, s), 50 * matrix(*shape, s, seed=1)]).to(dtype)
    eps = torch.finfo(dtype).eps
    U, S, V = thin_svd(A)
    assert (U.shape, S.shape, V.shape) == ((2, shape[0], len(s)), (2, len(s)), (2, shape[1], len(s)))
    assert U.dtype == S.dtype == V.dtype == dtype
    torch.testing.assert_close(S[1].double(), 50 * s, rtol=0, atol=1000 * eps)
    for X in (*U, *V):
        assert orthogonality(X) < 30 * eps
    torch.testing.assert_close((U * S[:, None]) @ V.mT, A, rtol=0, atol=float(50 * eps * A.abs().max()))
    first = thin_svd(A, 3)
    assert all(torch.equal(a, b[..., :3]) for a, b in zip(first, (U, S, V), strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("approximate", [False, True])
def test_leading_triplets(shape: tuple[int, int], approximate: bool) -> None:
    for name in ("decaying", "steep"):
        s = spectrum(name, min(shape))
        A = torch.stack([matrix(*shape, s), 1e3 * matrix(*shape, s, seed=1)])
        expected = [torch.linalg.svd(X, full_matrices=False) for X in A]
        U, S, V = top_k(A.float(), 7, approximate=approximate)
        for b, (left, values, right) in enumerate(expected):
            torch.testing.assert_close(S[b].double(), values[:7], rtol=1e-5, atol=0)
            best = left[:, :7] * values[:7] @ right[:7]
            assert (U[b] * S[b] @ V[b].mT - best).norm() < 2e-6 * best.norm()
            assert orthogonality(U[b]) < 5e-6
            assert orthogonality(V[b]) < 5e-6


@pytest.mark.parametrize("approximate", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_directions_without_energy_are_zero(shape: tuple[int, int], approximate: bool) -> None:
    A = matrix(*shape, torch.tensor([3.0, 2.0]).double()).float()
    U, S, V = top_k(A[None], 8, approximate=approximate)
    for X in (U[0], V[0]):
        assert X[:, 2:].abs().max() == 0
        assert orthogonality(X[:, :2]) < 2e-6
    torch.testing.assert_close(S[0], torch.tensor([3.0, 2, 0, 0, 0, 0, 0, 0]), rtol=1e-5, atol=0)
    assert all(X.abs().max() == 0 for X in top_k(torch.zeros(2, *shape), 5, approximate=approximate))


@pytest.mark.parametrize("method", ["svd", "iterate"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_polar_factor(shape: tuple[int, int], method: Any) -> None:
    for name, tolerance in (("decaying", 1e-5), ("flat", 2e-6), ("steep", 2e-3)):
        s = spectrum(name, min(shape))
        A = torch.stack([1e-9 * matrix(*shape, s), 1e9 * matrix(*shape, s, seed=1)]).float()
        P = polar(A, method=method)
        for X, found in zip(A.double(), P, strict=True):
            left, values, right = torch.linalg.svd(X, full_matrices=False)
            assert (found - left @ right).norm() < tolerance * found.norm()
            lengths = torch.linalg.svdvals(found.double())
            assert lengths[0] / lengths[-1] - 1 < 4e-6
            assert nuclear_norm(X.float(), found).item() == pytest.approx(values.sum().item(), rel=1e-6)
        wide = polar(A.double(), method=method)
        assert torch.linalg.svdvals(wide).sub(1).abs().max() < 1e-8
    low = matrix(*shape, torch.tensor([3.0, 2.0]).double())
    found = polar(low.float(), method=method).double()
    left, _, right = torch.linalg.svd(low, full_matrices=False)
    assert (found - left[:, :2] @ right[:2]).norm() < 1e-4
    assert polar(torch.zeros(2, *shape), method=method).abs().max() == 0


def test_polar_of_bases_side_by_side() -> None:
    """Hundreds of singular values 1, others in pairs around it, some zero columns."""
    g = torch.Generator().manual_seed(0)
    bases = [torch.linalg.qr(torch.randn(300, 20, generator=g)).Q for _ in range(15)]
    bases += [bases[0].clone(), torch.zeros(300, 5)]
    A = torch.cat(bases, dim=1)
    left, s, right = torch.linalg.svd(A.double(), full_matrices=False)
    kept = s > 1e-4
    assert kept.sum() in range(280, 301)
    expected = left[:, kept] @ right[kept]
    for method in ("svd", "iterate"):
        found = polar(A, method=method)  # type: ignore[arg-type]
        assert torch.isfinite(found).all()
        assert (found - expected).norm() < 1e-3 * expected.norm()
        assert found[:, -5:].abs().max() < 1e-6


@pytest.mark.parametrize("near", [1.0, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_polar_beside_an_orthonormal_basis(near: float, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    C = torch.linalg.qr(torch.randn(60, 30, generator=g, dtype=torch.float64)).Q
    T = C[:, :8] @ torch.randn(8, 8, generator=g, dtype=torch.float64) * 0.3
    T = T + near * torch.randn(60, 8, generator=g, dtype=torch.float64) / 8
    for split in (8, 25):  # few and many beside C
        left = torch.cat([T, C[:, :17]], dim=1) if split == 25 else T
        right = C[:, 17:] if split == 25 else C
        u, _, v = torch.linalg.svd(torch.cat([right, left], dim=1), full_matrices=False)
        both = polar_beside(torch.cat([right, left], dim=1)[None].to(dtype), right.shape[1])[0]
        assert (both - u @ v).abs().max() < (1e-9 if dtype == torch.float64 else 1e-6 / near)
        assert orthogonality(both) < (1e-9 if dtype == torch.float64 else 5e-6)


def test_bad_matrices_spoil_nothing_but_themselves() -> None:
    A = torch.randn(3, 30, 12, generator=torch.Generator().manual_seed(0))
    A[1, 3, 4] = float("nan")
    for U, S, V in (thin_svd(A), top_k(A, 4)):
        assert S[1].isnan().all()
        assert torch.isfinite(torch.cat([U.flatten(), V.flatten(), S[0], S[2]])).all()
    for shape in ((0, 5), (5, 0), (1, 1)):
        U, S, V = thin_svd(torch.ones(2, *shape))
        assert (U.shape[-2], V.shape[-2], S.shape[-1]) == (*shape, min(shape))
        assert polar(torch.ones(2, *shape)).shape == (2, *shape)


def test_what_float32_cannot_decompose_float64_can(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """LAPACK's failures depend on its build; here it fails where it is told to, and only there."""
    real, failing = torch.linalg.svd, {torch.float32}

    def svd(A: Tensor, **options: Any) -> Any:
        if A.dtype in failing and (A.dim() > 2 or bool((A[0] == 0).all())):
            raise torch.linalg.LinAlgError("gesdd did not converge")  # type: ignore[attr-defined]
        return real(A, **options)

    monkeypatch.setattr(module.torch.linalg, "svd", svd)
    A = matrix(24, 20, spectrum("decaying", 20)).float().repeat(3, 1, 1)
    A[1, 0] = 0.0
    expected = real(A.double(), full_matrices=False)
    for level, step in ((torch.float64, "float64"), (None, "gram")):
        before = fallbacks()
        with caplog.at_level(logging.WARNING, logger=module.__name__):
            U, S, V = thin_svd(A)
        assert fallbacks()[step] == before[step] + 1
        assert caplog.messages[-1].endswith(f"falling back to {step}")
        torch.testing.assert_close(S.double(), expected.S, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((U * S[:, None]) @ V.mT, A, rtol=0, atol=1e-6)
        assert max(orthogonality(X) for X in (*U, *V)) < 5e-6
        if level is not None:
            failing.add(level)
    assert fallbacks()["float64"] == before["float64"] + 1


@pytest.mark.parametrize("name", ["decaying", "flat", "steep", "low rank"])
def test_factors_without_lapack(name: str) -> None:
    A = matrix(60, 33, spectrum(name, 33))
    for X, eps in ((A, 1e-14), (A.float(), 1e-7)):
        U, S, V = gram_factors(X)
        assert orthogonality(U) < 100 * eps
        assert orthogonality(V) < 100 * eps
        assert ((U * S) @ V.mT - X).abs().max() < 100 * eps
        torch.testing.assert_close(S.double(), spectrum(name, 33), rtol=0, atol=max(1e-9, 10 * eps))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda() -> None:
    A = torch.stack([matrix(130, 40, spectrum("decaying", 40), seed) for seed in range(3)])
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        for X in (A, A.mT):
            left, s, right = torch.linalg.svd(X, full_matrices=False)
            there = X.float().cuda()
            for U, S, V in (thin_svd(there), top_k(there, 9), top_k(there, 9, approximate=True)):
                k = S.shape[-1]
                torch.testing.assert_close(S.cpu().double(), s[:, :k], rtol=1e-5, atol=1e-6)
                best = left[..., :k] * s[:, None, :k] @ right[:, :k]
                assert ((U * S.unsqueeze(-2)).double() @ V.double().mT - best.cuda()).norm() < 1e-5 * best.norm()
            assert (polar(there).cpu() - left @ right).abs().max() < 1e-5
    finally:
        torch.set_float32_matmul_precision(before)
