"""Steps from Gram matrices against the manifolds' own operations, tall SVDs, and pymanopt."""

from __future__ import annotations

import math

import numpy as np
import pymanopt
import pytest
import torch
from torch import Tensor

from subspace_lab.manifolds import Grassmann, Retraction, Stiefel
from subspace_lab.manifolds.gram import Grams, Kind, cos_sinc, cos_sinc_series, step, transport

RETRACTIONS: list[Retraction] = ["polar", "qr", "geodesic"]


def pair(n: int = 40, k: int = 5, batch: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    S, _ = torch.linalg.qr(torch.randn(batch, n, k, dtype=torch.float64, generator=generator))
    return S, torch.randn(batch, n, k, dtype=torch.float64, generator=generator)


def grams(S: Tensor, m: Tensor) -> Grams:
    return Grams(S.mT @ S, S.mT @ m, m.mT @ m)


@pytest.mark.parametrize("method", RETRACTIONS)
@pytest.mark.parametrize("kind", ["grassmann", "stiefel"])
def test_equals_projecting_retracting_and_transporting(kind: Kind, method: Retraction) -> None:
    manifold = {"grassmann": Grassmann(), "stiefel": Stiefel()}[kind]
    S, m = pair()
    found = grams(S, m)
    P, Q = step(kind, found, 0.2, method)
    G = manifold.tangent(S, m)
    there = manifold.retract(S, -0.2 * G, method)
    torch.testing.assert_close(S @ P + m @ Q, there, rtol=0, atol=1e-13)
    P, Q = transport(kind, found, P, Q)
    torch.testing.assert_close(S @ P + m @ Q, manifold.transport(S, G, there), rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1e-3, 0.5, 3.0, 90.0])
def test_cosine_and_sinc_of_a_matrix(size: float) -> None:
    V = pair()[1]
    X = V.mT @ V
    X = X * size**2 / torch.linalg.matrix_norm(X, 2)[:, None, None]
    values, vectors = torch.linalg.eigh(X)
    angles = values.clamp_min(0).sqrt().unsqueeze(-2)
    for cosine, sinc in (cos_sinc(X), cos_sinc_series(X)):
        torch.testing.assert_close(cosine, (vectors * angles.cos()) @ vectors.mT, rtol=0, atol=1e-13)
        torch.testing.assert_close(sinc, (vectors * (angles / math.pi).sinc()) @ vectors.mT, rtol=0, atol=1e-13)


def test_the_geodesic_is_the_tall_svd_one() -> None:
    S, m = pair()
    G = Grassmann().tangent(S, m)
    U, sigma, Vh = torch.linalg.svd(G, full_matrices=False)
    angles = -0.3 * sigma.unsqueeze(-2)
    tall = ((S @ Vh.mT) * angles.cos() + U * angles.sin()) @ Vh
    P, Q = step("grassmann", grams(S, m), 0.3, "geodesic")
    torch.testing.assert_close(S @ P + m @ Q, tall, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", RETRACTIONS)
def test_pymanopt_agrees(method: Retraction) -> None:
    S, m = pair(batch=2)
    oracle = pymanopt.manifolds.Grassmann(40, 5, k=2)
    G = oracle.projection(S.numpy(), m.numpy())
    P, Q = step("grassmann", grams(S, m), 0.1, method)
    ours = (S @ P + m @ Q).numpy()
    there = oracle.exp(S.numpy(), -0.1 * G) if method == "geodesic" else oracle.retraction(S.numpy(), -0.1 * G)
    # Subspaces are compared: bases differ by a rotation.
    np.testing.assert_allclose(ours @ ours.swapaxes(1, 2), there @ there.swapaxes(1, 2), atol=1e-12)
    if method == "geodesic":
        assert oracle.dist(S.numpy(), ours) == pytest.approx(0.1 * oracle.norm(S.numpy(), G), rel=1e-7)
    P, Q = transport("grassmann", grams(S, m), P, Q)
    carried = oracle.transport(S.numpy(), ours, G)
    np.testing.assert_allclose((S @ P + m @ Q).numpy(), carried, atol=1e-12)


@pytest.mark.parametrize("method", ["polar", "qr"])
def test_retractions_agree_with_the_geodesic_to_third_order(method: Retraction) -> None:
    S, m = pair(batch=1)
    m = m / torch.linalg.matrix_norm(m, 2)
    errors, sizes = [], [0.2, 0.1, 0.05, 0.025]
    for t in sizes:
        ends = []
        for way in (method, "geodesic"):
            P, Q = step("grassmann", grams(S, m), t, way)  # type: ignore[arg-type]
            ends.append(S @ P + m @ Q)
        errors.append(torch.linalg.matrix_norm(ends[0] @ ends[0].mT - ends[1] @ ends[1].mT).item())
    assert math.log(errors[0] / errors[-1]) / math.log(sizes[0] / sizes[-1]) >= 2.9


def test_a_nan_stays_in_its_own_point() -> None:
    S, m = pair()
    m[1, 0, 0] = torch.nan
    for method in RETRACTIONS:
        P, Q = step("grassmann", grams(S, m), 0.1, method)
        new = S @ P + m @ Q
        assert torch.isfinite(new[[0, 2]]).all() and not torch.isfinite(new[1]).any()


def test_an_unknown_retraction_is_refused() -> None:
    with pytest.raises(ValueError, match="expected polar, qr or geodesic"):
        step("grassmann", grams(*pair()), 0.1, "cayley")  # type: ignore[arg-type]
