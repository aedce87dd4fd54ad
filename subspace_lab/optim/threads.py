"""Work on many matrices at once on a CPU: one matrix a thread, not one matrix in many threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

T = TypeVar("T")
R = TypeVar("R")


def in_parallel(work: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call `work` on every item in as many threads as torch uses, each call in a single one; results in order.

    LAPACK on the matrices of a training step loses more to its own threads' waiting than it gains from them, and
    torch releases the interpreter's lock inside every kernel.
    """
    threads = torch.get_num_threads()
    # Dispatch modes (fake tensors of a memory estimate, profilers) belong to a thread and would be left behind.
    if threads == 1 or len(items) <= 1 or is_in_torch_dispatch_mode():
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
