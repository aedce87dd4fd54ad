"""Energy thresholds: one for each group of layers, rising from task to task."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from subspace_lab.errors import UserError

Schedule = float | Sequence[float]
Spec = Schedule | Mapping[str, Schedule]


class Thresholds:
    """ε of a layer after a task: ``start + step · index``, at most 1.

    Args:
        spec: a number; ``[start, step]``; or regular expressions on layers' paths with either, of which the first that
            is found in a path counts.
        option: what the user calls it, for messages.

    Raises:
        UserError: a number outside [0, 1], a schedule of other than two numbers, a broken expression.
    """

    def __init__(self, spec: Spec, option: str = "method.threshold") -> None:
        self.option = option
        table = spec if isinstance(spec, Mapping) else {"": spec}
        self.rules: list[tuple[str, float, float]] = []
        for pattern, schedule in ((str(pattern), schedule) for pattern, schedule in table.items()):
            start, step = self._schedule(schedule)
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{option}: {pattern!r} is no regular expression: {error}") from error
            self.rules.append((pattern, start, step))

    def _schedule(self, schedule: Schedule) -> tuple[float, float]:
        numbers = [schedule] if isinstance(schedule, int | float) else list(schedule)
        if len(numbers) not in (1, 2) or not all(isinstance(n, int | float) for n in numbers):
            raise UserError(f"{self.option}={schedule}: expected a number or [start, step]")
        start, step = float(numbers[0]), float(numbers[1]) if len(numbers) == 2 else 0.0
        if not 0 <= start <= 1 or not -1 <= step <= 1:
            raise UserError(f"{self.option}={schedule}: expected shares of energy between 0 and 1")
        return start, step

    def at(self, path: str, index: int) -> float:
        """ε for layer `path` at the end of task `index` (from 0).

        Raises:
            UserError: no rule for this layer.
        """
        for pattern, start, step in self.rules:
            if re.search(pattern, path):
                return min(1.0, max(0.0, start + step * index))
        raise UserError(
            f"{self.option} says nothing of layer {path}", hint="a last rule '.' with a number counts for all others"
        )
