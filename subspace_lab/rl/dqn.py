"""Deep Q-learning with a replay memory and a target network.

Mnih et al., "Human-level control through deep reinforcement learning", Nature 2015; the target takes its action from
the trained network (van Hasselt et al. 2016, arXiv 1509.06461), which keeps it from running away:

    L = huber(Q(s, a) − (r + γ · Q_target(s', argmax_a Q(s', a)) · [s' goes on]))

Li et al. 2018 (arXiv 1804.08838) measure CartPole so. Their release differs: its target network shares the trained
network's weights, and its exploration ends at 0.1, which the returns it reports include.

The loop is our own and not Lightning's: the data of a step are made by the weights of the step before, one transition
at a time, and a step takes a millisecond. Learning goes in whole episodes, each from its own seed, so that nothing
is left in the environment when a checkpoint is written.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import smooth_l1_loss

from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.rl.environments import episode_seeds
from subspace_lab.rl.learner import Parts
from subspace_lab.rl.replay import Replay

# Training episodes over which returns are averaged for the log, as published.
_WINDOW = 100


class DeepQLearning:
    """Learns by one optimizer step per environment step, once enough transitions are remembered.

    Args:
        parts: model, optimizer, environment, …
        discount: γ.
        batch_size: transitions per step.
        memory: transitions remembered.
        warmup: transitions before the first step.
        exploration: share of random actions, first and last.
        exploration_steps: environment steps from the first to the last.
        target_every: optimizer steps between copies into the target network.
    """

    def __init__(
        self,
        parts: Parts,
        *,
        discount: float = 0.99,
        batch_size: int = 64,
        memory: int = 10000,
        warmup: int = 500,
        exploration: tuple[float, float] = (1.0, 0.05),
        exploration_steps: int = 5000,
        target_every: int = 200,
    ) -> None:
        if not parts.environment.discrete:
            raise UserError("protocol=dqn needs a few actions to choose from", hint="write protocol=evolution")
        if not 0 <= discount <= 1:
            raise UserError(f"protocol.learner.discount={discount}: expected 0 to 1")
        if not 1 <= batch_size <= memory or not batch_size <= warmup <= memory:
            raise UserError("protocol.learner: expected batch_size ≤ warmup ≤ memory")
        self.parts = parts
        self.discount, self.batch_size, self.warmup = discount, batch_size, warmup
        self.exploration, self.exploration_steps = exploration, exploration_steps
        self.target_every = target_every
        arguments = parts.environment.model_arguments()
        self.actions: int = arguments["data_actions"]
        self.replay = Replay(memory, arguments["data_observation"])
        self.random = np.random.Generator(np.random.PCG64(derive_key("rl/dqn", parts.seed)))
        self.target: nn.Module = copy.deepcopy(parts.plain)
        self.device = next(parts.plain.parameters()).device
        parts.plain_policy(into=self.target)
        self.returns: deque[float] = deque(maxlen=_WINDOW)
        self.step = self.frames = self.episodes = 0
        self.loss = torch.zeros((), device=self.device)

    def advance(self, max_steps: int) -> dict[str, float]:
        """Play one episode and learn after each of its steps."""
        parts = self.parts
        env = parts.environment.envs(1)[0]
        first, _ = env.reset(seed=episode_seeds("train", parts.seed, self.episodes, 1)[0])
        seen = torch.from_numpy(np.asarray(first, dtype=np.float32))
        total, over = 0.0, False
        while not over and self.step < max_steps:
            action = self._action(seen)
            following, reward, terminated, truncated, _ = env.step(action)
            after = torch.from_numpy(np.asarray(following, dtype=np.float32))
            self.replay.add(seen, action, float(reward), after, terminated)
            seen, over = after, terminated or truncated
            total += float(reward)
            self.frames += 1
            if len(self.replay) >= self.warmup:
                self._learn()
        self.episodes += 1
        self.returns.append(total)
        return {
            "train/return": float(np.mean(self.returns)),
            "train/loss": float(self.loss),
            "train/exploration": self._epsilon(),
        }

    def _epsilon(self) -> float:
        first, last = self.exploration
        return first + (last - first) * min(1.0, self.frames / self.exploration_steps)

    def _action(self, seen: Tensor) -> int:
        if self.random.random() < self._epsilon():
            return int(self.random.integers(self.actions))
        with torch.no_grad():
            return int(self.parts.model(seen.unsqueeze(0).to(self.device)).argmax())

    def _learn(self) -> None:
        places = torch.from_numpy(self.random.integers(len(self.replay), size=self.batch_size))
        seen, action, reward, following, goes_on = (t.to(self.device) for t in self.replay.take(places))
        values, following_values = self.parts.model(torch.cat([seen, following])).chunk(2)  # one lift, one forward
        with torch.no_grad():
            best = following_values.argmax(dim=1, keepdim=True)
            wanted = reward + self.discount * goes_on * self.target(following).gather(1, best).squeeze(1)
        value = values.gather(1, action.unsqueeze(1)).squeeze(1)
        loss = smooth_l1_loss(value, wanted)
        loss.backward()  # type: ignore[no-untyped-call]
        self.loss = loss.detach()
        self.parts.step()
        self.step += 1
        if self.step % self.target_every == 0:
            self.parts.plain_policy(into=self.target)

    def state_dict(self) -> dict[str, Any]:
        """Return the replay memory, the target network, the generator and the counters."""
        return {
            "replay": self.replay.state_dict(),
            "target": self.target.state_dict(),
            "random": self.random.bit_generator.state,
            "returns": list(self.returns),
            "loss": self.loss,
            "counters": [self.step, self.frames, self.episodes],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.replay.load_state_dict(state["replay"])
        self.target.load_state_dict(state["target"])
        self.random.bit_generator.state = state["random"]
        self.returns.extend(state["returns"])
        self.loss = state["loss"].to(self.device)
        self.step, self.frames, self.episodes = (int(count) for count in state["counters"])
