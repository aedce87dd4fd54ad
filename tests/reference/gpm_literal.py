"""GPM and SGP as the papers write them: representation matrices, full SVDs, explicit projection matrices, in float64.

GPM: arXiv 2103.09762, eqs. 5 to 9 and algorithm 1; SGP: arXiv 2302.01386, eqs. 1 to 7.  Linear layers without biases,
plain SGD.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Memory(NamedTuple):
    """One layer's M (d, k) and importances (k,)."""

    M: Tensor
    importance: Tensor


def update(R: Tensor, memory: Memory | None, threshold: float, alpha: float) -> Memory:
    """After a task, from R (d, n), inputs as columns."""
    U, s, _ = torch.linalg.svd(R, full_matrices=False)
    total = s.square().sum()
    if memory is None:
        k = 0
        while k < len(s) and s[: k + 1].square().sum() / total < threshold:
            k += 1
        kept = s[:k]
        return Memory(U[:, :k], (alpha + 1) * kept / (alpha * kept + (kept.max() if k else 1)))
    M = memory.M
    inside = M @ M.T @ R
    Uc, sc, _ = torch.linalg.svd(inside, full_matrices=False)
    old = M.shape[1]
    on_old = ((M.T @ Uc[:, :old]).square() @ sc[:old].square()).sqrt()
    Ur, sr, _ = torch.linalg.svd(R - inside, full_matrices=False)
    energy, k = 1 - sr.square().sum() / total, 0
    while k < len(sr) and energy < threshold:
        energy = energy + sr[k].square() / total
        k += 1
    strength = torch.cat([on_old, sr[:k]])
    importance = (alpha + 1) * strength / (alpha * strength + strength.max())
    importance[:old] = (importance[:old] + memory.importance).clamp(0, 1)
    d = M.shape[0]
    return Memory(torch.cat([M, Ur[:, :k]], dim=1)[:, :d], importance[:d])


def step(W: Tensor, gradient: Tensor, memory: Memory | None, lr: float, scaled: bool) -> Tensor:
    """One step of SGD."""
    if memory is not None:
        weights = memory.importance if scaled else torch.ones_like(memory.importance)
        gradient = gradient - gradient @ (memory.M @ torch.diag(weights) @ memory.M.T)
    return W - lr * gradient
