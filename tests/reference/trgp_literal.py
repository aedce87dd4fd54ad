"""TRGP (Lin, Yang, Fan & Zhang, ICLR 2022, arXiv 2202.02931) for one bias-free ReLU MLP, written out with full SVDs.

Slow on purpose: activations are kept, every projector is a full matrix, no shared code with the package.
"""

from __future__ import annotations

import torch
from torch import Tensor


class TrgpMlp:
    """Weights W_l (out × in) of a ReLU MLP in float64, trained by plain gradient descent."""

    def __init__(self, weights: list[Tensor], threshold: float, trust: float, top: int = 2) -> None:
        self.W = [w.double().clone() for w in weights]
        self.threshold, self.trust, self.top = threshold, trust, top
        self.M: list[Tensor] = [w.new_zeros(w.shape[1], 0).double() for w in weights]  # of all tasks
        self.S: list[list[Tensor]] = []  # of each task, each layer
        self.chosen: list[list[list[int]]] = []  # for each task, each layer: the old tasks it trusts
        self.Q: list[list[list[Tensor]]] = []

    def effective(self, task: int) -> list[Tensor]:
        out = []
        for layer, W in enumerate(self.W):
            A = torch.eye(W.shape[1], dtype=torch.float64)
            for j, Q in zip(self.chosen[task][layer], self.Q[task][layer], strict=True):
                S = self.S[j][layer]
                A = A + S @ Q @ S.T - S @ S.T
            out.append(W @ A)
        return out

    @staticmethod
    def run(weights: list[Tensor], x: Tensor) -> tuple[Tensor, list[Tensor]]:
        inputs = []
        for i, W in enumerate(weights):
            inputs.append(x)
            x = x @ W.T
            if i < len(weights) - 1:
                x = x.relu()
        return x, inputs

    def begin(self, x: Tensor, y: Tensor) -> None:
        task = len(self.S)
        leaves = [W.clone().requires_grad_() for W in self.W]
        loss = torch.nn.functional.cross_entropy(self.run(leaves, x.double())[0], y)
        grads = torch.autograd.grad(loss, leaves)
        chosen: list[list[int]] = []
        for layer, G in enumerate(grads):
            lengths = [(G @ S[layer] @ S[layer].T).norm() / G.norm() for S in self.S]
            ranked = sorted(range(task), key=lambda j: -float(lengths[j]))[: self.top]
            chosen.append([j for j in ranked if lengths[j] > self.trust])
        self.chosen.append(chosen)
        sizes = [[self.S[j][layer].shape[1] for j in c] for layer, c in enumerate(chosen)]
        self.Q.append([[torch.eye(r, dtype=torch.float64) for r in s] for s in sizes])

    def step(self, x: Tensor, y: Tensor, lr: float) -> None:
        task = len(self.chosen) - 1
        leaves = [W.requires_grad_() for W in self.W]
        scales = [Q.requires_grad_() for layer in self.Q[task] for Q in layer]
        loss = torch.nn.functional.cross_entropy(self.run(self.effective(task), x.double())[0], y)
        grads = torch.autograd.grad(loss, [*leaves, *scales])
        with torch.no_grad():
            for layer, W in enumerate(leaves):
                G = grads[layer]
                self.W[layer] = (W - lr * (G - G @ self.M[layer] @ self.M[layer].T)).detach()
            rest = iter(grads[len(leaves) :])
            self.Q[task] = [[(Q - lr * next(rest)).detach() for Q in layer] for layer in self.Q[task]]

    def end(self, x: Tensor) -> None:
        task = len(self.S)
        with torch.no_grad():
            _, inputs = self.run(self.effective(task), x.double())
        spaces = []
        for layer, X in enumerate(inputs):
            R, M = X.T, self.M[layer]
            total = float((R**2).sum())
            U, s, _ = torch.linalg.svd(R - M @ (M.T @ R), full_matrices=False)
            energies = [float(((m @ R) ** 2).sum()) for m in M.T] + [float(v) ** 2 for v in s]
            candidates = torch.cat([M, U], dim=1)
            taken: list[int] = []
            if task == 0:
                order, running = range(len(energies)), 0.0
                for i in order:
                    running += energies[i]
                    if running >= self.threshold * total:
                        break
                    taken.append(i)
            else:
                running = 0.0
                for i in sorted(range(len(energies)), key=lambda i: -energies[i]):
                    if running >= self.threshold * total:
                        break
                    running += energies[i]
                    taken.append(i)
            spaces.append(candidates[:, taken])
            fresh = [i for i in taken if i >= M.shape[1]]
            self.M[layer] = torch.cat([M, candidates[:, fresh]], dim=1)
        self.S.append(spaces)
