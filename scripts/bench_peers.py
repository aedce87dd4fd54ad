"""The optimizers that `bench.py` compares, on one set of weights with given gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from subspace_lab.optim import SubspaceOptimizer
from subspace_lab.subspaces import SVD, Randomized

Named = list[tuple[str, nn.Parameter]]

SIZES = {  # hidden, intermediate, layers, rank (GaLore, arXiv 2403.03507, Table 2)
    "llama_60m": (512, 1376, 8, 128),
    "llama_1b": (2048, 5461, 24, 512),
}


def weights(size: str, device: str, gradients: dict[str, Tensor] | None = None) -> tuple[Named, Named]:
    """(projected, other) weights with gradients; recorded ones are repeated over the layers where given."""
    hidden, inter, layers, _ = SIZES[size]
    generator = torch.Generator().manual_seed(0)
    recorded: dict[tuple[int, ...], list[Tensor]] = {}
    for g in (gradients or {}).values():
        recorded.setdefault(tuple(g.shape), []).append(g)

    def make(name: str, *shape: int) -> tuple[str, nn.Parameter]:
        p = nn.Parameter((torch.randn(shape, generator=generator) * 0.02).to(device))
        pool = recorded.get(shape)
        if pool:
            pool.append(pool.pop(0))
            p.grad = pool[-1].to(device).clone()
        else:
            p.grad = (torch.randn(shape, generator=generator) * 1e-3).to(device)
        return name, p

    inside: Named = []
    other: Named = [make("embed", 32000, hidden), make("head", 32000, hidden), make("norm", hidden)]
    for layer in range(layers):
        inside += [make(f"{layer}.attn.{k}", hidden, hidden) for k in "qkvo"]
        inside += [make(f"{layer}.mlp.{k}", inter, hidden) for k in ("gate", "up")]
        inside += [make(f"{layer}.mlp.down", hidden, inter)]
        other += [make(f"{layer}.norm{k}", hidden) for k in (1, 2)]
    return inside, other


def ours(subspace: Any, rank: int) -> Callable[[Named, Named], Optimizer]:
    """Our optimizer with a given subspace."""

    def make(inside: Named, other: Named) -> Optimizer:
        groups = [{"params": inside, "subspace": subspace(rank)}, {"params": other}]
        return SubspaceOptimizer(groups, partial(AdamW, lr=1e-3, fused=True), refresh_every=200, scale=0.25)

    return make


def galore_torch(inside: Named, other: Named, rank: int) -> Optimizer:
    """The released optimizer; raises ImportError where it is not installed."""
    from galore_torch import GaLoreAdamW

    projected = {"rank": rank, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    groups = [{"params": [p for _, p in other]}, {"params": [p for _, p in inside], **projected}]
    return GaLoreAdamW(groups, lr=1e-3, no_deprecation_warning=True)


def adamw(inside: Named, other: Named, **how: bool) -> Optimizer:
    """The AdamW of torch on everything."""
    return AdamW([p for _, p in inside + other], lr=1e-3, **how)


def peers(size: str) -> dict[str, Callable[[Named, Named], Optimizer]]:
    """Name -> factory, the reference first; our exact SVD only where its refresh takes seconds, not minutes."""
    rank = SIZES[size][3]
    exact = {"ours, svd": ours(SVD, rank)} if size == "llama_60m" else {}
    return {
        "galore-torch": partial(galore_torch, rank=rank),
        "ours, randomized": ours(Randomized, rank),
        **exact,
        "ours, gram": ours(partial(SVD, solver="gram"), rank),
        "AdamW foreach": partial(adamw, foreach=True),
        "AdamW fused": partial(adamw, fused=True),
    }


def force_refresh(optimizer: Optimizer) -> None:
    """Make the next step a refresh, keeping bases and moments."""
    if isinstance(optimizer, SubspaceOptimizer):
        for stack in (s for unit in optimizer.units for s in unit.stacks):
            stack.t = 200 * (stack.t // 200 + 1)
    else:
        for state in optimizer.state.values():
            if "projector" in state:
                state["step"] = 200 * (state["step"] // 200 + 1)
