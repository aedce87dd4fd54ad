"""Span: GaLore in a page, on the public pieces."""

from functools import partial

import torch
from torch import nn
from torch.optim import AdamW

from subspace_lab.optim import SubspaceOptimizer
from subspace_lab.subspaces import SVD


def test_galore_learns_and_its_updates_have_rank_r() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
    x, rank = torch.randn(128, 16), 4
    y = x @ torch.randn(16, 16) / 4
    matrices = [(n, p) for n, p in model.named_parameters() if p.ndim == 2]
    rest = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    optimizer = SubspaceOptimizer(
        [{"params": matrices, "subspace": SVD(rank)}, {"params": rest}],
        partial(AdamW, lr=0.02),
        refresh_every=20,
    )
    losses = []
    for _ in range(100):
        before = [p.detach().clone() for _, p in matrices]
        optimizer.zero_grad()
        loss = ((model(x) - y) ** 2).mean()
        loss.backward()
        optimizer.param_groups[0]["weight_decay"] = 0.0  # decay acts on the full weight, outside the span
        optimizer.step()
        losses.append(loss.item())
        for old, (_, p) in zip(before, matrices, strict=True):
            s = torch.linalg.svdvals((p.detach() - old).double())
            assert s[rank] < 1e-4 * s[0]
    assert losses[-1] < 0.1 * losses[0]
