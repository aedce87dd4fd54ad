"""Weights drawn from integers: θ0 can be made again, bit for bit, on any machine from the run's seed alone.

torch's normal generator gives other numbers on other processors, so none is used: entry i of a weight is

    (h₀ + h₁ + h₂ + h₃ − 2(2¹⁶ − 1)) · c,    h the 16-bit halves of words 2i and 2i + 1 of its key's stream,

a sum of four uniform integers (bell-shaped, within ±3.46 standard deviations; exact in fp32) times one constant:
a single rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from subspace_lab.linalg.random import derive_key, random_bits

_HALVES = 4
_MEAN = _HALVES * (2**16 - 1) // 2
_STD = math.sqrt(_HALVES * (2.0**32 - 1) / 12)
_CHUNK = 1 << 20  # entries drawn at a time: 8 bytes for each word of each, several times over


def bell_(weight: Tensor, std: float, key: int) -> Tensor:
    """Fill `weight` with the numbers above, mean 0 and standard deviation `std`, and return it.

    Args:
        weight: any shape.
        std: their standard deviation.
        key: of its stream, see `linalg.random`.
    """
    with torch.no_grad():
        flat = torch.cat(
            [
                _bell(key, start, min(_CHUNK, weight.numel() - start), weight.device)
                for start in range(0, weight.numel(), _CHUNK)
            ]
        )
        # A tensor of the dtype first: a Python scalar would be rounded differently by some kernels.
        factor = torch.full((), std / _STD, dtype=torch.float32, device=weight.device)
        weight.copy_((flat * factor).view_as(weight))
    return weight


def he_normal_(weight: Tensor, key: int) -> Tensor:
    """Fill `weight` with mean 0 and variance 2 / fan_in (He et al. 2015), and return it.

    Args:
        weight: (out, in, …) of a linear or convolution layer; fan_in is the number of entries of weight[0].
        key: of its stream, see `linalg.random`.
    """
    return bell_(weight, math.sqrt(2 / weight[0].numel()), key)


def _bell(key: int, start: int, count: int, device: torch.device) -> Tensor:
    words = random_bits(key, 2 * start, 2 * count, device)
    halves = (words >> 16) + (words & 0xFFFF)
    return (halves.view(-1, 2).sum(1) - _MEAN).float()


def initialize_named(model: nn.Module, names: Iterable[str], std: float) -> None:
    """Draw the named matrices by `bell_`, each from the key of its own name; biases become zero, other vectors stay."""
    parameters = dict(model.named_parameters())
    for name in names:
        if name not in parameters:
            continue
        if parameters[name].dim() > 1:
            bell_(parameters[name], std, derive_key("init/1", torch.initial_seed(), name))
        elif name.endswith("bias"):
            nn.init.zeros_(parameters[name])


def initialize(model: nn.Module) -> None:
    """Draw all linear and convolution weights by `he_normal_`, set their biases to zero.

    The key of a weight is derived from torch's current seed (the run's, see `training.rng.seed`) and the layer's name.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            he_normal_(module.weight, derive_key("init/1", torch.initial_seed(), name))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
