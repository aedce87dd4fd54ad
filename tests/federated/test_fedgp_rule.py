"""FedGP and FedDA: what of the sources reaches the target, and how much of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from reference import fedgp_literal as literal
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.federated.gradient_projection import Rule, Variant, adapt, auto_beta
from subspace_lab.methods.federated.base import Round
from subspace_lab.methods.federated.fedgp import FedGP

PARTS = [slice(0, 30), slice(30, 37), slice(37, 40)]
CHOICES: list[dict[str, Any]] = [
    {"rule": "projection", "variant": "paper"},
    {"rule": "projection", "variant": "release"},
    {"rule": "convex"},
]


def updates(p: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(p, 40, generator=torch.Generator().manual_seed(seed))


def numpy(rows: Tensor) -> list[list[np.ndarray]]:
    return [[row[part].numpy().astype(np.float64) for part in PARTS] for row in rows]


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("target", [0, 2, 4])
def test_a_rule_is_its_definition(choice: dict[str, Any], target: int) -> None:
    g = updates(seed=target)
    weights = torch.tensor([0.1, 0.3, 0.2, 0.25, 0.15])
    beta = torch.tensor([0.2, 0.5, 0.9, 1.0])
    steps = (4, 8, 2, 5, 4)
    rows = numpy(g)
    others = [i for i in range(5) if i != target]
    shares = [float(weights[i] / weights[others].sum()) for i in others]
    known = (rows[target], [rows[i] for i in others], shares, beta.tolist())
    if choice["rule"] == "convex":
        expected = literal.fedda(*known)
    elif choice["variant"] == "paper":
        expected = literal.fedgp(*known)
    else:
        expected = literal.fedgp_released(*known, [steps[i] for i in others], steps[target])
    found = adapt(g, target, weights, PARTS, beta, steps=steps, **choice)
    torch.testing.assert_close(found, torch.tensor(np.concatenate(expected), dtype=torch.float32))


@pytest.mark.parametrize("choice", CHOICES)
def test_beta_zero_is_the_target_alone(choice: dict[str, Any]) -> None:
    g = updates()
    found = adapt(g, 1, torch.ones(5), PARTS, torch.zeros(4), steps=(3,) * 5, **choice)
    torch.testing.assert_close(found, g[1])


@pytest.mark.parametrize("variant", ["paper", "release"])
def test_sources_that_point_away_contribute_nothing(variant: Variant) -> None:
    g = updates()
    for part in PARTS:  # all sources against the target in every parameter
        inner = g[1:, part] @ g[0, part]
        g[1:, part] *= -inner.sign()[:, None]
    found = adapt(g, 0, torch.ones(5), PARTS, torch.full((4,), 0.4), variant=variant, steps=(3,) * 5)
    torch.testing.assert_close(found, 0.6 * g[0])
    # It is decided for each parameter on its own: turn the second one round.
    g[2, PARTS[1]] *= -1
    found = adapt(g, 0, torch.ones(5), PARTS, torch.full((4,), 0.4), variant=variant, steps=(3,) * 5)
    torch.testing.assert_close(found[PARTS[0]], 0.6 * g[0, PARTS[0]])
    assert not torch.allclose(found[PARTS[1]], 0.6 * g[0, PARTS[1]])


def test_lengths_of_the_sources_matter_as_each_rule_says() -> None:
    g, beta = updates(), torch.full((4,), 0.5)
    longer = g * torch.tensor([1.0, 3.0, 0.1, 20.0, 1.0])[:, None]
    paper = adapt(g, 0, torch.ones(5), PARTS, beta)
    torch.testing.assert_close(adapt(longer, 0, torch.ones(5), PARTS, beta), paper)
    torch.testing.assert_close(adapt(7 * g, 0, torch.ones(5), PARTS, beta), 7 * paper)
    # In the release a source of twice the steps and twice the length counts as before.
    twice = g * torch.tensor([1.0, 2.0, 1.0, 1.0, 1.0])[:, None]
    args = (0, torch.ones(5), PARTS, beta)
    before = adapt(g, *args, variant="release", steps=(6, 6, 6, 6, 6))
    torch.testing.assert_close(adapt(twice, *args, variant="release", steps=(6, 12, 6, 6, 6)), before)
    assert not torch.allclose(adapt(twice, *args, variant="release", steps=(6, 6, 6, 6, 6)), before)


def test_projections_are_shorter_than_the_target_and_agree_with_it() -> None:
    g = updates(2)
    found = adapt(g, 0, torch.ones(2), [slice(0, 40)], torch.ones(1))
    along = float((g[0] @ g[1]).clamp_min(0) / g[1].norm())
    assert found.norm() == pytest.approx(along, rel=1e-5) and found @ g[0] >= 0
    silent = torch.cat([g[:1], torch.zeros(1, 40)])
    for choice in CHOICES:
        assert adapt(silent, 0, torch.ones(2), PARTS, torch.ones(1), steps=(1, 1), **choice).isfinite().all()


def test_the_order_of_clients_does_not_matter() -> None:
    g, weights, beta = updates(6), torch.rand(6), torch.rand(5)
    expected = adapt(g, 0, weights, PARTS, beta)
    order = torch.tensor([0, 4, 2, 5, 1, 3])
    torch.testing.assert_close(adapt(g[order], 0, weights[order], PARTS, beta[order[1:] - 1]), expected)


@pytest.mark.parametrize("seed", range(4))
def test_automatic_beta_is_its_estimator(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    single = 0.3 * torch.randn(40, generator=generator) + torch.randn(7, 40, generator=generator)
    sources = torch.randn(3, 40, generator=generator) * 0.5 + single.mean(dim=0)
    batches = [row.numpy().astype(np.float64) for row in single]
    means = [row.numpy().astype(np.float64) for row in sources]
    estimators: list[tuple[Rule, Variant, Any]] = [
        ("projection", "paper", literal.beta_fedgp),
        ("projection", "release", literal.beta_fedgp_released),
        ("convex", "paper", literal.beta_fedda),
    ]
    for rule, variant, estimator in estimators:
        expected = [estimator(batches, mean) for mean in means]
        found = auto_beta(single, sources, rule=rule, variant=variant)
        assert found.tolist() == pytest.approx(expected, rel=1e-5)
        assert all(0 <= beta <= 1 for beta in expected)


def test_automatic_beta_says_whom_to_trust() -> None:
    generator = torch.Generator().manual_seed(0)
    truth = torch.randn(2000, generator=generator)
    noisy = truth + 5 * torch.randn(8, 2000, generator=generator)
    sources = torch.stack([truth, truth + torch.randn(2000, generator=generator), -50 * truth.flip(0)])
    near, middle, far = auto_beta(noisy, sources, rule="convex").tolist()
    assert near > 0.85 and near > middle > far and far < 0.05
    # A target that is sure of itself needs nobody; one without any disagreement neither.
    assert auto_beta(truth + 1e-3 * torch.randn(8, 2000, generator=generator), sources)[2] < 1e-3
    assert not auto_beta(truth.expand(4, -1), sources).any()
    with pytest.raises(ValueError, match="at least 2"):
        auto_beta(truth[None], sources)


def test_the_method_is_the_function_and_warms_up_without_the_target() -> None:
    g, weights = updates(4), torch.tensor([0.1, 0.2, 0.3, 0.4])
    single = updates(6, seed=9)

    def about(index: int, steps: Tensor | None = single) -> Round:
        return Round(index, (1, 3, 5, 8), (6, 2, 4, 6), 0.1, 0, steps)

    method = FedGP(target=5, beta="auto", warmup=1)
    assert method.always() == (5,) and method.wants_steps() == 5 and method.needs_each
    shares = torch.tensor([0.1, 0.2, 0.0, 0.4]) / 0.7
    torch.testing.assert_close(method.aggregate(g, weights, PARTS, about(0)), shares @ g)
    means = g[[0, 1, 3]] / torch.tensor([6.0, 2.0, 6.0])[:, None]
    expected = adapt(g, 2, weights, PARTS, auto_beta(single, means))
    torch.testing.assert_close(method.aggregate(g, weights, PARTS, about(1)), expected)
    with pytest.raises(UserError, match="two or more optimizer steps"):
        method.aggregate(g, weights, PARTS, about(1, single[:1]))
    fixed = FedGP(target=5, beta=0.3, rule="convex", warmup=0)
    assert fixed.wants_steps() is None
    expected = adapt(g, 2, weights, PARTS, torch.full((3,), 0.3), rule="convex")
    torch.testing.assert_close(fixed.aggregate(g, weights, PARTS, about(0, None)), expected)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"target": -1}, "method.target=-1"), ({"beta": 1.5}, "method.beta=1.5"), ({"warmup": -1}, "method.warmup=-1")],
)
def test_values_out_of_range_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        FedGP(**wrong)
    FedGP().check(2)
    with pytest.raises(UserError, match="at least one source"):
        FedGP().check(1)
