"""The learning-rate schedule of CoSO's and InfLoRA's released code."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from subspace_lab.errors import UserError


def quarter_cosine(optimizer: Optimizer, total_steps: int, *, stairs: int | None = None) -> LambdaLR:
    """Learning rate times cos(99 π e / (200 (E − 1))) in epoch e = 0 … E − 1: from 1 down to 0.0079.

    Args:
        optimizer: whose groups are scheduled, each from its own learning rate.
        total_steps: of the task.
        stairs: E; None: every step is its own epoch.

    Raises:
        UserError: fewer than one stair.
    """
    if stairs is not None and stairs < 1:
        raise UserError(f"scheduler.stairs must be at least 1 or null, not {stairs}")
    count = total_steps if stairs is None else stairs

    def factor(step: int) -> float:
        epoch = min(count - 1, step * count // max(1, total_steps))
        return math.cos(99 * math.pi * epoch / (200 * (count - 1))) if count > 1 else 1.0

    return LambdaLR(optimizer, factor)
