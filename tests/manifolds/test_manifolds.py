from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from subspace_lab.linalg import orthonormalize, principal_angles
from subspace_lab.manifolds import Grassmann, Manifold, Retraction, Sphere, Stiefel, inverse_sqrt

MANIFOLDS: dict[str, Manifold] = {"grassmann": Grassmann(), "stiefel": Stiefel(), "sphere": Sphere()}
METHODS: list[Retraction] = ["polar", "qr", "geodesic"]

each_manifold = pytest.mark.parametrize("name", MANIFOLDS)
each_method = pytest.mark.parametrize("method", METHODS)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def unit_tangent(manifold: Manifold, S: Tensor, seed: int) -> Tensor:
    """A random tangent direction of spectral norm 1 (columns of length <= 1)."""
    V = manifold.tangent(S, gaussian(*S.shape, seed=seed, dtype=S.dtype))
    norm: Tensor = torch.linalg.matrix_norm(V, 2)
    return V / norm[..., None, None]


def slope(errors: list[float], steps: list[float]) -> float:
    return math.log(errors[0] / errors[-1]) / math.log(steps[0] / steps[-1])


@each_manifold
@settings(max_examples=20, deadline=None)
@given(
    batch=st.sampled_from([(), (3,), (2, 2)]),
    n=st.integers(2, 12),
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    method=st.sampled_from(METHODS),
    size=st.sampled_from([0.0, 1e-8, 1.0, 100.0]),
    seed=st.integers(0, 99),
)
def test_shapes_dtypes_and_constraints(
    name: str,
    batch: tuple[int, ...],
    n: int,
    k: int,
    dtype: torch.dtype,
    method: Retraction,
    size: float,
    seed: int,
) -> None:
    manifold, k = MANIFOLDS[name], min(n, k)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    S = manifold.random((*batch, n, k), seed, dtype=dtype)
    assert S.shape == (*batch, n, k) and S.dtype == dtype
    assert manifold.check(S).shape == batch and float(manifold.check(S).max()) <= tolerance
    V = manifold.tangent(S, size * gaussian(*batch, n, k, seed=seed, dtype=dtype))
    S_new = manifold.retract(S, V, method)
    assert S_new.shape == S.shape and S_new.dtype == dtype
    assert float(manifold.check(S_new).max()) <= tolerance
    if size == 0:
        torch.testing.assert_close(S_new, S, atol=tolerance, rtol=0)


@each_manifold
def test_tangent_is_an_orthogonal_projection(name: str) -> None:
    manifold = MANIFOLDS[name]
    S = manifold.random((3, 10, 4), 1, dtype=torch.float64)
    G, H = gaussian(3, 10, 4, seed=2), gaussian(3, 10, 4, seed=3)
    V = manifold.tangent(S, G)
    assert not torch.allclose(V, G)
    torch.testing.assert_close(manifold.tangent(S, V), V)
    # Self-adjoint: <proj G, H> = <G, proj H>.
    torch.testing.assert_close((V * H).sum(), (G * manifold.tangent(S, H)).sum())
    inner = S.mT @ V
    zero = {
        "grassmann": inner,
        "stiefel": inner + inner.mT,
        "sphere": inner.diagonal(dim1=-2, dim2=-1),
    }[name]
    assert float(zero.abs().max()) < 1e-14
    # The tangent space is not too small: its dimension is the manifold's.
    basis = torch.stack([manifold.tangent(S[0], E.reshape(10, 4)) for E in torch.eye(40, dtype=torch.float64)])
    dimension = {"grassmann": 4 * (10 - 4), "stiefel": 40 - 4 * 5 // 2, "sphere": 4 * 9}[name]
    assert int(torch.linalg.matrix_rank(basis.reshape(40, 40))) == dimension


@each_manifold
def test_bf16_gradient_and_horizontal_in_float32(name: str) -> None:
    manifold = MANIFOLDS[name]
    S = manifold.random((64, 8), 0)
    V = manifold.tangent(S, gaussian(64, 8).bfloat16())
    assert V.dtype == torch.float32
    torch.testing.assert_close(manifold.tangent(S, V), V, atol=1e-6, rtol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(manifold.check(manifold.retract(S, V))) < 2e-6


@each_manifold
@each_method
def test_retraction_is_first_order(name: str, method: Retraction) -> None:
    """‖R(tV) - S - tV‖ = O(t²), and not of lower order."""
    manifold = MANIFOLDS[name]
    S = manifold.random((20, 4), 3, dtype=torch.float64)
    V = unit_tangent(manifold, S, 4)
    steps = [0.2, 0.1, 0.05, 0.025]
    errors = [float((manifold.retract(S, t * V, method) - S - t * V).norm()) for t in steps]
    assert slope(errors, steps) > 1.85
    assert errors[-1] > 1e-8  # a plain S + tV would have no error here


@pytest.mark.parametrize("method", ["polar", "qr"])
def test_grassmann_retractions_agree_with_the_geodesic_to_third_order(method: Retraction) -> None:
    manifold = Grassmann()
    S = manifold.random((20, 4), 3, dtype=torch.float64)
    V = unit_tangent(manifold, S, 4)
    steps = [0.2, 0.1, 0.05, 0.025]
    errors = []
    for t in steps:
        A, B = manifold.retract(S, t * V, method), manifold.retract(S, t * V, "geodesic")
        errors.append(float((A @ A.mT - B @ B.mT).norm()))
    assert slope(errors, steps) > 2.9


def test_grassmann_geodesic_equals_the_tall_svd_form() -> None:
    manifold = Grassmann()
    S = manifold.random((3, 20, 4), 3, dtype=torch.float64)
    V = 0.7 * unit_tangent(manifold, S, 4)
    V[1] = V[1] @ torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0], dtype=torch.float64))  # rank-deficient direction
    U, s, Wh = torch.linalg.svd(V, full_matrices=False)
    expected = (S @ Wh.mT * s.cos().unsqueeze(-2) + U * s.sin().unsqueeze(-2)) @ Wh
    torch.testing.assert_close(manifold.retract(S, V, "geodesic"), expected, atol=1e-12, rtol=0)
    # The arc lengths are the principal angles between start and end.
    torch.testing.assert_close(principal_angles(S, expected), s.flip(-1), atol=1e-7, rtol=0)


