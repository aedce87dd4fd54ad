"""Policy networks: small fully connected ones, and the convolutional one of the published evolution strategies."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.errors import UserError


class FullyConnected(nn.Module):
    """A fully connected policy or value network, (k, observation) -> (k, outputs).

    With relu, weights are drawn as He et al. (2015, normal) do, as in the released deep Q-learning of Li et al. 2018;
    with tanh, every neuron's incoming weights get norm 1 (the last layer's 0.01), as in Salimans et al. 2017. Biases
    start at 0.

    Args:
        hidden: widths of the hidden layers.
        activation: relu or tanh.
        paired: every action is the difference of two outputs. 4-20-20-2 has the 562 weights that are published for
            the inverted pendulum, whose action is one number; which net they were is not published.
        normalize: observations are centred and scaled by running statistics, kept in buffers.
        data_observation: shape of an observation.
        data_actions: outputs that an action takes.
    """

    def __init__(
        self,
        hidden: Sequence[int] = (20, 20),
        activation: Literal["relu", "tanh"] = "relu",
        paired: bool = False,
        normalize: bool = False,
        data_observation: Sequence[int] = (4,),
        data_actions: int = 2,
    ) -> None:
        super().__init__()
        if any(width < 1 for width in hidden):
            raise UserError(f"model.hidden={list(hidden)}: expected widths of at least 1")
        self.paired = paired
        widths = [math.prod(data_observation), *hidden, data_actions * (2 if paired else 1)]
        layers: list[nn.Module] = []
        for inputs, outputs in itertools.pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU() if activation == "relu" else nn.Tanh()]
        self.layers = nn.Sequential(*layers[:-1])
        self.statistics = Statistics(widths[0]) if normalize else None
        self._initialize(activation)

    def _initialize(self, activation: str) -> None:
        linear = [layer for layer in self.layers if isinstance(layer, nn.Linear)]
        with torch.no_grad():
            for layer in linear:
                nn.init.zeros_(layer.bias)
                if activation == "relu":
                    nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                else:
                    nn.init.normal_(layer.weight)
                    layer.weight /= layer.weight.norm(dim=1, keepdim=True)
            if activation == "tanh":
                linear[-1].weight *= 0.01

    @override
    def forward(self, observations: Tensor) -> Tensor:
        """Return action scores or actions, (k, actions)."""
        flat = observations.flatten(1)
        outputs: Tensor = self.layers(flat if self.statistics is None else self.statistics(flat))
        return outputs[:, 0::2] - outputs[:, 1::2] if self.paired else outputs


class Statistics(nn.Module):
    """Centres and scales observations by the mean and deviation of all that were shown to it, clipped to ±5."""

    count: Tensor
    total: Tensor
    squares: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.register_buffer("total", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("squares", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("scale", torch.ones(size))

    def show(self, observations: Tensor) -> None:
        """Count a batch of observations, (k, …)."""
        flat = observations.flatten(1).to(self.total)
        self.count += len(flat)
        self.total += flat.sum(0)
        self.squares += flat.square().sum(0)
        mean = self.total / self.count
        self.mean.copy_(mean)
        self.scale.copy_((self.squares / self.count - mean.square()).clamp(min=1e-4).rsqrt())

    @override
    def forward(self, observations: Tensor) -> Tensor:
        """Return (observation − mean) / deviation."""
        return ((observations - self.mean) * self.scale).clamp(-5.0, 5.0)


class Atari(nn.Module):
    """The convolutional policy of Salimans et al. 2017 for Atari games, (k, 4, 84, 84) in 0…255 -> (k, actions).

    16 filters 8 × 8 by 4, 32 filters 4 × 4 by 2, 256 neurons, each followed by virtual batch normalisation: its
    statistics are those of a fixed set of reference frames under the current weights (`calibrate`). With six actions
    it has the 1,005,974 weights that Li et al. 2018 publish for Pong.

    Args:
        data_observation: shape of an observation, (4, 84, 84).
        data_actions: outputs that an action takes.
    """

    def __init__(self, data_observation: Sequence[int] = (4, 84, 84), data_actions: int = 6) -> None:
        super().__init__()
        if tuple(data_observation) != (4, 84, 84):
            raise UserError(f"model=policy_atari sees four frames of 84 × 84, not {tuple(data_observation)}")
        self.layers = nn.Sequential(
            nn.Conv2d(4, 16, 8, stride=4, padding=2),
            nn.BatchNorm2d(16, momentum=1.0),
            nn.ReLU(),
            nn.ZeroPad2d((1, 2, 1, 2)),
            nn.Conv2d(16, 32, 4, stride=2),
            nn.BatchNorm2d(32, momentum=1.0),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 11 * 11, 256),
            nn.BatchNorm1d(256, momentum=1.0),
            nn.ReLU(),
            nn.Linear(256, data_actions),
        )
        self.reference: Tensor | None = None

    def calibrate(self) -> None:
        """Set the normalisation's statistics for the current weights from the reference frames."""
        if self.reference is None:
            return
        with torch.no_grad():
            self.train()
            self(self.reference.to(next(self.parameters()).device))
            self.eval()

    @override
    def forward(self, observations: Tensor) -> Tensor:
        """Return action scores, (k, actions)."""
        scores: Tensor = self.layers(observations / 255.0)
        return scores
