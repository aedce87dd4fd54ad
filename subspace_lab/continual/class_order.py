"""In which order classes come and how many each task has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from subspace_lab.data.splits import Indices, fixed_order
from subspace_lab.errors import UserError

ClassOrder = Literal["fixed", "shuffled", "pilot"]
_PILOT = 1993


def class_order(policy: ClassOrder, classes: int, seed: int) -> Indices:
    """Return the classes in the order of their tasks, int64 (classes,).

    Args:
        policy: fixed: 0, 1, 2, …; shuffled: by the seed; pilot: numpy's RandomState(1993), whatever the seed (Rebuffi
            et al., iCaRL, CVPR 2017, and PILOT after it).
        classes: how many.
        seed: of the shuffling.

    Raises:
        UserError: no such policy.
    """
    if policy == "fixed":
        return np.arange(classes, dtype=np.int64)
    if policy == "shuffled":
        return fixed_order(classes, f"class order/{seed}")
    if policy == "pilot":
        return np.random.RandomState(_PILOT).permutation(classes).astype(np.int64)
    raise UserError(f"scenario.class_order={policy}: no such order", hint="fixed, shuffled or pilot")


def task_sizes(dataset: str, classes: int, tasks: int, sizes: Sequence[int] | None) -> list[int]:
    """Return how many classes each task has.

    Args:
        dataset: for messages.
        classes: how many there are.
        tasks: how many tasks of one size; not asked where `sizes` says more.
        sizes: of each task.

    Raises:
        UserError: tasks that do not divide the classes, sizes that do not sum to them.
    """
    if sizes is not None:
        if not sizes or min(sizes) < 1 or sum(sizes) != classes:
            raise UserError(
                f"scenario.sizes={list(sizes)} sum to {sum(sizes)}: {dataset} has {classes} classes, at least 1 a task",
                hint="null divides them into scenario.tasks equal parts",
            )
        return list(sizes)
    fitting = [number for number in range(1, classes + 1) if classes % number == 0]
    if tasks not in fitting:
        near = min(fitting, key=lambda number: (abs(number - tasks), number))
        what = "has only" if tasks > classes else "cannot be divided so, it has"
        raise UserError(
            f"scenario.tasks={tasks}: {dataset} {what} {classes} classes",
            hint=f"scenario.tasks={near}, or scenario.sizes=[…] with the classes of each task",
        )
    return [classes // tasks] * tasks