@pytest.mark.parametrize("name", ["stiefel", "sphere"])
def test_geodesics_compose(name: str) -> None:
    """γ(2t) is reached from γ(t) along γ'(t), which a central difference gives."""
    manifold = MANIFOLDS[name]
    S = manifold.random((12, 3), 5, dtype=torch.float64)
    V = 0.4 * unit_tangent(manifold, S, 6)
    middle, h = manifold.retract(S, V, "geodesic"), 1e-5
    ahead, behind = (manifold.retract(S, (1 + x) * V, "geodesic") for x in (h, -h))
    velocity = manifold.tangent(middle, (ahead - behind) / (2 * h))
    expected = manifold.retract(S, 2 * V, "geodesic")
    torch.testing.assert_close(manifold.retract(middle, velocity, "geodesic"), expected, atol=1e-8, rtol=0)


def test_sphere_acts_on_columns_independently() -> None:
    manifold = Sphere()
    S = manifold.random((6, 3), 0, dtype=torch.float64)
    V = manifold.tangent(S, gaussian(6, 3))
    for method in METHODS:
        whole = manifold.retract(S, V, method)
        parts = [manifold.retract(S[:, i : i + 1], V[:, i : i + 1], method) for i in range(3)]
        torch.testing.assert_close(whole, torch.cat(parts, dim=-1))
    around = manifold.retract(S, V * (2 * math.pi / V.norm(dim=0)), "geodesic")
    torch.testing.assert_close(around, S)


@each_manifold
@each_method
@pytest.mark.parametrize("arc", [1e-3, 0.03, 0.5])
def test_stays_on_the_manifold_after_many_float32_steps(name: str, method: Retraction, arc: float) -> None:
    manifold = MANIFOLDS[name]
    S = manifold.random((4, 32, 4), 1)
    momentum = torch.zeros_like(S)
    directions = gaussian(150, *S.shape, dtype=torch.float32)
    worst, flips = S.new_zeros(()), S.new_zeros(())
    for G in directions:
        momentum = 0.9 * momentum + manifold.tangent(S, G)
        V = manifold.tangent(S, momentum)
        V = V * (arc / torch.linalg.matrix_norm(V)[..., None, None])
        S_new = manifold.retract(S, V, method)
        momentum = manifold.transport(S, momentum, S_new)
        flips += ((S * S_new).sum(-2) < 0).sum()
        S = S_new
        worst = torch.maximum(worst, manifold.check(S).max())
    assert float(worst) <= 2e-6
    assert float(flips) == 0


@each_manifold
def test_transport_gives_a_tangent_vector_and_is_the_identity_in_place(name: str) -> None:
    manifold = MANIFOLDS[name]
    S = manifold.random((2, 10, 3), 0, dtype=torch.float64)
    V = unit_tangent(manifold, S, 1)
    S_new = manifold.retract(S, V)
    moved = manifold.transport(S, V, S_new)
    torch.testing.assert_close(manifold.tangent(S_new, moved), moved)
    assert not torch.allclose(moved, V)
    torch.testing.assert_close(manifold.transport(S, V, S), V)


