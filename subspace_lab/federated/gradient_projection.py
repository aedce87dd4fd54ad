"""Federated gradient projection and federated domain adaptation: sources help a target client with little data.

Jiang, Zhang & Koyejo, "Principled Federated Domain Adaptation: Gradient Projection and Auto-Weighting", ICLR 2024,
arXiv 2302.05049; released code jackyzyb/AutoFedGP.  For each parameter tensor, with g_T the target's part of its
update, g_i a source's and p_i its share of the sources' weight:

    FedGP    g = Σ_i p_i [(1 − β_i) g_T + β_i max(⟨g_T, g_i⟩, 0) g_i / |g_i|²]
    FedDA    g = Σ_i p_i [(1 − β_i) g_T + β_i g_i]

    β_i = β, or from the N updates u_j of the target's single steps, u their mean, s_i a source's mean update in a step,
    all parameters together:
    V = Σ_j |u_j − u|² / (N − 1),  σ² = V / N                       variance of the target's mean
    d_i² = max(Σ_j |u_j − s_i|² / N − V, 0)                         squared distance of source and target, unbiased
    P_i² = max(Σ_j |P u_j|² / N − Σ_j |P (u_j − u)|² / (N − 1), 0)  the same of what P = I − s_i s_iᵀ / |s_i|² leaves
    FedGP    β_i = σ² / (σ² + P_i²)
    FedDA    β_i = σ² / (σ² + d_i²)

==========  ==================================================================================
symbol      here
==========  ==================================================================================
g_T, g_i    rows ``target`` and all others of ``updates`` (p, n)
p_i         ``weights``, renormalised without the target
β           ``beta``: (p − 1,), in the order of the sources
u_j         ``single`` (N, n)
s_i         rows of ``sources`` (p − 1, n): updates divided by their number of steps
==========  ==================================================================================

``variant="release"`` does what the released training script does in place of the projection and of its β:

    FedGP    max(cos(g_T, g_i), 0) c_i g_i,  c_i = η_T K_T / (η_i K_i), K steps: here c_i = K_T / K_i, all have one η
             β_i = σ² / (σ² + δ_i P_i² + (1 − δ_i) |u|²),  δ_i = 1 − (share of ⟨u_j, s_i⟩ ≤ 0) / N

which agrees with the projection where c_i g_i is as long as g_T.  (With more than one local epoch the release averages
the N updates over epochs first; here each step counts.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from subspace_lab.federated.robust import gram

Rule = Literal["projection", "convex"]
Variant = Literal["paper", "release"]


def adapt(
    updates: Tensor,
    target: int,
    weights: Tensor,
    parts: Sequence[slice],
    beta: Tensor,
    *,
    rule: Rule = "projection",
    variant: Variant = "paper",
    steps: Sequence[int] | None = None,
) -> Tensor:
    """One update for the target.

    Args:
        updates: (p, n).
        target: its row.
        weights: (p,), not negative; only the sources' relation counts.
        parts: where each parameter tensor lies in a row.
        beta: β of each source (p − 1,).
        rule: projection: FedGP; convex: FedDA.
        variant: of the projection.
        steps: optimizer steps of each row, which `variant="release"` needs.

    Returns:
        (n,); 0 where no part lies.
    """
    p = len(updates)
    sources = [row for row in range(p) if row != target]
    share = weights.to(updates.device, torch.float64)[sources]
    share = share / share.sum()
    of_sources = share * beta.to(share)
    coefficients = updates.new_zeros(p, dtype=torch.float64)
    coefficients[target] = 1 - of_sources.sum()
    if variant == "release" and steps is not None:
        ratio = torch.tensor([steps[target] / steps[row] for row in sources]).to(share)
    else:
        ratio = torch.ones_like(share)
    out = torch.zeros_like(updates[target])
    for part in parts:
        block = updates[:, part]
        factor = torch.ones_like(share)
        if rule == "projection":
            inner = (block @ block[target]).double()
            squares = block.square().sum(dim=1).double()
            along = inner[sources].clamp_min(0)
            if variant == "release":
                lengths = (squares[sources] * squares[target]).sqrt()
                factor = torch.where(lengths > 0, along / lengths, 0.0) * ratio
            else:
                factor = torch.where(squares[sources] > 0, along / squares[sources], 0.0)
        coefficients[sources] = of_sources * factor
        out[part] = coefficients.to(block.dtype) @ block
    return out


def auto_beta(single: Tensor, sources: Tensor, *, rule: Rule = "projection", variant: Variant = "paper") -> Tensor:
    """β of each source, from how much the target's own steps disagree.

    Args:
        single: u_j (N, n), N ≥ 2.
        sources: s_i (k, n).
        rule: as in `adapt`.
        variant: as in `adapt`.

    Returns:
        (k,) float64 in [0, 1]; 0 where the target's steps agree in everything.

    Raises:
        ValueError: fewer than two steps, which have no variance.
    """
    N = len(single)
    if N < 2:
        raise ValueError(f"{N} steps of the target: at least 2 are needed for their variance")
    G = gram(torch.cat([single, sources]))
    own, inner, squares = G[:N, :N], G[:N, N:], G.diagonal()[N:]
    length, mean = own.trace() / N, own.mean()  # Σ |u_j|² / N and |u|²
    V = (length - mean) * N / (N - 1)
    if rule == "convex":
        distance = (length - 2 * inner.mean(dim=0) + squares - V).clamp_min(0)
    else:
        inverse = torch.where(squares > 0, 1 / squares, 0.0)
        left = length - inner.square().mean(dim=0) * inverse
        left_of_mean = mean - inner.mean(dim=0).square() * inverse
        distance = (left - (left - left_of_mean) * N / (N - 1)).clamp_min(0)
        if variant == "release":
            delta = 1 - (inner <= 0).double().mean(dim=0) / N
            distance = delta * distance + (1 - delta) * mean
    variance = V.clamp_min(0) / N
    total = variance + distance
    return torch.where(total > 0, variance / total, 0.0)
