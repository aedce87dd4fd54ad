"""Learning-rate schedules, one factor per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from subspace_lab.errors import UserError


def _warmup_steps(warmup_steps: int | None, warmup_ratio: float, total_steps: int) -> int:
    if not 0 <= warmup_ratio < 1:
        raise UserError(f"scheduler.warmup_ratio must be in [0, 1), not {warmup_ratio}")
    if warmup_steps is not None and warmup_steps < 0:
        raise UserError(f"scheduler.warmup_steps must be 0 or more, not {warmup_steps}")
    return round(warmup_ratio * total_steps) if warmup_steps is None else warmup_steps


def cosine_warmup(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.1,
    min_ratio: float = 0.1,
) -> LambdaLR:
    """Linear warm-up from 0, then half a cosine down to ``min_ratio`` of the learning rate.

    The schedule of the GaLore training script: 10 % warm-up, 10 % floor; its first update has learning rate 0.
    """
    warmup = _warmup_steps(warmup_steps, warmup_ratio, total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return min_ratio + (1 - min_ratio) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)


def linear(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup_steps: int | None = None,
    warmup_ratio: float = 0.1,
    min_ratio: float = 0.0,
) -> LambdaLR:
    """Linear warm-up from 0, then linear decay to ``min_ratio`` of the learning rate."""
    warmup = _warmup_steps(warmup_steps, warmup_ratio, total_steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / max(1, warmup)
        return max(min_ratio, 1 - (1 - min_ratio) * (step - warmup) / max(1, total_steps - warmup))

    return LambdaLR(optimizer, factor)


def constant(optimizer: Optimizer, total_steps: int, *, warmup_steps: int = 0) -> LambdaLR:
    """A constant learning rate, after an optional linear warm-up."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / (warmup_steps + 1)))


def steps(
    optimizer: Optimizer, total_steps: int, *, milestones: Sequence[float] = (0.3, 0.6, 0.9), factor: float = 0.1
) -> LambdaLR:
    """Multiply the learning rate by ``factor`` at each milestone, a share of the run in (0, 1)."""
    if not all(0 < share < 1 for share in milestones):
        raise UserError(f"scheduler.milestones={list(milestones)}: expected shares of the run between 0 and 1")
    at = [round(share * total_steps) for share in milestones]
    return LambdaLR(optimizer, lambda step: factor ** sum(step >= place for place in at))
