"""gymnasium environments by name, the pole and cart halves of CartPole, and whole episodes with many policies at once.

Gymnasium's own vector environments step every member until the last one is done, or restart the finished ones. An
evaluation wants exactly one episode of each, and most members of an early population fall within ten of a thousand
steps: here the finished ones rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key

if TYPE_CHECKING:
    import gymnasium

Act = Callable[[Tensor, "np.ndarray[Any, Any]"], Tensor]
Watch = Callable[["np.ndarray[Any, Any]"], None]

# Environments alive at a time: more add memory, not speed.
_POOL = 64
_INSTALL = "pip install 'subspace-lab[rl]'"


@dataclass
class Environment:
    """The `data` node of reinforcement learning: which environment, and what counts as everything it can give.

    Args:
        id: gymnasium's name of it.
        max_episode_steps: an episode is cut off after so many steps; null is the environment's own limit.
        fails_by: of CartPole: only the pole's angle or only the cart's position ends an episode; null is both.
        atari: greyscale 84 × 84 frames, four stacked, four steps per action (Mnih et al. 2015).
        best_return: the largest possible return, at which training stops early; null never stops.
    """

    id: str
    max_episode_steps: int | None = None
    fails_by: Literal["pole", "cart"] | None = None
    atari: bool = False
    best_return: float | None = None
    _pool: list[gymnasium.Env[Any, Any]] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.max_episode_steps is not None and self.max_episode_steps < 1:
            raise UserError(f"data.max_episode_steps={self.max_episode_steps}: expected at least 1")
        if self.fails_by is not None and not self.id.startswith("CartPole"):
            raise UserError(f"data.fails_by={self.fails_by} is for CartPole, not for {self.id}")

    def make(self) -> gymnasium.Env[Any, Any]:
        """Return a new environment.

        Raises:
            UserError: a package is missing, or there is no environment of this name.
        """
        try:
            import gymnasium as gym

            if self.atari:
                gym.register_envs(importlib.import_module("ale_py"))
            env: gymnasium.Env[Any, Any] = gym.make(
                self.id,
                max_episode_steps=self.max_episode_steps,
                disable_env_checker=True,
                **({"frameskip": 1} if self.atari else {}),
            )
            if self.atari:
                env = gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=84)
                env = gym.wrappers.FrameStackObservation(env, 4)
        except ModuleNotFoundError as error:
            raise UserError(f"{self.id} needs the package '{error.name}'", hint=_INSTALL) from error
        except gym.error.DependencyNotInstalled as error:
            raise UserError(f"{self.id} needs a package that is not installed: {error}", hint=_INSTALL) from error
        except gym.error.Error as error:
            raise UserError(f"data.id={self.id}: {str(error).splitlines()[0]}") from error
        if self.fails_by is not None:
            keep_one_failure(env, self.fails_by)
        return env

    def envs(self, count: int) -> list[gymnasium.Env[Any, Any]]:
        """Return `count` environments, kept for the next call: making one reads files."""
        while len(self._pool) < count:
            self._pool.append(self.make())
        return self._pool[:count]

    @property
    def discrete(self) -> bool:
        """Whether an action is one of a few (the policy scores them) or a vector of numbers."""
        return hasattr(self.envs(1)[0].action_space, "n")

    def model_arguments(self) -> dict[str, Any]:
        """Return what a policy's size follows from: the observation's shape and how many outputs an action takes."""
        env = self.envs(1)[0]
        space: Any = env.action_space
        actions = int(space.n) if self.discrete else int(np.prod(space.shape))
        return {"data_observation": tuple(env.observation_space.shape or ()), "data_actions": actions}

    def describe(self) -> dict[str, Any]:
        """Return what was played, for results.json."""
        import gymnasium as gym

        spec: Any = self.envs(1)[0].spec
        return {
            "environment": self.id,
            "max_episode_steps": spec.max_episode_steps,
            "fails_by": self.fails_by,
            "best_return": self.best_return,
            "gymnasium": gym.__version__,
        }

    def actions(self, outputs: Tensor) -> np.ndarray[Any, Any]:
        """Return the greedy actions of policy outputs (k, n): the best-scored ones, or the numbers within bounds."""
        if self.discrete:
            return outputs.argmax(dim=1).cpu().numpy()
        space: Any = self.envs(1)[0].action_space
        return outputs.cpu().numpy().astype(space.dtype).clip(space.low, space.high)

    def play(self, act: Act, seeds: Sequence[int], watch: Watch | None = None) -> np.ndarray[Any, Any]:
        """Play one episode per seed, all at the same time, and return their returns.

        Args:
            act: (observations float32 (k, …), which episodes they belong to, int (k,), ascending) -> outputs (k, n).
            seeds: of the environments' resets.
            watch: is shown every batch of observations.

        Returns:
            float64 (len(seeds),): sums of rewards.
        """
        parts = [self._play(act, seeds[start : start + _POOL], start, watch) for start in range(0, len(seeds), _POOL)]
        return np.concatenate(parts)

    def _play(self, act: Act, seeds: Sequence[int], first: int, watch: Watch | None) -> np.ndarray[Any, Any]:
        envs = self.envs(len(seeds))
        returns = np.zeros(len(envs))
        now = np.stack([np.asarray(env.reset(seed=seed)[0]) for env, seed in zip(envs, seeds, strict=True)])
        live = np.arange(len(envs))
        while live.size:
            seen = now[live]
            if watch is not None:
                watch(seen)
            chosen = self.actions(act(torch.from_numpy(seen.astype(np.float32)), live + first))
            going = np.ones(live.size, dtype=bool)
            for place, (index, action) in enumerate(zip(live, chosen, strict=True)):
                now[index], reward, terminated, truncated, _ = envs[index].step(action)
                returns[index] += float(reward)
                going[place] = not (terminated or truncated)
            live = live[going]
        return returns

    def evaluate(self, policy: torch.nn.Module, episodes: int, stage: str) -> float:
        """Return the mean return of one policy over episodes whose starts are the same in every run.

        Args:
            policy: observations float32 (k, …) -> outputs (k, n); called without gradients.
            episodes: their number.
            stage: `val` or `test`; names the seeds.
        """
        device = next(policy.parameters()).device
        with torch.no_grad():
            returns = self.play(lambda seen, _: policy(seen.to(device)), episode_seeds(stage, 0, 0, episodes))
        return float(returns.mean())


def episode_seeds(stage: str, seed: int, first: int, count: int) -> list[int]:
    """Return the reset seeds of episodes first … first + count − 1 of a stage, in [0, 2^31)."""
    return [derive_key("rl/episode", stage, seed, first + index) % 2**31 for index in range(count)]


def keep_one_failure(env: gymnasium.Env[Any, Any], which: Literal["pole", "cart"]) -> None:
    """Let only the pole's angle or only the cart's position end CartPole's episodes (Li et al. 2018, section 3.4).

    The dynamics and rewards stay the environment's own; only the other threshold moves to infinity.
    """
    inner: Any = env.unwrapped
    if which == "pole":
        inner.x_threshold = float("inf")
    else:
        inner.theta_threshold_radians = float("inf")
