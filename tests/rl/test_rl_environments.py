"""Environments: the pole and cart halves of the real CartPole, whole episodes, one line where something is missing."""

from __future__ import annotations

import builtins
from typing import Any

import numpy as np
import pytest
import torch

from subspace_lab.errors import UserError
from subspace_lab.rl.environments import Environment, episode_seeds

gymnasium = pytest.importorskip("gymnasium")


def first_failure(fails_by: Any, action: int, steps: int = 200) -> tuple[int | None, np.ndarray]:
    """The step at which always pushing one way ends an episode, and the last observation."""
    env = Environment("CartPole-v1", max_episode_steps=steps, fails_by=fails_by).make()
    env.reset(seed=3)
    for step in range(steps):
        seen, reward, terminated, truncated, _ = env.step(action)
        assert reward == 1.0
        if terminated:
            return step, seen
    assert truncated
    return None, seen


def test_the_pole_half_ends_when_the_pole_falls_and_not_when_the_cart_leaves() -> None:
    whole, _ = first_failure(None, 1)
    half, seen = first_failure("pole", 1)
    assert half == whole  # pushing one way the pole falls first
    assert abs(seen[2]) > 12 * 2 * np.pi / 360
    env: Any = Environment("CartPole-v1", fails_by="pole").make()
    env.reset(seed=0)
    env.unwrapped.state = np.array([100.0, 0.0, 0.0, 0.0])
    assert env.step(1)[2] is False
    env.unwrapped.state = np.array([100.0, 0.0, 0.3, 0.0])
    assert env.step(1)[2] is True


def test_the_cart_half_ends_when_the_cart_leaves_and_not_when_the_pole_falls() -> None:
    whole, _ = first_failure(None, 1)
    half, seen = first_failure("cart", 1)
    assert whole is not None and half is not None and half > whole
    assert abs(seen[0]) > 2.4
    env: Any = Environment("CartPole-v1", fails_by="cart").make()
    env.reset(seed=0)
    env.unwrapped.state = np.array([0.0, 0.0, 3.0, 0.0])
    seen, reward, terminated, *_ = env.step(1)
    assert (reward, terminated) == (1.0, False)


def test_both_halves_keep_the_dynamics_of_the_real_environment() -> None:
    trajectories = []
    for fails_by in (None, "pole", "cart"):
        env = Environment("CartPole-v1", fails_by=fails_by).make()  # type: ignore[arg-type]
        env.reset(seed=5)
        trajectories.append(np.stack([env.step(step % 2)[0] for step in range(8)]))
    assert np.array_equal(trajectories[0], trajectories[1])
    assert np.array_equal(trajectories[0], trajectories[2])


def test_an_episode_has_at_most_200_steps() -> None:
    env = Environment("CartPole-v1", max_episode_steps=200, fails_by="pole")
    # Bang-bang on angle and angular velocity holds the pole, wherever the cart goes.
    returns = env.play(lambda seen, _: torch.stack([-(seen[:, 2] + seen[:, 3]), seen[:, 2] + seen[:, 3]], 1), [1, 2, 3])
    assert returns.tolist() == [200.0] * 3


def test_playing_together_is_playing_alone() -> None:
    env = Environment("CartPole-v1")

    def act(seen: torch.Tensor, _: np.ndarray) -> torch.Tensor:
        return torch.stack([seen[:, 0], seen[:, 2] + 0.3 * seen[:, 3]], 1)

    seeds = episode_seeds("test", 0, 0, 70)  # more than are alive at a time
    together = env.play(act, seeds)
    assert together.tolist() == [env.play(act, [seed])[0] for seed in seeds]
    assert len(set(together)) > 1


def test_each_stage_has_its_own_starts() -> None:
    val, test = episode_seeds("val", 0, 0, 20), episode_seeds("test", 0, 0, 100)
    train = episode_seeds("train", 0, 0, 1000)
    assert not set(val) & set(test) and not set(train) & {*val, *test}
    assert episode_seeds("train", 0, 10, 5) == train[10:15]
    assert episode_seeds("train", 1, 0, 5) != train[:5]


def test_continuous_actions_stay_within_bounds() -> None:
    pytest.importorskip("mujoco")
    env = Environment("InvertedPendulum-v5")
    assert not env.discrete
    assert env.model_arguments() == {"data_observation": (4,), "data_actions": 1}
    actions = env.actions(torch.tensor([[-100.0], [0.5], [100.0]]))
    assert actions.dtype == np.float32
    assert actions.tolist() == [[-3.0], [0.5], [3.0]]


def test_what_is_missing_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] in ("ale_py", "gymnasium"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args, **kwargs)

    with pytest.raises(UserError, match="NoSuch"):
        Environment("NoSuchEnvironment-v0").make()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"needs the package 'gymnasium' \(pip install 'subspace-lab\[rl\]'\)"):
        Environment("CartPole-v1").make()


def test_atari_without_ale_py_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(UserError, match="ALE/Pong-v5 needs the package 'ale_py'"):
        Environment("ALE/Pong-v5", atari=True).make()


def test_values_that_cannot_be_meant() -> None:
    with pytest.raises(UserError, match="at least 1"):
        Environment("CartPole-v1", max_episode_steps=0)
    with pytest.raises(UserError, match="for CartPole"):
        Environment("InvertedPendulum-v5", fails_by="pole")