@each_manifold
@each_method
def test_nan_stays_in_its_own_matrix(name: str, method: Retraction) -> None:
    manifold = MANIFOLDS[name]
    S = manifold.random((3, 10, 2), 0)
    V = 0.1 * unit_tangent(manifold, S, 1)
    expected = manifold.retract(S, V, method)
    V[1] = float("nan")
    result = manifold.retract(S, V, method)
    torch.testing.assert_close(result[::2], expected[::2])
    assert torch.isnan(result[1]).any() and torch.isnan(manifold.check(result)[1])


@each_manifold
def test_random_is_reproducible_and_spread_out(name: str) -> None:
    manifold = MANIFOLDS[name]
    S = manifold.random((200, 4, 1), 7)
    assert torch.equal(S, manifold.random((200, 4, 1), 7))
    assert not torch.equal(S, manifold.random((200, 4, 1), 8))
    assert float(S.mean(0).abs().max()) < 5 * 0.5 / 200**0.5
    projector = (S @ S.mT).mean(0)
    torch.testing.assert_close(projector, torch.eye(4) / 4, atol=0.08, rtol=0)
    assert manifold.random((4, 2), torch.tensor([1, 2, 3])).shape == (3, 4, 2)


@each_manifold
def test_check_sees_a_violation(name: str) -> None:
    manifold = MANIFOLDS[name]
    S = manifold.random((3, 10, 2), 0)
    S[1] *= 1.01
    torch.testing.assert_close(manifold.check(S)[1], torch.tensor(0.0201), atol=1e-5, rtol=0)
    assert float(manifold.check(S)[::2].max()) < 1e-6


@each_manifold
def test_unknown_retraction(name: str) -> None:
    S = MANIFOLDS[name].random((4, 2), 0)
    wrong: Any = "cayley"
    with pytest.raises(ValueError, match="unknown retraction 'cayley'"):
        MANIFOLDS[name].retract(S, S, wrong)


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4, 1e7])
def test_inverse_sqrt_routes_agree(condition: float) -> None:
    Q = orthonormalize(gaussian(5, 8, 8))
    values = torch.logspace(0, math.log10(condition), 8, dtype=torch.float64)
    G, expected = (Q * values) @ Q.mT, (Q * values.rsqrt()) @ Q.mT
    torch.testing.assert_close(inverse_sqrt(G, "eigh"), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(inverse_sqrt(G, "newton_schulz"), expected, atol=1e-7, rtol=0)


@each_method
@pytest.mark.parametrize("name", ["grassmann", "stiefel"])
def test_a_step_of_length_100_stays_on_the_manifold_in_float32(name: str, method: Retraction) -> None:
    """The Gram form squares the condition number, so float32 inside is not enough."""
    S = MANIFOLDS[name].random((20, 6, 3), 0)
    V = MANIFOLDS[name].tangent(S, gaussian(20, 6, 3, dtype=torch.float32))
    V = 100 * V / torch.linalg.matrix_norm(V, 2)[..., None, None]
    assert float(MANIFOLDS[name].check(MANIFOLDS[name].retract(S, V, method)).max()) <= 2e-6


@pytest.mark.parametrize("name", ["grassmann", "stiefel"])
def test_polar_is_the_nearest_orthonormal_matrix(name: str) -> None:
    manifold = MANIFOLDS[name]
    S = manifold.random((3, 9, 4), 0, dtype=torch.float64)
    V = 2 * unit_tangent(manifold, S, 1)
    U, _, Vh = torch.linalg.svd(S + V, full_matrices=False)
    torch.testing.assert_close(manifold.retract(S, V), U @ Vh, atol=1e-12, rtol=0)


@each_manifold
@pytest.mark.parametrize("method", ["polar", "qr"])
def test_step_path_never_reads_a_value_back(name: str, method: Retraction) -> None:
    """Meta tensors have no values: anything that would synchronise on an accelerator raises here."""
    manifold = MANIFOLDS[name]
    S = manifold.random((3, 10, 4), 0, device="meta")
    V = manifold.tangent(S, torch.empty(3, 10, 4, device="meta", dtype=torch.bfloat16))
    S_new = manifold.retract(S, V, method)
    assert manifold.transport(S, V, S_new).shape == S.shape
    assert manifold.check(S_new).shape == (3,)
