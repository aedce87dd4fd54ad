"""Eigenvalues of a large symmetric matrix that is only known by its products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from subspace_lab.linalg.precision import full_precision, matmul, upcast
from subspace_lab.linalg.random import derive_key, rademacher

Product = Callable[[Tensor], Tensor]

_CHECK_EVERY = 5


@dataclass(frozen=True)
class Ritz:
    """Eigenpairs of a symmetric matrix H restricted to a Krylov space.

    Attributes:
        values: float64 (k,), descending.
        vectors: (n, k) orthonormal columns, of the parameters' dtype (float32 for half precision).
        weights: float64 (k,) squared first components of the tridiagonal matrix's eigenvectors: Gaussian quadrature
            weights, which sum to 1 over all of them.
        residuals: float64 (k,) ‖H u − θ u‖ but for rounding: an exact eigenvalue lies this near. A pair not yet
            converged has a large one; a multiple eigenvalue is found once.
        steps: Lanczos steps taken.
    """

    values: Tensor
    vectors: Tensor
    weights: Tensor
    residuals: Tensor
    steps: int


@dataclass(frozen=True)
class Density:
    """Spectral density of the Hessian by stochastic Lanczos quadrature.

    Attributes:
        nodes: float64 (m,) Ritz values of all runs.
        weights: float64 (m,), their sum is 1.
        grid: float64 (points,) eigenvalues at which the density is given.
        density: float64 (points,) Σ_j w_j N(grid; node_j, sigma²), its integral is 1.
        sigma: width of the Gaussians.
        trace: estimate n Σ w θ of the Hessian's trace (Hutchinson's).
        trace_error: its standard error over the runs; nan for one run.
    """

    nodes: Tensor
    weights: Tensor
    grid: Tensor
    density: Tensor
    sigma: float
    trace: float
    trace_error: float


def lanczos(product: Product, parameters: Sequence[Tensor], steps: int, *, seed: int = 0) -> Ritz:
    """Run Lanczos with full reorthogonalisation from a random ±1 vector; all Ritz pairs.

    Golub & Van Loan, Matrix Computations, §10.1. Keeps all `steps` vectors of length n. Ends early where the space is
    exhausted (the start lies in the span of fewer eigenvectors).

    Args:
        product: symmetric linear map of flat vectors.
        parameters: whose number, dtype and device the vectors have; also any one tensor in a list.
        steps: at most n are taken. Outer eigenvalues converge first: for the k largest see `top_eigenvalues`.
        seed: of the start, the same on every device.

    Raises:
        ValueError: steps < 1.
    """
    return _run(product, parameters, steps, derive_key("lanczos", seed))


def top_eigenvalues(
    product: Product,
    parameters: Sequence[Tensor],
    k: int,
    *,
    tolerance: float = 1e-5,
    max_steps: int = 100,
    seed: int = 0,
) -> Ritz:
    """The k largest (not largest in magnitude) eigenvalues, with vectors, by Lanczos until they have converged.

    A fixed 2k steps is not enough: on a small network it gave .438 for a fifth eigenvalue of .567. Steps go on until
    each residual of the k is below ``tolerance`` × the largest |eigenvalue|; look at ``residuals`` if ``steps`` is
    ``max_steps``. float32 products reach about 1e-6.

    Args:
        product: symmetric linear map of flat vectors.
        parameters: as in `lanczos`.
        k: how many, at most n.
        tolerance: relative residual.
        max_steps: vectors of length n that are kept at most.
        seed: of the start.

    Raises:
        ValueError: k is not in 1 … min(n, max_steps).
    """
    size = sum(p.numel() for p in parameters)
    if not 1 <= k <= min(size, max_steps):
        raise ValueError(f"cannot find {k} eigenvalues of a {size} × {size} matrix in {max_steps} steps")
    found = _run(product, parameters, max_steps, derive_key("lanczos", seed), k, tolerance)
    return Ritz(found.values[:k], found.vectors[:, :k], found.weights[:k], found.residuals[:k], found.steps)


def slq_density(
    product: Product,
    parameters: Sequence[Tensor],
    *,
    runs: int = 10,
    steps: int = 80,
    sigma: float | None = None,
    points: int = 1000,
    seed: int = 0,
) -> Density:
    """Spectral density by stochastic Lanczos quadrature: the mean over runs of Σ_j w_j N(·; θ_j, σ²).

    Ghorbani, Krishnan & Xiao, ICML 2019; Yao, Gholami, Keutzer & Mahoney, "PyHessian", 2020. Defaults (10 runs of 80
    steps, σ = range / steps) are those of hessian-eigenthings. Costs runs × steps products. The bulk is right on
    average only; a single outlying eigenvalue has weight 1 / n and needs a logarithmic axis to be seen.

    Args:
        product: symmetric linear map of flat vectors.
        parameters: as in `lanczos`.
        runs: random starts.
        steps: of Lanczos in each.
        sigma: width of the Gaussians, default (θ_max − θ_min) / steps.
        points: of the grid, which reaches 4 σ beyond the nodes.
        seed: of the starts.

    Raises:
        ValueError: runs, steps or points < 1, or sigma <= 0.
    """
    if min(runs, steps, points) < 1 or (sigma is not None and sigma <= 0):
        raise ValueError(f"slq_density got {runs} runs of {steps} steps, {points} points, sigma {sigma}")
    found = [_run(product, parameters, steps, derive_key("slq", seed, run), vectors=False) for run in range(runs)]
    nodes = torch.cat([run.values for run in found])
    weights = torch.cat([run.weights for run in found]) / runs
    low, high = nodes.min().item(), nodes.max().item()
    if sigma is None:
        # Where all eigenvalues are equal the range is rounding.
        sigma = max((high - low) / steps, 1e-3 * max(abs(low), abs(high)), 1e-12)
    grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, points, dtype=torch.float64, device=nodes.device)
    bells = torch.exp(-0.5 * ((grid.unsqueeze(-1) - nodes) / sigma).square()) / (sigma * math.sqrt(2 * math.pi))
    size = sum(p.numel() for p in parameters)
    traces = size * torch.stack([(run.values * run.weights).sum() for run in found])
    error = traces.std().item() / math.sqrt(runs) if runs > 1 else math.nan
    return Density(nodes, weights, grid, bells @ weights, sigma, traces.mean().item(), error)


@full_precision
def _run(
    product: Product,
    parameters: Sequence[Tensor],
    steps: int,
    key: int,
    k: int | None = None,
    tolerance: float = 0.0,
    vectors: bool = True,
) -> Ritz:
    """Lanczos until `steps`, an exhausted space, or, with k, convergence of the k largest."""
    if steps < 1:
        raise ValueError(f"Lanczos needs at least one step, got {steps}")
    size, dtype = sum(p.numel() for p in parameters), upcast(parameters[0].new_empty(0)).dtype
    v = rademacher((size,), key=key, dtype=dtype, device=parameters[0].device) / math.sqrt(size)
    basis = v.new_empty(min(steps, size), size)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for step in range(len(basis)):
        basis[step] = v
        w = product(v)
        known = basis[: step + 1]
        # Twice is enough (Kahan; Parlett, The Symmetric Eigenvalue Problem, §6.9); once leaves ghost copies of
        # converged eigenvalues.
        inner = known @ w
        w = w - inner @ known
        w = w - (known @ w) @ known
        diagonal.append(inner[-1].double())
        beside.append(w.double().norm())
        last, exhausted = step + 1 == len(basis), step + 1 == size
        if last or (step + 1) % _CHECK_EVERY == 0:
            values, W, residuals = _tridiagonal(diagonal, beside, exhausted)
            scale = values.abs().max()
            done = k is not None and step + 1 >= k and bool((residuals[:k] <= tolerance * scale).all())
            if done or last:
                break
        if bool(beside[-1] <= 10 * torch.finfo(dtype).eps * torch.stack(diagonal + beside).abs().max()):
            values, W, residuals = _tridiagonal(diagonal, beside, True)
            break
        v = w / beside[-1].to(w.dtype)
    lifted = matmul(known.mT, W.to(dtype)) if vectors else known[:0].mT
    return Ritz(values, lifted, W[0].square(), residuals, len(diagonal))


def _tridiagonal(diagonal: list[Tensor], beside: list[Tensor], exhausted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Eigenvalues (descending), eigenvectors (m, m) and residuals of the tridiagonal matrix, float64."""
    T = torch.diag(torch.stack(diagonal))
    if len(diagonal) > 1:
        off = torch.stack(beside[:-1])
        T = T + torch.diag(off, 1) + torch.diag(off, -1)
    values, W = torch.linalg.eigh(T)
    values, W = values.flip(-1), W.flip(-1)
    return values, W, (torch.zeros_like(values) if exhausted else beside[-1] * W[-1].abs())
