"""Evolution strategies: the gradient of the smoothed return, from returns of perturbed policies alone.

Salimans, Ho, Chen, Sidor & Sutskever, "Evolution Strategies as a Scalable Alternative to Reinforcement Learning", 2017,
arXiv 1703.03864, algorithm 2 with antithetic sampling and centred ranks; inside a random subspace as Li et al. 2018 do.

    g = 1 / (2 m σ) Σ_k (u(v + σ ε_k) − u(v − σ ε_k)) ε_k,   ε_k ~ N(0, I),  k = 1 … m

============  =====================================================================================
symbol        here
============  =====================================================================================
v             `Parts.vector()`: the trained numbers (in a subspace: the coordinates z)
ε_k           `gaussian`: entries of a counter-based stream, never stored
u             `centred_ranks` of the returns, in [−1/2, 1/2]
σ             `sigma` · sqrt(D / d): columns of P have norm 1, so this moves all D weights as far as `sigma` does
============  =====================================================================================

The loop is our own and not Lightning's: there is no loss, no batch and no backward pass for it to drive. A generation's
policies are evaluated together: each one's plain weights are made once, then one batched call answers all episodes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key, uniform
from subspace_lab.rl.environments import episode_seeds
from subspace_lab.rl.learner import Parts, empty_stack, rows_of, stack_into
from subspace_lab.rl.policies import Statistics

# Policies whose weights are held at a time.
_CHUNK = 64
# Frames that calibrate a virtual batch normalisation, as published.
_REFERENCE_FRAMES = 128


class EvolutionStrategies:
    """Learns by one optimizer step per generation.

    Args:
        parts: model, optimizer, environment, …
        population: perturbed policies per generation, an even number.
        episodes: that each of them plays.
        sigma: size of the perturbation of a weight, when all are perturbed.
    """

    def __init__(self, parts: Parts, *, population: int = 32, episodes: int = 1, sigma: float = 0.1) -> None:
        if population < 2 or population % 2:
            raise UserError(f"protocol.learner.population={population}: expected an even number of at least 2")
        if episodes < 1:
            raise UserError(f"protocol.learner.episodes={episodes}: expected at least 1")
        if not sigma > 0:
            raise UserError(f"protocol.learner.sigma={sigma}: expected a positive number")
        self.parts = parts
        self.pairs, self.episodes = population // 2, episodes
        weights = sum(p.numel() for p in parts.plain.parameters())
        self.sigma = sigma * math.sqrt(weights / parts.vector().numel())
        self.key = derive_key("rl/evolution", parts.seed)
        self.step = 0
        self.frames = 0
        self.statistics = getattr(parts.plain, "statistics", None)
        self._give_reference_frames()

    def advance(self, max_steps: int) -> dict[str, float]:
        """Evaluate one generation and step once."""
        parts, centre = self.parts, self.parts.vector()
        noise = gaussian(self.key, self.step * self.pairs * centre.numel(), (self.pairs, centre.numel()))
        noise = noise.to(centre)
        shown: list[np.ndarray[Any, Any]] = []
        returns = np.empty((self.pairs, 2))
        for start in range(0, self.pairs, _CHUNK // 2):
            some = noise[start : start + _CHUNK // 2]
            members = torch.stack([centre + self.sigma * some, centre - self.sigma * some], dim=1).flatten(0, 1)
            returns[start : start + len(some)] = self._returns(members, shown).reshape(-1, 2)
        parts.put(centre)
        self._learn_statistics(shown)
        ascent = estimate(centred_ranks(returns), noise, self.sigma)
        trained = parts.trained()
        for p, part in zip(trained, torch.split(ascent, [p.numel() for p in trained]), strict=True):
            p.grad = -part.view_as(p)
        parts.step()
        self.step += 1
        return {"train/return": float(returns.mean()), "train/best_return": float(returns.max())}

    def _returns(self, members: Tensor, shown: list[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
        """Return the mean return of each row of `members`; all play the same starts."""
        count = len(members)
        stacked = empty_stack(self.parts.plain, count)
        for index, member in enumerate(members):
            self.parts.put(member)
            stack_into(stacked, index, self.parts.plain_policy().state_dict())
        population = Population(self.parts.plain, stacked, self.episodes)
        starts = episode_seeds("train", self.parts.seed, self.step * self.episodes, self.episodes)

        def watch(seen: np.ndarray[Any, Any]) -> None:
            self.frames += len(seen)
            if self.statistics is not None:
                shown.append(seen)

        returns = self.parts.environment.play(population, starts * count, watch)
        means: np.ndarray[Any, Any] = returns.reshape(count, self.episodes).mean(axis=1)
        return means

    def _learn_statistics(self, shown: list[np.ndarray[Any, Any]]) -> None:
        # Buffers of the model that is trained: the next generation's plain weights are made from it.
        for module in self.parts.model.modules():
            if shown and isinstance(module, Statistics):
                module.show(torch.from_numpy(np.concatenate(shown)))

    def _give_reference_frames(self) -> None:
        if not hasattr(self.parts.plain, "calibrate"):
            return
        env = self.parts.environment.envs(1)[0]
        env.action_space.seed(0)
        frames: list[np.ndarray[Any, Any]] = []
        env.reset(seed=0)
        while len(frames) < _REFERENCE_FRAMES:
            frame, _, terminated, truncated, _ = env.step(env.action_space.sample())
            frames.append(np.asarray(frame))
            if terminated or truncated:
                env.reset()
        self.parts.plain.reference = torch.from_numpy(np.stack(frames).astype(np.float32))

    def state_dict(self) -> dict[str, Any]:
        """Return the counters: noise and starts follow from them."""
        return {"step": self.step, "frames": self.frames}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counters."""
        self.step, self.frames = int(state["step"]), int(state["frames"])


