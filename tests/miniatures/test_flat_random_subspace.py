"""Flat random subspace: an MLP trained in 200 of its dimensions (Li et al. 2018, arXiv 1804.08838)."""

from functools import partial

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.optim import Adam

from subspace_lab.optim import SubspaceOptimizer
from subspace_lab.subspaces import Random


def test_two_hundred_directions_learn_digits() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data / 16.0, dtype=torch.float32), torch.tensor(digits.target)
    model = nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 10))
    start = torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])
    optimizer = SubspaceOptimizer(
        [{"params": list(model.named_parameters()), "subspace": Random(200), "flat": True}],
        partial(Adam, lr=0.05),
        refresh_every=0,
    )
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[:1200]), y[:1200]).backward()
        optimizer.step()
    accuracy = (model(x[1200:]).argmax(1) == y[1200:]).float().mean()
    assert accuracy > 0.8
    moved = torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())]) - start
    P = optimizer.directions("flat.0")["basis"]
    assert P.shape == (3010, 200)
    assert (moved - P @ (P.T @ moved)).norm() <= 1e-5 * moved.norm()
    assert optimizer.state_dict()["state"]["flat.0"]["inner.exp_avg"].numel() == 200  # moments of size d
