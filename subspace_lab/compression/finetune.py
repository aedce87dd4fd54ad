"""Quantisation-aware training: after it, a coarse grid loses little of what a fine one had.

The forward pass sees z on its levels, the gradient passes the rounding unchanged (straight-through estimator: Bengio,
Léonard & Courville 2013, arXiv 1308.3432) to a real-valued copy, which Adam moves. Rare levels cost more bits: under a
Gaussian code a number v costs v² / (2 s² ln 2) more than 0, and that, weighed against the loss, is an L2 penalty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import islice

import torch
from torch import Tensor

from subspace_lab.compression.quantize import Levels
from subspace_lab.subspaces.flat import FlatModel
from subspace_lab.training.tasks import Task


def finetune(
    model: FlatModel,
    levels: Levels,
    task: Task,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    steps: int,
    lr: float,
    rate: float = 0.0,
) -> None:
    """Train z, from where the model stands, so that it is good on a uniform grid, and leave the model there.

    The scales (SAID) stay as they are; buffers follow.

    Args:
        model: on its device.
        levels: the grid.
        task: gives the loss of a batch.
        batches: at least `steps` of them.
        steps: optimizer steps.
        lr: Adam's learning rate of z in units of the grid's step; falls to 0 along a cosine.
        rate: weight of the code's length per training step: `rate` · Σ z² / (2 s²), s the standard deviation of z.
    """
    device, dtype = model.z.device, model.z.dtype
    grid = torch.from_numpy(levels.values().copy()).to(device, dtype)
    latent = torch.nn.Parameter(model.z.detach().clone())
    optimizer = torch.optim.Adam([latent], lr=lr * levels.step)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    model.train()
    for batch in islice(batches, steps):
        _round_into(model.z, latent, grid, levels.step)
        loss = task.loss(model, {name: tensor.to(device) for name, tensor in batch.items()})
        (latent.grad,) = torch.autograd.grad(loss, model.z)
        latent.grad += rate * latent.detach() / latent.detach().square().mean().clamp_min(1e-30)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            latent.clamp_(grid[0], grid[-1])
    _round_into(model.z, latent, grid, levels.step)
    model.eval()


@torch.no_grad()
def _round_into(z: Tensor, latent: Tensor, grid: Tensor, step: float) -> None:
    nearest = ((latent - grid[0]) / step).round_().clamp_(0, len(grid) - 1).long()
    z.copy_(grid[nearest])
