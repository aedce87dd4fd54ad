"""Which examples are held out, kept or relabelled: by integers alone, the same on every machine, in every run.

Nothing here depends on the run's seed: two runs that differ in it are judged by the same held-out examples.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from subspace_lab.linalg.random import derive_key, random_bits

Indices = npt.NDArray[np.int64]


def fixed_order(count: int, purpose: str) -> Indices:
    """A permutation of 0 … count-1, int64 (count,), that depends on its arguments only."""
    words = random_bits(derive_key("data/1", purpose), 0, count, "cpu")
    return torch.argsort(words, stable=True).numpy()


def fixed_integers(count: int, below: int, purpose: str) -> Indices:
    """Integers uniform in [0, below) (to within below/2^32), int64 (count,); entry i does not depend on `count`."""
    return (random_bits(derive_key("data/1", purpose), 0, count, "cpu") % below).numpy()


def stratified(labels: Indices, count: int, purpose: str) -> npt.NDArray[np.bool_]:
    """Mark exactly `count` of the examples, every class in proportion (to within one example).

    Args:
        labels: (n,) class of each example.
        count: how many to mark, 0 <= count <= n.
        purpose: of the choice; another one marks others.

    Returns:
        bool (n,).
    """
    n = len(labels)
    order = fixed_order(n, purpose)
    order = order[np.argsort(labels[order], kind="stable")]  # by class, at random within each
    steps = np.arange(n + 1, dtype=np.int64) * count // max(n, 1)
    marked = np.zeros(n, dtype=np.bool_)
    marked[order[np.diff(steps) > 0]] = True
    return marked
