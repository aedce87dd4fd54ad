"""What methods share that train some layers and the current task's head, and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from subspace_lab.errors import UserError
from subspace_lab.methods.base import Named


def groups_with_head(
    model: nn.Module, chosen: Collection[str], head_lr: float | None, **own: Any
) -> list[dict[str, Any]]:
    """Two parameter groups: the chosen parameters with the options `own`, and all others that train.

    Args:
        model: with everything else frozen.
        chosen: names.
        head_lr: learning rate of the others; None: the optimizer's.
        own: options of the first group.
    """
    inside: Named = []
    outside: Named = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (inside if name in chosen else outside).append((name, p))
    groups: list[dict[str, Any]] = [{"params": inside, "kind": "matrix", **own}]
    if outside:
        groups.append({"params": outside, "kind": "other"} | ({} if head_lr is None else {"lr": head_lr}))
    return groups


def check_share(value: float, option: str) -> None:
    """Refuse what is not a share in (0, 1].

    Raises:
        UserError: it is not.
    """
    if not 0 < value <= 1:
        raise UserError(f"method.{option} must be in (0, 1], not {value}")


def check_positive(value: float, option: str) -> None:
    """Refuse a value that is not positive.

    Raises:
        UserError: it is not.
    """
    if value <= 0:
        raise UserError(f"method.{option} must be positive, not {value}")
