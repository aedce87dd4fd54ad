"""Spectral figures against literal sums, closed forms, and the figures of untrained matrices."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from subspace_lab.analysis import spectra
from subspace_lab.analysis.features import rankme, stable_rank


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices; more threads only wait for each other where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def with_values(values: Tensor, rows: int, seed: int = 0) -> Tensor:
    """(rows, n) with these singular values and columns of mean 0, so that centring changes nothing."""
    n = len(values)
    left = gaussian(rows, n, seed=seed)
    left = torch.linalg.qr(left - left.mean(0))[0]
    right = torch.linalg.qr(gaussian(n, n, seed=seed + 1))[0]
    return left * values @ right.T


def exp_entropy(p: list[float]) -> float:
    return math.exp(-sum(x / sum(p) * math.log(x / sum(p)) for x in p if x > 0))


def test_ranks_are_their_sums() -> None:
    A = gaussian(9, 5) + 2
    sigma = np.linalg.svd(A.numpy(), compute_uv=False).tolist()
    centred = np.linalg.eigvalsh(np.cov(A.numpy(), rowvar=False)).tolist()
    assert spectra.effective_rank(A).item() == pytest.approx(exp_entropy(sigma), rel=1e-12)
    expected = sum(s**2 for s in sigma) ** 2 / sum(s**4 for s in sigma)
    assert spectra.participation_ratio(A).item() == pytest.approx(expected, rel=1e-12)
    assert spectra.participation_ratio(A.T).item() == pytest.approx(expected, rel=1e-12)
    assert spectra.rankme_eigenvalues(A).item() == pytest.approx(exp_entropy(centred), rel=1e-9)
    assert spectra.nuclear_norm(A).item() == pytest.approx(sum(sigma), rel=1e-12)
    assert rankme(A) == pytest.approx(spectra.effective_rank(A).item(), rel=1e-4), "the same but for the 1e-7"


def test_equal_singular_values_count_themselves() -> None:
    rows = with_values(torch.ones(6, dtype=torch.float64), 40)
    for figure in (spectra.effective_rank, spectra.participation_ratio, spectra.rankme_eigenvalues):
        assert figure(rows).item() == pytest.approx(6, abs=1e-9)
    assert rankme(rows) == pytest.approx(6, abs=1e-4)
    flat = torch.linalg.qr(gaussian(512, 32))[0].T  # d orthonormal rows
    assert rankme(flat) == pytest.approx(32, abs=1e-3)
    rank_one = torch.outer(gaussian(7), gaussian(5))
    assert spectra.effective_rank(rank_one).item() == pytest.approx(1, abs=1e-12)
    assert spectra.participation_ratio(rank_one).item() == pytest.approx(1, abs=1e-12)
    assert math.isnan(spectra.effective_rank(torch.zeros(3, 3)).item())


def test_two_figures_are_called_rankme() -> None:
    """gcr reference, 4.4: 410 from singular values i^-1/2, 117 from their squares; 117 and 5 for i^-1."""
    for power, values, squares in ((-0.5, 410, 117), (-1.0, 117, 5)):
        A = with_values(torch.arange(1.0, 513).double() ** power, 600)
        assert rankme(A) == pytest.approx(values, rel=0.01)
        assert spectra.rankme_eigenvalues(A).item() == pytest.approx(squares, rel=0.03)


@pytest.mark.parametrize("power", [0.5, 1.0, 1.7])
def test_alpha_req_finds_an_exact_power_law(power: float) -> None:
    values = torch.arange(1.0, 121).double() ** (-power / 2)
    values[:10] *= 3  # before the window: must not matter
    values[100:] *= 0.1  # nor after it
    found = spectra.alpha_req(with_values(values, 300))
    assert found.alpha.item() == pytest.approx(power, abs=1e-6)
    assert found.r2.item() == pytest.approx(1, abs=1e-9)


def test_alpha_req_is_a_weighted_regression() -> None:
    features = gaussian(150, 120) * torch.arange(1.0, 121).double() ** -0.4 + 5
    values = np.linalg.eigvalsh(np.cov(features.numpy(), rowvar=False))[::-1]
    index = np.arange(11, 101)
    x, y, w = np.log(index), np.log(values[10:100]), np.sqrt(1 / index)  # polyfit squares its weights
    slope, intercept = np.polyfit(x, y, 1, w=w)
    rest = np.sum(w**2 * (y - slope * x - intercept) ** 2)
    r2 = 1 - rest / np.sum(w**2 * (y - np.average(y, weights=w**2)) ** 2)
    found = spectra.alpha_req(features)
    assert (found.alpha.item(), found.r2.item()) == pytest.approx((-slope, r2), rel=1e-8)
    few = spectra.alpha_req(features[:20])  # 19 eigenvalues: 11 … 19
    assert math.isfinite(few.alpha.item())
    with pytest.raises(ValueError, match="no slope"):
        spectra.alpha_req(features[:12])


def literal_mnn(features: Tensor) -> float:
    x = features.numpy() - features.numpy().mean(axis=0)
    rows = [row / math.sqrt(sum(v * v for v in row)) for row in x]
    columns = sorted((math.sqrt(sum(row[j] ** 2 for row in rows)) for j in range(x.shape[1])), reverse=True)
    return sum(columns[: min(x.shape)]) / len(rows)


def test_matrix_nuclear_norm_depends_on_the_basis() -> None:
    for shape in ((12, 7), (7, 12)):
        features = gaussian(*shape) + 1
        assert spectra.matrix_nuclear_norm(features).item() == pytest.approx(literal_mnn(features), rel=1e-12)
    low = gaussian(512, 8) @ gaussian(8, 768, seed=1)
    high = gaussian(512, 768, seed=2)
    ratios = {}
    for name, found in (("low", low), ("high", high)):
        true = spectra.nuclear_norm(spectra.unit_rows(found)).item() / 512
        ratios[name] = spectra.matrix_nuclear_norm(found).item() / true
    assert ratios["high"] == pytest.approx(0.92, abs=0.02)
    assert ratios["low"] == pytest.approx(7.0, abs=0.3)
    assert spectra.matrix_nuclear_norm(low) > spectra.matrix_nuclear_norm(high), "the wrong way round"
    # In the principal basis it is the nuclear norm; and a rotation changes it, but nothing that is spectral.
    unit = spectra.unit_rows(low)
    rotation = torch.linalg.svd(unit)[2].T
    turned = low @ rotation
    assert spectra.matrix_nuclear_norm(turned).item() == pytest.approx(
        spectra.nuclear_norm(unit).item() / 512, rel=0.01
    )
    assert rankme(turned) == pytest.approx(rankme(low), rel=1e-5)  # its + 1e-7 sees how rounding fills 0
    assert stable_rank(turned) == pytest.approx(stable_rank(low), rel=1e-6)
    constant = torch.ones(3, 4)
    assert spectra.matrix_nuclear_norm(constant).item() == 0, "rows without direction are zero, not nan"


def literal_hill(values: np.ndarray[Any, Any]) -> float:
    ordered = sorted(values.tolist())
    tail = ordered[len(ordered) // 2 :]
    return 1 + len(tail) / (sum(math.log(x) for x in tail) - len(tail) * math.log(tail[0]))


def literal_windows(W: np.ndarray[Any, Any], rows: int, columns: int, windows: int) -> np.ndarray[Any, Any]:
    down = max(1, (W.shape[0] - rows) // (windows - 1))
    right = max(1, (W.shape[1] - columns) // (windows - 1))
    found = []
    for i in range(windows):
        for j in range(windows):
            if i * down + rows <= W.shape[0] and j * right + columns <= W.shape[1]:
                part = W[i * down : i * down + rows, j * right : j * right + columns]
                found.append(np.linalg.svd(part, compute_uv=False) ** 2)
    return np.concatenate(found)


@pytest.mark.parametrize("shape", [(30, 47), (61, 20), (25, 25)])
def test_tail_exponents_are_their_sums(shape: tuple[int, int]) -> None:
    W = gaussian(*shape)
    values = np.linalg.svd(W.numpy(), compute_uv=False) ** 2
    assert spectra.hill_alpha(W).item() == pytest.approx(literal_hill(values), rel=1e-10)
    for size, ratio, windows in ((10, 1.0, 4), (10, 1.5, 3), (12, 0.5, 7), (19, 1.0, 9)):
        pooled = literal_windows(W.numpy(), size, int(size * ratio), windows)
        found = spectra.farms_alpha(W, size=size, ratio=ratio, windows=windows).item()
        assert found == pytest.approx(literal_hill(pooled), rel=1e-10), (size, ratio)
    small = spectra.farms_alpha(W, windows=5).item()  # 100 rows do not fit: the smaller side, still square
    side = min(shape)
    assert small == pytest.approx(literal_hill(literal_windows(W.numpy(), side, side, 5)), rel=1e-10)
    with pytest.raises(ValueError, match="windows a side"):
        spectra.farms_alpha(W, windows=1)


def test_hill_finds_the_exponent_of_a_pareto_tail() -> None:
    uniform = torch.rand(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for alpha in (2.0, 3.5):
        values = uniform ** (-1 / (alpha - 1))  # density ∝ λ^−alpha above 1
        assert spectra._hill(values).item() == pytest.approx(alpha, abs=0.02)


@pytest.mark.parametrize(("columns", "hill"), [(256, 2.13), (512, 2.75), (1024, 3.44), (4096, 5.92)])
def test_shape_moves_hill_and_not_farms(columns: int, hill: float) -> None:
    """gcr reference, 4.4: untrained Gaussian weights."""
    W = gaussian(256, columns)
    assert spectra.hill_alpha(W).item() == pytest.approx(hill, abs=0.15)
    assert spectra.farms_alpha(W, windows=5).item() == pytest.approx(2.12, abs=0.04)


def hsic(K: Tensor, L: Tensor) -> Tensor:
    H = torch.eye(len(K), dtype=K.dtype) - 1 / len(K)
    return torch.trace(K @ H @ L @ H)


def test_linear_cka() -> None:
    for n, m in ((4, 6), (30, 6), (4, 40)):
        X, Y = gaussian(20, n), gaussian(20, m, seed=1) + 3
        K, L = X @ X.T, Y @ Y.T
        expected = hsic(K, L) / (hsic(K, K) * hsic(L, L)).sqrt()
        assert spectra.linear_cka(X, Y).item() == pytest.approx(expected.item(), rel=1e-10)
        assert spectra.linear_cka(Y, X).item() == pytest.approx(expected.item(), rel=1e-10)
        rotation = torch.linalg.qr(gaussian(n, n, seed=2))[0]
        assert spectra.linear_cka(-3 * X @ rotation + 7, Y).item() == pytest.approx(expected.item(), rel=1e-10)
        assert spectra.linear_cka(X, 2 * X @ rotation).item() == pytest.approx(1, abs=1e-12)
        skewed = X @ torch.diag(torch.arange(1.0, n + 1).double() ** 2)
        assert spectra.linear_cka(X, skewed).item() < 0.99, "not invariant to other linear maps"
    independent = spectra.linear_cka(gaussian(200, 200), gaussian(200, 200, seed=1)).item()
    assert independent == pytest.approx(0.5, abs=0.02), "the warning in the docstring"
    with pytest.raises(ValueError, match="same examples"):
        spectra.linear_cka(gaussian(5, 3), gaussian(6, 3))


def test_batches_and_types() -> None:
    A = gaussian(2, 3, 130, 120)
    whole: dict[str, Any] = {
        name: getattr(spectra, name)
        for name in (
            "effective_rank",
            "participation_ratio",
            "rankme_eigenvalues",
            "nuclear_norm",
            "matrix_nuclear_norm",
            "hill_alpha",
        )
    }
    whole["alpha"] = lambda x: spectra.alpha_req(x).alpha
    whole["r2"] = lambda x: spectra.alpha_req(x).r2
    whole["farms"] = lambda x: spectra.farms_alpha(x, size=40, windows=3)
    whole["cka"] = lambda x: spectra.linear_cka(x, x.flip(-2))
    for name, figure in whole.items():
        found = figure(A)
        assert found.shape == (2, 3), name
        assert found[1, 2].item() == pytest.approx(figure(A[1, 2]).item(), rel=1e-10), name
        half = A[0, 0].to(torch.bfloat16)
        assert figure(half).dtype == torch.float64, name
        assert figure(half).item() == pytest.approx(figure(half.double()).item(), rel=1e-12), name
