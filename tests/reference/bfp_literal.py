"""Replay and backward feature projection written out example by example.

Slow on purpose: lists instead of tensors, one forward pass per example, no shared code with the package. The network
is given as two functions, features h and logits f over all outputs; chance as two functions of counters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Function = Callable[[Tensor], Tensor]


class ListReservoir:
    """Algorithm R: `word(m)` in [0, 2^32) decides about example m, `order(draw, n)` is a permutation of n places."""

    def __init__(self, size: int, word: Callable[[int], int], order: Callable[[int, int], list[int]]) -> None:
        self.size, self.word, self.order = size, word, order
        self.rows: list[Any] = []
        self.seen = self.draws = 0

    def add(self, row: Any) -> None:
        if self.seen < self.size:
            self.rows.append(row)
        else:
            r = self.word(self.seen) * (self.seen + 1) // 2**32  # uniform in 0 … seen
            if r < self.size:
                self.rows[r] = row
        self.seen += 1

    def draw(self, count: int) -> list[Any]:
        places = self.order(self.draws, len(self.rows))[:count]
        self.draws += 1
        return [self.rows[p] for p in places]


def cross_entropy(logits: Tensor, label: int, classes: int) -> Tensor:
    """−log softmax over the first `classes` outputs."""
    seen = logits[:classes]
    return torch.log(torch.exp(seen).sum()) - seen[label]


def loss(
    batch: list[tuple[Tensor, int]],
    memory: ListReservoir,
    count: int,
    h: Function,
    f: Function,
    old: tuple[Function, Function] | None,
    classes: int,
    alpha: float,
    beta: float,
    gamma: float,
    A: Tensor | None = None,
    b: Tensor | None = None,
    stored: bool = False,
) -> Tensor:
    """L of one batch; rows of the memory are (x, label, logits)."""
    total = sum(cross_entropy(f(x), y, classes) for x, y in batch) / len(batch)
    if memory.rows and alpha:
        rows = memory.draw(count)
        outputs = len(rows[0][2])
        error = torch.zeros((), dtype=torch.float64)
        for x, _, z in rows:
            target = z if old is None or stored else old[1](x)
            for c in range(outputs):
                error = error + (f(x)[c] - target[c]) ** 2
        total = total + alpha * error / (len(rows) * outputs)
    if memory.rows and beta:
        rows = memory.draw(count)
        total = total + beta * sum(cross_entropy(f(x), y, classes) for x, y, _ in rows) / len(rows)
    if memory.rows and gamma and old is not None:
        inputs = [x for x, _ in batch] + [x for x, _, _ in memory.draw(count)]
        distance = torch.zeros((), dtype=torch.float64)
        for x in inputs:
            new = h(x) if A is None else A @ h(x) + b
            distance = distance + torch.linalg.vector_norm(new - old[0](x))
        total = total + gamma * distance / len(inputs) / len(h(inputs[0])) ** 0.5
    assert isinstance(total, Tensor)
    return total
