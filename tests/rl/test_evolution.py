"""Evolution strategies: an unbiased gradient, ranks without favourites, the same run twice."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.errors import UserError
from subspace_lab.methods.base import Method
from subspace_lab.methods.full import Full
from subspace_lab.methods.intrinsic import IntrinsicDimension
from subspace_lab.optim.schedules import constant
from subspace_lab.rl.environments import Environment
from subspace_lab.rl.evolution import EvolutionStrategies, Population, centred_ranks, estimate, gaussian
from subspace_lab.rl.learner import Parts, empty_stack, plain_copy, stack_into
from subspace_lab.rl.policies import Atari, FullyConnected, Statistics


def learner(
    environment: Environment, method: Method | None = None, *, seed: int = 0, normalize: bool = False, **more: Any
) -> EvolutionStrategies:
    torch.manual_seed(seed)
    policy = FullyConnected([20, 20], "tanh", paired=True, normalize=normalize, **environment.model_arguments())
    plain, method = plain_copy(policy), method or Full()
    model = method.prepare(policy)
    optimizer = method.build_optimizer(model, functools.partial(torch.optim.Adam, lr=0.03))
    parts = Parts(model, plain, method, optimizer, constant(optimizer, 1), environment, seed)
    return EvolutionStrategies(parts, **more)


def test_noise_is_standard_normal_and_addressable() -> None:
    noise = gaussian(7, 0, (200, 100)).double().flatten()
    assert abs(noise.mean()) < 4 / 20000**0.5
    assert abs(noise.var() - 1) < 0.05
    assert abs((noise**4).mean() - 3) < 0.3
    assert torch.equal(gaussian(7, 100, (50,)), noise[100:150].float())
    assert not torch.equal(gaussian(8, 0, (50,)), noise[:50].float())


def test_the_estimate_on_a_quadratic_is_unbiased() -> None:
    """For f quadratic, antithetic differences have no error of second order: the mean over noise is the gradient."""
    d, m, sigma = 6, 40000, 0.3
    matrix = torch.randn(d, d, generator=torch.Generator().manual_seed(0))
    matrix, offset, at = matrix @ matrix.T, torch.arange(d).float(), torch.ones(d)

    def value(v: torch.Tensor) -> torch.Tensor:
        return -((v - offset) @ matrix * (v - offset)).sum(-1)

    noise = gaussian(1, 0, (m, d))
    utilities = torch.stack([value(at + sigma * noise), value(at - sigma * noise)], 1)
    gradient = -2 * (at - offset) @ matrix
    found = estimate(utilities, noise, sigma)
    # Covariance of ε εᵀ g: (|g|² I + g gᵀ)/m; six deviations of the norm.
    assert (found - gradient).norm() < 6 * gradient.norm() * ((d + 1) / m) ** 0.5
    # A complete orthogonal design (rows √d e_i) leaves no sampling error at all.
    design = torch.eye(d) * d**0.5
    exact = estimate(torch.stack([value(at + sigma * design), value(at - sigma * design)], 1), design, sigma)
    torch.testing.assert_close(exact, gradient, rtol=1e-3, atol=1e-3 * float(gradient.norm()))
    # Ranks keep the direction, not the length.
    ranked = estimate(centred_ranks(utilities.numpy()), noise, sigma)
    assert torch.cosine_similarity(ranked, gradient, dim=0) > 0.98


def test_ranks_are_centred_and_share_ties() -> None:
    ranks = centred_ranks(np.array([[3.0, 1.0], [2.0, 10.0]]))
    torch.testing.assert_close(ranks, torch.tensor([[1 / 6, -0.5], [-1 / 6, 0.5]]))
    assert centred_ranks(np.full((4, 2), 1000.0)).abs().max() == 0
    tied = centred_ranks(np.array([[1.0, 5.0], [5.0, 9.0]])).flatten()
    assert tied[1] == tied[2] == 0


def test_a_population_answers_as_each_of_its_policies() -> None:
    policies = [FullyConnected([5], "tanh", data_observation=(3,), data_actions=2) for _ in range(4)]
    stacked = empty_stack(policies[0], 4)
    for index, policy in enumerate(policies):
        stack_into(stacked, index, policy.state_dict())
    population = Population(policies[0], stacked, episodes=2)
    seen = torch.randn(8, 3)
    for episodes in (np.arange(8), np.array([0, 3, 4, 5, 7]), np.array([3, 7]), np.array([7]), np.arange(8)):
        found = population(seen[episodes], episodes)
        wanted = torch.cat([policies[e // 2](seen[e : e + 1]) for e in episodes])
        torch.testing.assert_close(found, wanted)


def test_published_numbers_of_weights() -> None:
    def weights(policy: torch.nn.Module) -> int:
        return sum(p.numel() for p in policy.parameters())

    assert weights(FullyConnected()) == 562
    assert weights(FullyConnected([20, 20], "tanh", paired=True, data_actions=1)) == 562
    assert weights(FullyConnected([256, 256], "tanh", data_observation=(376,), data_actions=17)) == 166673
    assert weights(Atari()) == 1005974


def test_virtual_batch_normalisation_follows_the_weights_and_not_the_batch() -> None:
    policy = Atari().eval()
    policy.reference = torch.randint(0, 256, (6, 4, 84, 84)).float()
    policy.calibrate()
    seen = torch.randint(0, 256, (3, 4, 84, 84)).float()
    with torch.no_grad():
        together, alone = policy(seen), torch.cat([policy(one[None]) for one in seen])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
        policy.layers[0].weight.mul_(3.0)
        policy.layers[0].bias.mul_(3.0)
        assert not torch.allclose(policy(seen), together, atol=1e-3)
        policy.calibrate()  # the scale of a normalised layer does not matter once its statistics are its own
        torch.testing.assert_close(policy(seen), together, rtol=1e-2, atol=1e-2)


def test_statistics_centre_and_scale_what_they_were_shown() -> None:
    statistics = Statistics(3)
    shown = torch.randn(500, 3) * torch.tensor([1.0, 10.0, 0.1]) + torch.tensor([0.0, 5.0, -3.0])
    for part in shown.split(100):
        statistics.show(part)
    seen = statistics(shown)
    torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-2, rtol=0)
    torch.testing.assert_close(seen.std(0), torch.ones(3), atol=2e-2, rtol=0)


def test_a_seed_names_a_run() -> None:
    gym = pytest.importorskip("gymnasium")
    assert gym is not None
    found = []
    for seed in (0, 0, 1):
        es = learner(Environment("CartPole-v1", max_episode_steps=20), seed=seed, population=6)
        figures = [es.advance(100) for _ in range(2)]
        found.append((es.parts.vector(), figures, es.frames))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
    assert not torch.equal(found[0][0], found[2][0])


@pytest.mark.parametrize("method", [Full(), IntrinsicDimension(d=3)])
def test_observation_statistics_reach_the_policies(method: Method) -> None:
    pytest.importorskip("gymnasium")
    es = learner(Environment("CartPole-v1", max_episode_steps=20), method, population=4, normalize=True)
    es.advance(100)
    es.advance(100)
    plain: Any = es.parts.plain_policy()
    assert int(plain.statistics.count) == es.frames
    assert not torch.equal(plain.statistics.scale, torch.ones(4))


def test_values_that_cannot_be_meant() -> None:
    pytest.importorskip("gymnasium")
    environment = Environment("CartPole-v1")
    for wrong in ({"population": 3}, {"population": 0}, {"episodes": 0}, {"sigma": 0.0}):
        with pytest.raises(UserError, match=f"protocol.learner.{next(iter(wrong))}="):
            learner(environment, **wrong)


@pytest.mark.slow
def test_the_pendulum_is_learnt() -> None:
    """Ten generations lift the mean return of the centre policy to several times the untrained one's."""
    pytest.importorskip("mujoco")
    environment = Environment("InvertedPendulum-v5", max_episode_steps=150)
    es = learner(environment, population=32, sigma=0.1)
    before = environment.evaluate(es.parts.plain_policy(), 20, "val")
    for _ in range(12):
        es.advance(100)
    after = environment.evaluate(es.parts.plain_policy(), 20, "val")
    assert before < 35
    assert after > 2 * before
