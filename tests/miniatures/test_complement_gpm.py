"""Complement: gradient projection memory on two tasks, under AdamW with weight decay."""

from functools import partial

import torch
from torch import nn
from torch.optim import AdamW

from subspace_lab.optim import SubspaceOptimizer
from subspace_lab.subspaces import Complement


def test_second_task_is_learned_without_touching_the_first() -> None:
    torch.manual_seed(0)
    space, old = torch.linalg.qr(torch.randn(20, 20))[0], 6
    x1 = torch.randn(200, old) @ space[:, :old].T  # task 1 lives in a 6-dimensional input space
    x2 = torch.randn(200, 20)
    layer = nn.Linear(20, 8, bias=False)
    y1, y2 = x1 @ torch.randn(20, 8), x2 @ torch.randn(20, 8)

    def learn(optimizer: torch.optim.Optimizer, x: torch.Tensor, y: torch.Tensor) -> float:
        for _ in range(300):
            optimizer.zero_grad()
            loss = ((layer(x) - y) ** 2).mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    learn(AdamW(layer.parameters(), lr=0.05), x1, y1)
    first, W1 = layer(x1).detach(), layer.weight.detach().clone()
    M = torch.linalg.svd(x1, full_matrices=False).Vh[:old].T  # the inputs to protect
    inside = Complement({"weight": M})
    named = list(layer.named_parameters())
    protected = SubspaceOptimizer([{"params": named, "subspace": inside}], partial(AdamW, lr=0.05, weight_decay=0.1))
    start = ((layer(x2) - y2) ** 2).mean().item()
    assert learn(protected, x2, y2) < 0.7 * start
    D = layer.weight.detach() - W1
    assert (D @ M).norm() <= 1e-5 * D.norm()
    torch.testing.assert_close(layer(x1), first, atol=1e-3, rtol=1e-4)
    assert (layer(x2) - x2 @ W1.T).abs().max() > 0.1  # other inputs do change
