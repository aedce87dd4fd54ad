"""Deep Q-learning: the memory, the target, exploration, the same run twice, learning."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from subspace_lab.errors import UserError
from subspace_lab.methods.full import Full
from subspace_lab.optim.schedules import constant
from subspace_lab.rl.dqn import DeepQLearning
from subspace_lab.rl.environments import Environment
from subspace_lab.rl.learner import Parts, plain_copy
from subspace_lab.rl.policies import FullyConnected
from subspace_lab.rl.replay import Replay

pytest.importorskip("gymnasium")


def learner(seed: int = 0, steps: int = 200, **more: Any) -> DeepQLearning:
    environment = Environment("CartPole-v1", max_episode_steps=steps)
    torch.manual_seed(seed)
    policy = FullyConnected(**environment.model_arguments())
    plain, method = plain_copy(policy), Full()
    optimizer = method.build_optimizer(policy, functools.partial(torch.optim.Adam, lr=0.002, fused=True))
    parts = Parts(policy, plain, method, optimizer, constant(optimizer, 1), environment, seed)
    return DeepQLearning(parts, **{"discount": 0.95, "exploration_steps": 1000, "warmup": 100, **more})


def test_the_memory_forgets_the_oldest_and_survives_a_round_trip() -> None:
    replay = Replay(4, (2,))
    for index in range(6):
        replay.add(torch.full((2,), float(index)), index % 2, float(index), torch.full((2,), index + 0.5), index == 5)
    assert len(replay) == 4
    seen, action, reward, following, goes_on = replay.take(torch.tensor([0, 1, 2, 3]))
    assert reward.tolist() == [4.0, 5.0, 2.0, 3.0]
    assert action.tolist() == [0, 1, 0, 1]
    assert goes_on.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert (following - seen).tolist() == [[0.5, 0.5]] * 4
    other = Replay(4, (2,))
    other.load_state_dict(replay.state_dict())
    assert other.added == 6 and torch.equal(other.seen, replay.seen)


def test_an_episode_cut_off_by_the_limit_still_has_a_future() -> None:
    q = learner(steps=5, warmup=10**4)
    q.advance(100)
    assert q.frames == 5
    assert q.replay.goes_on[:5].tolist() == [1.0] * 5


def test_exploration_falls_linearly() -> None:
    q = learner(exploration=(1.0, 0.1), exploration_steps=10)
    shares = []
    for frames in (0, 5, 10, 1000):
        q.frames = frames
        shares.append(q._epsilon())
    assert shares == pytest.approx([1.0, 0.55, 0.1, 0.1])


def test_the_target_network_follows_only_every_so_often() -> None:
    q = learner(target_every=50, batch_size=8, warmup=8)
    before = q.target.state_dict()["layers.0.weight"].clone()
    while q.step < 40:
        q.advance(40)
    assert q.step == 40
    assert torch.equal(q.target.state_dict()["layers.0.weight"], before)
    while q.step < 50:
        q.advance(50)
    assert torch.equal(q.target.state_dict()["layers.0.weight"], q.parts.model.state_dict()["layers.0.weight"])
    assert not torch.equal(q.target.state_dict()["layers.0.weight"], before)


def test_the_loss_is_the_double_q_error() -> None:
    q = learner(batch_size=4, warmup=4)
    for index in range(4):
        q.replay.add(torch.randn(4), index % 2, 1.0, torch.randn(4), index == 2)
    with torch.no_grad():
        for p in q.target.parameters():
            p.add_(0.05)
        state = q.random.bit_generator.state
        places = torch.from_numpy(q.random.integers(4, size=4))
        q.random.bit_generator.state = state
        errors = []
        for i in places.tolist():
            best = int(q.parts.model(q.replay.next[i : i + 1]).argmax())
            future = 0.0 if i == 2 else float(q.target(q.replay.next[i : i + 1])[0, best])
            value = float(q.parts.model(q.replay.seen[i : i + 1])[0, int(q.replay.action[i])])
            errors.append(value - (1.0 + 0.95 * future))
    q._learn()
    huber = [0.5 * e * e if abs(e) < 1 else abs(e) - 0.5 for e in errors]
    assert float(q.loss) == pytest.approx(sum(huber) / 4, rel=1e-5)


def test_a_seed_names_a_run() -> None:
    found = []
    for seed in (0, 0, 1):
        q = learner(seed)
        figures = [q.advance(10**4) for _ in range(8)]
        found.append((q.parts.vector(), figures))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    assert not torch.equal(found[0][0], found[2][0])


def test_values_that_cannot_be_meant() -> None:
    for wrong, what in (({"discount": 1.5}, "discount"), ({"batch_size": 0}, "batch_size"), ({"warmup": 3}, "warmup")):
        with pytest.raises(UserError, match=what):
            learner(**wrong)


def test_continuous_actions_are_refused() -> None:
    pytest.importorskip("mujoco")
    q = learner()
    q.parts.environment = Environment("InvertedPendulum-v5")
    with pytest.raises(UserError, match="protocol=evolution"):
        DeepQLearning(q.parts)


@pytest.mark.slow
def test_the_pole_is_held_longer() -> None:
    """2000 steps lift the greedy mean return from about 10 to several times that."""
    q = learner()
    environment = q.parts.environment
    before = environment.evaluate(q.parts.plain_policy(), 20, "val")
    while q.step < 2000:
        q.advance(2000)
    after = environment.evaluate(q.parts.plain_policy(), 20, "val")
    assert before < 40
    assert after > 80
