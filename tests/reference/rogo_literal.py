"""ROGO's search for the relaxing space (Yang et al., AI Open 2023, arXiv 2301.12131), one direction at a time.

Slow on purpose: a singular value decomposition and a QR per direction, no shared code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def relaxing_space(frozen: Tensor, gradient: Tensor, energy: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Frozen space (d × k) and gradient (out × d), float64 -> relaxing space S (d × n) and what stays frozen."""
    U, s, _ = torch.linalg.svd(gradient.T, full_matrices=False)
    r = 1
    while float((s[:r] ** 2).sum() / (s**2).sum()) < energy:
        r += 1
    U = U[:, :r]
    moved: list[Tensor] = []
    while frozen.shape[1]:
        x = torch.linalg.svd(U.T @ frozen, full_matrices=True)[2][0]  # the best aligned direction of the frozen space
        u = frozen @ x
        u = u / u.norm()
        if float((U @ (U.T @ u)).norm() / u.norm()) < gamma:
            break
        moved.append(u)
        # Orthonormal basis of the frozen space without u.
        rest = frozen - u[:, None] @ (u[None, :] @ frozen)
        V, values, _ = torch.linalg.svd(rest, full_matrices=False)
        frozen = V[:, values > 1e-8]
    S = torch.stack(moved, dim=1) if moved else frozen.new_zeros(frozen.shape[0], 0)
    return S, frozen


def effective_weight(W: Tensor, S: Tensor, Q: Tensor) -> Tensor:
    """W with its part in span S replaced by the scaled one."""
    return W @ S @ Q @ S.T + W - W @ S @ S.T


def gpm_space(inputs: Tensor, M: Tensor | None, threshold: float) -> Tensor:
    """GPM's memory after inputs (n × d): strictly below the threshold at first, reaching it later."""
    R = inputs.T
    total = float((R**2).sum())
    if M is None:
        U, s, _ = torch.linalg.svd(R, full_matrices=False)
        return U[:, : int(((s**2).cumsum(0) / total < threshold).sum())]
    U, s, _ = torch.linalg.svd(R - M @ (M.T @ R), full_matrices=False)
    captured, r = (total - float((s**2).sum())) / total, 0
    while captured < threshold:
        captured += float(s[r] ** 2) / total
        r += 1
    return torch.cat([M, U[:, :r]], dim=1)
