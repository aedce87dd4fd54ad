"""Tangent space and retraction: principal components by momentum SGD on the Grassmannian."""

from functools import partial

import torch
from torch import nn
from torch.optim import SGD

from subspace_lab.manifolds import Grassmann
from subspace_lab.optim import SubspaceOptimizer
from subspace_lab.subspaces import Tangent


def test_weight_stays_on_the_grassmannian_and_finds_the_leading_subspace() -> None:
    torch.manual_seed(0)
    n, k = 20, 3
    x = torch.randn(500, n) * torch.logspace(0.5, -0.5, n)
    C = x.T @ x / len(x)
    S = nn.Parameter(torch.linalg.qr(torch.randn(n, k))[0])
    optimizer = SubspaceOptimizer(
        [{"params": [("S", S)], "subspace": Tangent(Grassmann())}],
        partial(SGD, lr=0.02, momentum=0.9, weight_decay=1e-3),
    )
    for _ in range(300):
        optimizer.zero_grad()
        before = S.detach().clone()
        (-(S.T @ C @ S).trace()).backward()
        optimizer.step()
        assert (S.T @ S - torch.eye(k)).abs().max() <= 5e-6
    top = torch.linalg.eigh(C).eigenvectors[:, -k:]
    assert torch.linalg.svdvals(top.T @ S.detach()).min() > 0.999
    assert (S - before).norm() < 1e-3  # it has settled
