"""Work on many matrices at once on a CPU: one matrix a thread, not one matrix in many threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call `work` on every item in as many threads as torch uses, each call in a single one; results in order.

    LAPACK on the matrices of a training step loses more to its own threads' waiting than it gains from them, and
    torch releases the interpreter's lock inside every kernel.
    """
    threads = torch.get_num_threads()
    if threads == 1 or len(items) == 1:
        return [work(item) for item in items]

    def quiet(item: T) -> R:
        with torch.no_grad():  # grad mode belongs to a thread
            return work(item)

    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(min(threads, len(items))) as pool:
            return list(pool.map(quiet, items))
    finally:
        torch.set_num_threads(threads)
