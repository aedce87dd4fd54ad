"""Products, eigenvalues and densities of a small network's Hessian against the dense one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

from subspace_lab.analysis.hessian import (
    flat_gradient,
    gradient_overlap,
    hessian_product,
    lanczos,
    slq_density,
    top_eigenvalues,
)

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Batch], Tensor]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Small matrices; more threads only wait for each other where the machine is shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def digits(dtype: torch.dtype = torch.float64) -> tuple[list[nn.Parameter], list[Batch], Loss]:
    """A net 16-8-10 (226 parameters) on digits shrunk to 4 × 4, a little trained, in two batches of 64."""
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    x = functional.avg_pool2d(torch.from_numpy(images[:128]).view(-1, 1, 8, 8) / 16, 2).flatten(1).to(dtype)
    y = torch.from_numpy(labels[:128])
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 10)).to(dtype)

    def loss(batch: Batch) -> Tensor:
        return functional.cross_entropy(model(batch[0]), batch[1])

    parameters = list(model.parameters())
    for _ in range(60):
        for p, slope in zip(parameters, torch.autograd.grad(loss((x, y)), parameters), strict=True):
            p.data -= 0.5 * slope
    return parameters, [(x[:64], y[:64]), (x[64:], y[64:])], loss


def dense(parameters: list[nn.Parameter], batches: list[Batch], loss: Loss) -> Tensor:
    """Row by row, of the loss over all examples at once."""
    together = (torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches]))
    slopes = torch.autograd.grad(loss(together), parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in slopes])
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in flat]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def random_vector(n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_products_are_those_of_the_dense_hessian() -> None:
    parameters, batches, loss = digits()
    H = dense(parameters, batches, loss)
    product = hessian_product(loss, parameters, batches)
    v = random_vector(len(H))
    assert torch.allclose(product(v), H @ v, atol=1e-12)
    assert product(v.float()).dtype == torch.float32
    with torch.no_grad():
        assert torch.allclose(product(v), H @ v, atol=1e-12)
    assert all(p.grad is None for p in parameters)
    gradient = flat_gradient(loss, parameters, batches)
    shift, step = random_vector(len(H), 1), 1e-4
    values = []
    for sign in (1, -1):
        moved = torch.nn.utils.parameters_to_vector(parameters).detach() + sign * step * shift
        torch.nn.utils.vector_to_parameters(moved, parameters)
        values.append(sum(loss(batch).item() for batch in batches) / 2)
        torch.nn.utils.vector_to_parameters(moved - sign * step * shift, parameters)
    assert (values[0] - values[1]) / (2 * step) == pytest.approx((gradient @ shift).item(), rel=1e-6)
    with pytest.raises(ValueError, match="at least one batch"):
        hessian_product(loss, parameters, [])


def test_products_of_unused_and_linear_parameters_are_zero() -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    square = hessian_product(lambda scale: scale * used.square().sum(), [unused, used], [1.0, 3.0])
    assert square(torch.ones(5)).tolist() == [0, 0, 0, 4, 4]
    linear = hessian_product(lambda scale: scale * used.sum(), [used], [1.0])
    assert linear(torch.ones(2)).tolist() == [0, 0]


def test_attention_has_second_derivatives() -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(24, 8, dtype=torch.float64) / 3)
    x = torch.randn(2, 5, 8, dtype=torch.float64)

    def loss(batch: Tensor) -> Tensor:
        q, k, v = functional.linear(batch, weight).view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4).contiguous()
        found: Tensor = functional.scaled_dot_product_attention(q, k, v, is_causal=True).square().mean()
        return found

    parameters = [weight]
    v = random_vector(weight.numel())
    step, ends = 1e-5, []
    for sign in (1, -1):
        with torch.no_grad():
            weight += sign * step * v.view_as(weight)
        ends.append(flat_gradient(loss, parameters, [x]))
        with torch.no_grad():
            weight -= sign * step * v.view_as(weight)
    found = hessian_product(loss, parameters, [x])(v)
    assert torch.allclose(found, (ends[0] - ends[1]) / (2 * step), atol=1e-8)
    assert found.norm() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_top_eigenvalues_are_those_of_the_dense_hessian(dtype: torch.dtype) -> None:
    parameters, batches, loss = digits(dtype)
    values, vectors = torch.linalg.eigh(dense(parameters, batches, loss).double())
    assert values[0] < -1e-3, "an indefinite Hessian: the largest are not the largest in magnitude alone"
    product = hessian_product(loss, parameters, batches)
    top = top_eigenvalues(product, parameters, 10)
    assert 10 < top.steps < 100
    assert torch.allclose(top.values, values.flip(0)[:10], atol=1e-4)
    assert (top.residuals < 1e-4 * top.values[0]).all()
    assert top.vectors.shape == (226, 10) and top.vectors.dtype == dtype
    V = top.vectors.double()
    assert torch.allclose(V.T @ V, torch.eye(10, dtype=torch.float64), atol=1e-5)
    cosines = (V * vectors.flip(1)[:, :10]).sum(0).abs()
    assert cosines[:5].min() > 1 - 1e-4
    again = top_eigenvalues(product, parameters, 10)
    assert torch.equal(again.values, top.values)
    other = top_eigenvalues(product, parameters, 10, seed=1)
    assert not torch.equal(other.vectors, top.vectors)
    assert torch.allclose(other.values, top.values, atol=1e-4)
    with pytest.raises(ValueError, match="cannot find 227"):
        top_eigenvalues(product, parameters, 227)


def test_residuals_bound_the_error_of_values_that_have_not_converged() -> None:
    parameters, batches, loss = digits()
    H = dense(parameters, batches, loss)
    product = hessian_product(loss, parameters, batches)
    exact = torch.linalg.eigvalsh(H)
    found = lanczos(product, parameters, 12)
    distance = (found.values.unsqueeze(-1) - exact).abs().amin(-1)
    assert (distance <= found.residuals + 1e-10).all()
    assert found.residuals.max() > 1e-3, "12 steps are too few, and it says so"
    residuals = (H @ found.vectors - found.vectors * found.values).norm(dim=0)
    assert torch.allclose(residuals, found.residuals, atol=1e-10)
    assert found.weights.sum().item() == pytest.approx(1, abs=1e-12)


def test_all_steps_give_the_whole_spectrum() -> None:
    """Without reorthogonalisation ghosts of the outer eigenvalues would fill it."""
    A = random_vector(40 * 40).view(40, 40)
    H = A @ A.T + torch.diag(torch.arange(40.0).double() * 100)
    found = lanczos(lambda v: H @ v, [torch.zeros(40, dtype=torch.float64)], 60)
    assert found.steps == 40
    assert torch.allclose(found.values.flip(0), torch.linalg.eigvalsh(H), atol=1e-8)
    assert torch.allclose(found.vectors @ torch.diag(found.values) @ found.vectors.T, H, atol=1e-8)


def test_an_exhausted_space_ends_the_search() -> None:
    like = [torch.zeros(50, dtype=torch.float64)]
    found = lanczos(lambda v: 3 * v, like, 20)
    assert found.steps == 1 and found.values.tolist() == pytest.approx([3.0])
    few = torch.diag(torch.tensor([1.0] * 30 + [2.0] * 15 + [-4.0] * 5).double())
    found = lanczos(lambda v: few @ v, like, 20)
    assert found.values.tolist() == pytest.approx([2, 1, -4], abs=1e-10)
    assert found.weights.tolist() == pytest.approx([0.3, 0.6, 0.1], abs=1e-10), "shares of a ±1 vector"
    assert found.residuals.abs().max() < 1e-9
    zero = lanczos(torch.zeros_like, like, 20)
    assert zero.values.tolist() == [0.0]


def test_slq_density() -> None:
    parameters, batches, loss = digits()
    H = dense(parameters, batches, loss)

    def product(v: Tensor) -> Tensor:
        return H @ v

    found = slq_density(product, parameters, runs=20, steps=30)
    assert found.weights.sum().item() == pytest.approx(1, abs=1e-12)
    assert (found.weights >= 0).all() and len(found.nodes) == 600
    # Hutchinson's estimate: sd sqrt(2 Σ_{i≠j} H_ij²) / sqrt(runs).
    off = (H - torch.diag(H.diagonal())).square().sum().item()
    deviation = math.sqrt(2 * off / 20)
    assert abs(found.trace - H.trace().item()) < 3 * deviation
    assert found.trace_error == pytest.approx(deviation, rel=0.5)
    second = 226 * (found.weights * found.nodes.square()).sum().item()
    assert second == pytest.approx(H.square().sum().item(), rel=0.2)
    assert torch.trapezoid(found.density, found.grid).item() == pytest.approx(1, abs=1e-3)
    middle = len(found.grid) // 3
    literal = sum(
        w
        * math.exp(-0.5 * ((found.grid[middle].item() - t) / found.sigma) ** 2)
        / (found.sigma * math.sqrt(2 * math.pi))
        for t, w in zip(found.nodes.tolist(), found.weights.tolist(), strict=True)
    )
    assert found.density[middle].item() == pytest.approx(literal, rel=1e-10)
    assert found.sigma == pytest.approx((found.nodes.max() - found.nodes.min()).item() / 30)
    exact = torch.linalg.eigvalsh(H)
    for threshold in (-0.01, 0.01, 0.1):
        share = found.weights[found.nodes > threshold].sum().item()
        assert share == pytest.approx((exact > threshold).double().mean().item(), abs=0.08), threshold
    single = slq_density(product, parameters, runs=1, steps=5, sigma=0.3, points=50)
    assert single.sigma == 0.3 and len(single.grid) == 50 and math.isnan(single.trace_error)
    flat = slq_density(lambda v: 2 * v, parameters, runs=2, steps=5)
    assert torch.trapezoid(flat.density, flat.grid).item() == pytest.approx(1, abs=1e-3)
    assert flat.trace == pytest.approx(452)
    with pytest.raises(ValueError, match="0 runs"):
        slq_density(product, parameters, runs=0)


def test_overlap_of_gradients_with_the_top() -> None:
    parameters, batches, loss = digits()
    values, vectors = torch.linalg.eigh(dense(parameters, batches, loss))
    top = top_eigenvalues(hessian_product(loss, parameters, batches), parameters, 10)
    gradient = flat_gradient(loss, parameters, batches)
    found = gradient_overlap(top, gradient, 0.5)
    expected = (vectors.flip(1)[:, :10].T @ gradient).square().sum() / gradient.square().sum()
    assert found.overlap.item() == pytest.approx(expected.item(), abs=1e-4)
    assert found.sharpness.item() == pytest.approx(values[-1].item() * 0.25, abs=1e-6)
    inside = top.vectors @ torch.arange(1.0, 11).double()
    assert gradient_overlap(top, 1e-30 * inside.float(), 1.0).overlap.item() == pytest.approx(1, abs=1e-6)
    assert gradient_overlap(top, vectors[:, 0], 1.0).overlap.item() < 1e-6
    narrow = replace(top, vectors=top.vectors[:, :3])
    assert gradient_overlap(narrow, inside, 1.0).overlap.item() == pytest.approx(14 / 385, rel=1e-6)


def test_the_example_of_the_documentation_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[2] / "docs" / "analysis.md").read_text(encoding="utf-8")
    exec(text.split("```python\n")[1].split("```")[0], {})
    assert len(capsys.readouterr().out.splitlines()) == 6
