"""DGP's second basis (Ru et al., arXiv 2402.11196, eqs. 8 to 12) for a bias-free ReLU MLP, with whole Jacobians.

Slow on purpose: ∂x^l/∂x of every example as a matrix, no shared code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


def jacobians(weights: list[Tensor], x: Tensor) -> list[list[Tensor]]:
    """For each layer, ∂x^l/∂x (d_l × d) of each example (n × d): the chain rule, layer by layer."""
    out: list[list[Tensor]] = [[] for _ in weights]
    for example in x.double():
        h, J = example, torch.eye(len(example), dtype=torch.float64)
        for layer, W in enumerate(weights):
            out[layer].append(J)
            z = W.double() @ h
            on = (z > 0).double()
            h, J = z * on, (on[:, None] * W.double()) @ J
    return out


def column_sums(weights: list[Tensor], x: Tensor) -> list[Tensor]:
    """For each layer, the Jacobians summed over the input's entries: (n × d_l)."""
    return [torch.stack([J.sum(dim=1) for J in layer]) for layer in jacobians(weights, x)]
