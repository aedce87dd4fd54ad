"""Replay memory: the last transitions in preallocated tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_FIELDS = ("seen", "action", "reward", "next", "goes_on")


class Replay:
    """A ring of transitions (s, a, r, s', not terminated).

    Args:
        capacity: transitions kept.
        observation: shape of an observation.

    Attributes:
        seen, next: float32 (capacity, *observation).
        action: int64 (capacity,).
        reward, goes_on: float32 (capacity,); goes_on is 0 where s' ended the episode by failure, not by its time limit.
        added: transitions ever added.
    """

    def __init__(self, capacity: int, observation: Sequence[int]) -> None:
        self.capacity = capacity
        self.added = 0
        self.seen = torch.zeros((capacity, *observation))
        self.next = torch.zeros((capacity, *observation))
        self.action = torch.zeros(capacity, dtype=torch.int64)
        self.reward = torch.zeros(capacity)
        self.goes_on = torch.zeros(capacity)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    def add(self, seen: Tensor, action: int, reward: float, following: Tensor, terminated: bool) -> None:
        """Remember one transition, in place of the oldest."""
        at = self.added % self.capacity
        self.seen[at], self.next[at] = seen, following
        self.action[at], self.reward[at], self.goes_on[at] = action, reward, float(not terminated)
        self.added += 1

    def take(self, places: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the transitions at `places`, int64 (b,), field by field."""
        return self.seen[places], self.action[places], self.reward[places], self.next[places], self.goes_on[places]

    def state_dict(self) -> dict[str, Any]:
        """Return what is in use."""
        return {"added": self.added} | {name: getattr(self, name)[: len(self)].clone() for name in _FIELDS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.added = int(state["added"])
        for name in _FIELDS:
            getattr(self, name)[: len(self)] = state[name]
