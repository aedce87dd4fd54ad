"""Federated averaging and federated orthogonal training as the paper writes them, in float64, one client at a time.

FOT: arXiv 2309.01289; FedAvg: arXiv 1602.05629, algorithm 1.  Layers without biases, plain SGD on batches that are
given, sketches with random matrices that are given.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Layers = list[Tensor]  # W_1 (h, d), W_2, …
Batches = Sequence[tuple[Tensor, Tensor]]


def forward(W: Layers, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Logits, and the inputs of every layer."""
    inputs = []
    for number, layer in enumerate(W):
        inputs.append(x)
        x = x @ layer.T
        if number < len(W) - 1:
            x = torch.relu(x)
    return x, inputs


def local_training(W: Layers, batches: Batches, lr: float) -> Layers:
    """One client: SGD from W on its batches."""
    own = [layer.clone() for layer in W]
    for x, y in batches:
        leaves = [layer.clone().requires_grad_() for layer in own]
        logits, _ = forward(leaves, x)
        loss = torch.nn.functional.cross_entropy(logits, y)
        own = [layer - lr * g for layer, g in zip(own, torch.autograd.grad(loss, leaves), strict=True)]
    return own


def aggregate(W: Layers, clients: Sequence[Layers], bases: list[Tensor | None]) -> Layers:
    """The server's round: W + ΔW − ΔW U Uᵀ with ΔW the mean of the clients' W_c − W."""
    new = []
    for number, layer in enumerate(W):
        delta = sum((client[number] - layer for client in clients), torch.zeros_like(layer)) / len(clients)
        U = bases[number]
        if U is not None:
            delta = delta - delta @ U @ U.T
        new.append(layer + delta)
    return new


def extend(
    W: Layers,
    data: Sequence[Tensor],
    bases: list[Tensor | None],
    threshold: float,
    random: Callable[[int, int, int], Tensor],
) -> list[Tensor | None]:
    """After a task: sketches of every client's residual inputs, their sum's singular vectors.

    Args:
        W: the global model.
        data: inputs of each client, rows.
        bases: U of each layer.
        threshold: ε.
        random: (client, layer, rows) -> G_c (rows, s).
    """
    found: list[Tensor | None] = []
    for number in range(len(W)):
        U, Y, whole, rest = bases[number], None, 0.0, 0.0
        for client, x in enumerate(data):
            A = forward(W, x)[1][number].T
            R = A if U is None else A - U @ U.T @ A
            sketch = R @ random(client, number, A.shape[1])
            Y = sketch if Y is None else Y + sketch
            whole += float(A.square().sum())
            rest += float(R.square().sum())
        rho = rest / whole
        needed = (rho - (1 - threshold)) / rho
        left, s, _ = torch.linalg.svd(Y)
        k, total = 0, float(s.square().sum())
        while k < len(s) and float(s[:k].square().sum()) / total < needed:
            k += 1
        new = left[:, :k]
        together = new if U is None else torch.cat([U, new], dim=1)
        found.append(torch.linalg.qr(together)[0])
    return found
