"""What the subspace optimizer must know about the optimizer it drives."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from torch.optim import Optimizer

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]

# Optimizers whose rule for one entry never looks at another entry: many matrices may share one stacked tensor.
_ELEMENTWISE = frozenset(
    [
        "Adam",
        "AdamW",
        "SGD",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Adagrad",
        "Adamax",
        "Adadelta",
        "Rprop",
        "ASGD",
        "Lion",
    ]
)
# Optimizers that add weight_decay * W to the gradient (L2) rather than shrink W beside it.
_COUPLED_DECAY = frozenset(
    [
        "SGD",
        "Adam",
        "NAdam",
        "RAdam",
        "RMSprop",
        "Adagrad",
        "Adamax",
        "Adadelta",
        "ASGD",
        "Adam8bit",
        "Adam4bit",
        "AdamFp8",
    ]
)
# Optimizers whose step depends on the size of the weight: their coordinates start at the weight's, not at zero.
_READS_WEIGHT = frozenset(["Adafactor", "Lamb", "LAMB", "Lars", "LARS"])
# Optimizers whose step is a linear function of all gradients so far.
_LINEAR = frozenset(["SGD"])
# State tensors that are linear in the gradient, and those that are squares of it.
FIRST_MOMENTS = ("exp_avg", "momentum_buffer")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq")


def _class_name(factory: OptimizerFactory) -> str:
    while isinstance(factory, functools.partial):
        factory = factory.func
    return getattr(factory, "__name__", type(factory).__name__)


def is_elementwise(factory: OptimizerFactory) -> bool:
    """Whether matrices can be stacked into one parameter without changing the result."""
    return _class_name(factory) in _ELEMENTWISE


def couples_decay(factory: OptimizerFactory, group: dict[str, Any]) -> bool:
    """Whether `weight_decay` is L2 regularisation of the gradient in this optimizer."""
    return _class_name(factory) in _COUPLED_DECAY and not group.get("decoupled_weight_decay", False)


def reads_weight(factory: OptimizerFactory) -> bool:
    """Whether the size of a step depends on the weight itself (Adafactor's relative step, LAMB)."""
    return _class_name(factory) in _READS_WEIGHT


def is_linear(factory: OptimizerFactory) -> bool:
    """Whether steps are sums of gradients: a constraint that all gradients obey holds for them too."""
    return _class_name(factory) in _LINEAR
