"""One linear head per task: the outputs of a sequence of tasks, side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg import derive_key
from subspace_lab.models.heads import find_head, replace_head
from subspace_lab.models.initialization import bell_


class TaskHeads(nn.Module):
    """Linear heads on the same features; only those of the active tasks are computed.

    Separate parameters, not rows of one: weight decay and momentum then leave the heads of other tasks alone.

    Args:
        in_features: n.
        sizes: outputs of each task.
        bias: whether heads have one.

    Attributes:
        active: tasks whose logits `forward` returns, side by side.
    """

    def __init__(self, in_features: int, sizes: Sequence[int], bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.sizes = in_features, tuple(sizes)
        self.heads = nn.ModuleList(nn.Linear(in_features, size, bias=bias) for size in sizes)
        for index, head in enumerate(self.heads):
            assert isinstance(head, nn.Linear)
            bell_(head.weight, 1 / math.sqrt(in_features), derive_key("task_heads/1", torch.initial_seed(), index))
            if bias:
                nn.init.zeros_(head.bias)
        self.active = range(len(self.sizes))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Logits (…, outputs of the active tasks) of features x (…, n)."""
        heads: list[Any] = [self.heads[index] for index in self.active]
        if len(heads) == 1:
            logits: Tensor = heads[0](x)
            return logits
        weight = torch.cat([head.weight for head in heads])
        bias = torch.cat([head.bias for head in heads]) if heads[0].bias is not None else None
        return functional.linear(x, weight, bias)

    def train_only(self, tasks: range) -> None:
        """Let only the heads of these tasks have gradients."""
        for index, head in enumerate(self.heads):
            head.requires_grad_(index in tasks)


def with_task_heads(model: nn.Module, sizes: Sequence[int]) -> nn.Module:
    """Put `TaskHeads` in the place of a classifier's last linear layer; returns the model.

    Raises:
        UserError: the head is not linear.
    """
    path, layer = find_head(model)
    if not isinstance(layer, nn.Linear):
        raise UserError(f"the head {path} of this model is a {type(layer).__name__}; tasks need a linear one")
    return replace_head(model, path, TaskHeads(layer.in_features, sizes, layer.bias is not None))


def find_task_heads(model: nn.Module) -> TaskHeads | None:
    """Return the model's `TaskHeads`, None where all tasks share one head."""
    return next((module for module in model.modules() if isinstance(module, TaskHeads)), None)
