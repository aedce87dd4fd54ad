"""What a learner is given and must offer: the protocol trains, validates, saves and stops any of them alike."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from subspace_lab.rl.environments import Environment

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from subspace_lab.methods.base import Method


@dataclass
class Parts:
    """What a learner works with.

    Args:
        model: what the method made of the policy: its trainable parameters are what is learned.
        plain: the policy as it was built, to hold plain weights: never trained.
        method: says what the plain weights of `model` are.
        optimizer: on the trainable parameters of `model`.
        scheduler: of its learning rate, stepped once per optimizer step.
        environment: where episodes are played.
        seed: of exploration, of perturbations and of the training episodes.
        clip: largest norm of a gradient; None or 0 does not clip.
    """

    model: nn.Module
    plain: nn.Module
    method: Method
    optimizer: Optimizer
    scheduler: LRScheduler
    environment: Environment
    seed: int
    clip: float | None = None

    def trained(self) -> list[nn.Parameter]:
        """Return the trainable parameters."""
        return [p for p in self.model.parameters() if p.requires_grad]

    def vector(self) -> Tensor:
        """Return the trainable parameters as one vector; with a subspace method, its coordinates."""
        return torch.cat([p.detach().reshape(-1) for p in self.trained()])

    def put(self, vector: Tensor) -> None:
        """Set the trainable parameters from one vector."""
        parameters = self.trained()
        with torch.no_grad():
            for parameter, part in zip(parameters, torch.split(vector, [p.numel() for p in parameters]), strict=True):
                parameter.copy_(part.view_as(parameter))

    def plain_policy(self, into: nn.Module | None = None) -> nn.Module:
        """Return the plain policy (or `into`, another copy of it) with the current weights."""
        policy = self.plain if into is None else into
        policy.load_state_dict(self.method.export(self.model))
        calibrate = getattr(policy, "calibrate", None)
        if calibrate is not None:
            calibrate()
        return policy

    def step(self) -> None:
        """Apply the gradients: clip, optimizer, schedule."""
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.trained(), self.clip)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)


class Learner(Protocol):
    """Learns in pieces at whose ends nothing is hidden in an environment: what `state_dict` returns is all there is.

    Attributes:
        step: optimizer steps so far.
        frames: environment steps so far.
    """

    step: int
    frames: int

    def advance(self, max_steps: int) -> dict[str, float]:
        """Learn for one piece (an episode, a generation), at most to optimizer step `max_steps`; return its figures."""

    def state_dict(self) -> dict[str, Any]:
        """Return what, beside model, optimizer and scheduler, a resumed run needs, as plain containers and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""


def plain_copy(model: nn.Module) -> nn.Module:
    """Return a frozen copy of a policy, in evaluation mode."""
    return copy.deepcopy(model).requires_grad_(False).eval()


def stack_into(stacked: dict[str, Tensor], index: int, weights: dict[str, Tensor]) -> None:
    """Copy one policy's tensors into row `index` of the population's."""
    for name, rows in stacked.items():
        rows[index].copy_(weights[name])


def empty_stack(policy: nn.Module, count: int) -> dict[str, Tensor]:
    """Return room for the state dicts of `count` policies, each tensor with a leading dimension."""
    return {
        name: torch.empty((count, *t.shape), dtype=t.dtype, device=t.device) for name, t in policy.state_dict().items()
    }


def rows_of(stacked: dict[str, Tensor], rows: Sequence[int] | Tensor) -> dict[str, Tensor]:
    """Return some policies of a population."""
    return {name: tensor[rows] for name, tensor in stacked.items()}