class Population:
    """Many policies as one function: observation k goes to the policy whose episode it belongs to.

    Args:
        template: the policy whose forward pass is used.
        stacked: weights and buffers, each with a leading dimension of the number of policies.
        episodes: consecutive episodes that each policy plays.
    """

    def __init__(self, template: nn.Module, stacked: dict[str, Tensor], episodes: int) -> None:
        self.stacked, self.episodes = stacked, episodes
        self.device = next(iter(stacked.values())).device
        self.held: tuple[np.ndarray[Any, Any], dict[str, Tensor]] | None = None

        def answer(weights: dict[str, Tensor], observation: Tensor) -> Tensor:
            outputs: Tensor = functional_call(template, weights, (observation.unsqueeze(0),))
            return outputs.squeeze(0)

        self._answer = torch.func.vmap(answer)

    def __call__(self, observations: Tensor, episodes: np.ndarray[Any, Any]) -> Tensor:
        """Return outputs (k, n) of observations (k, …) of the given episodes, (k,) ascending."""
        # Rows of finished episodes are dropped only when half are: copying all weights at every death would cost more.
        if self.held is None or 2 * len(episodes) <= len(self.held[0]) or not np.isin(episodes, self.held[0]).all():
            rows = torch.from_numpy(episodes // self.episodes).to(self.device)
            self.held = episodes, rows_of(self.stacked, rows)
        who, weights = self.held
        places = np.searchsorted(who, episodes)
        padded = torch.zeros((len(who), *observations.shape[1:]), dtype=observations.dtype, device=self.device)
        where = torch.from_numpy(places).to(self.device)
        padded[where] = observations.to(self.device)
        with torch.no_grad():
            outputs: Tensor = self._answer(weights, padded)
        return outputs[where]


def gaussian(key: int, first: int, shape: tuple[int, ...]) -> Tensor:
    """Return entries first, first + 1, … of a standard normal stream, float32, on the CPU.

    Box and Muller's transform of two entries of the uniform stream of `key`, in float64.
    """
    count = math.prod(shape)
    u = uniform((count, 2), key=key, offset=2 * first, dtype=torch.float64)
    radius = torch.sqrt(-2.0 * torch.log1p(-u[:, 0]))
    return (radius * torch.cos(2.0 * math.pi * u[:, 1])).float().reshape(shape)


def centred_ranks(returns: np.ndarray[Any, Any]) -> Tensor:
    """Return the ranks of all entries scaled to [−1/2, 1/2], float32; equal returns share their mean rank.

    So a generation of equals gives a gradient of zero, not the order of its members.
    """
    flat = returns.reshape(-1)
    _, group, sizes = np.unique(flat, return_inverse=True, return_counts=True)
    last = np.cumsum(sizes)
    ranks = (last - 0.5 * (sizes + 1))[group.reshape(-1)]
    return torch.from_numpy((ranks / max(1, flat.size - 1) - 0.5).reshape(returns.shape)).float()


def estimate(utilities: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Return the estimated gradient of the utility, (d,), to be ascended.

    Args:
        utilities: (m, 2), of v + σ ε_k and v − σ ε_k.
        noise: ε, (m, d).
        sigma: σ.
    """
    difference = (utilities[:, 0] - utilities[:, 1]).to(noise)
    return difference @ noise / (2 * len(noise) * sigma)
