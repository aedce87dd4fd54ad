"""Methods that look at data, written out: copies of modules, loops over examples, tasks and tensors, Adam by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

State = dict[str, Tensor]
Head = Callable[[Tensor], Tensor]
Stream = Iterator[dict[str, Tensor]]
Coefficients = dict[str, list[float]]


def loaded(model: nn.Module, weights: State) -> nn.Module:
    """A copy of the module with these weights, all of which take gradients."""
    found = copy.deepcopy(model)
    found.load_state_dict(weights, strict=False)
    for p in found.parameters():
        p.requires_grad_(True)
    return found


def literal_fisher(model: nn.Module, weights: State, head: Head, examples: Tensor) -> State:
    """Matena & Raffel's F: every example and every class by itself."""
    network = loaded(model, weights)
    F = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in network.named_parameters()}
    for x in examples:
        logits = head(network(x[None]))[0]
        p = logits.softmax(0).detach()
        for y in range(len(logits)):
            parameters = list(network.parameters())
            gradients = torch.autograd.grad(logits.log_softmax(0)[y], parameters, retain_graph=True, allow_unused=True)
            for f, g in zip(F.values(), gradients, strict=True):
                if g is not None:
                    f += float(p[y]) * g.double() ** 2
    return {name: f / len(examples) for name, f in F.items()}


def literal_regmean(grams: Sequence[NDArray[np.float64]], weights: Sequence[NDArray[np.float64]], a: float) -> Tensor:
    """(Σ W G)(Σ G)^-1 with off-diagonals times a, by an inverse."""
    top, bottom = np.zeros_like(weights[0]), np.zeros_like(grams[0])
    for G, W in zip(grams, weights, strict=True):
        reduced = a * G
        np.fill_diagonal(reduced, np.diag(G))
        top = top + W @ reduced
        bottom = bottom + reduced
    return torch.from_numpy(top @ np.linalg.inv(bottom))


class Adam:
    """Kingma & Ba 2015, one array at a time."""

    def __init__(self, lr: float) -> None:
        self.lr, self.t = lr, 0
        self.m: State = {}
        self.v: State = {}

    def step(self, parameters: State, gradients: State) -> None:
        self.t += 1
        for name, p in parameters.items():
            g = gradients[name]
            self.m[name] = 0.9 * self.m.get(name, torch.zeros_like(p)) + 0.1 * g
            self.v[name] = 0.999 * self.v.get(name, torch.zeros_like(p)) + 0.001 * g * g
            m_hat, v_hat = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.999**self.t)
            parameters[name] = p - self.lr * m_hat / (v_hat.sqrt() + 1e-8)


def weight_gradients(
    model: nn.Module, weights: State, heads: Sequence[Head], streams: Sequence[Stream], batches: int
) -> State:
    """Gradient of the tasks' summed mean entropies in every floating tensor."""
    network = copy.deepcopy(model)
    trained = [name for name, _ in network.named_parameters()]
    leaves = {name: w.clone().requires_grad_(name in trained) for name, w in weights.items()}
    loss = torch.zeros((), dtype=next(iter(leaves.values())).dtype)
    for head, stream in zip(heads, streams, strict=True):
        for _ in range(batches):
            z = head(torch.func.functional_call(network, leaves, (next(stream)["inputs"],)))
            p = z.softmax(1)
            loss = loss - (p * z.log_softmax(1)).sum(1).mean()
    gradients = dict.fromkeys(leaves) | dict(
        zip(trained, torch.autograd.grad(loss, [leaves[name] for name in trained], allow_unused=True), strict=True)
    )
    return {name: torch.zeros_like(weights[name]) if g is None else g for name, g in gradients.items()}


def combine(base: State, deltas: Sequence[State], coefficients: Tensor, names: Sequence[str], masks: State) -> State:
    """W0 + Σ λ_tk m̂_k D_tk."""
    found = {}
    for k, name in enumerate(names):
        found[name] = base[name].clone()
        for t, D in enumerate(deltas):
            found[name] += coefficients[t, k] * masks[name] * D[name]
    return found


def literal_adamerging(
    model: nn.Module,
    base: State,
    deltas: Sequence[State],
    heads: Sequence[Head],
    streams: Sequence[Stream],
    *,
    start: float,
    lr: float,
    steps: int,
    batches: int,
    clamp: bool,
    task_wise: bool = False,
    masks: State | None = None,
) -> Tensor:
    """λ (tasks, tensors) as used."""
    names = list(base)
    masks = {name: torch.ones_like(W) for name, W in base.items()} if masks is None else masks
    state = {"raw": torch.full((len(deltas), 1 if task_wise else len(names)), start, dtype=base[names[0]].dtype)}
    adam = Adam(lr)
    for _ in range(steps):
        gradient = coefficient_gradient(
            model, base, deltas, heads, streams, state["raw"], names, masks, batches=batches, clamp=clamp
        )
        adam.step(state, {"raw": gradient})
    raw = state["raw"].expand(-1, len(names))
    return raw.clamp(0, 1) if clamp else raw


def coefficient_gradient(
    model: nn.Module,
    base: State,
    deltas: Sequence[State],
    heads: Sequence[Head],
    streams: Sequence[Stream],
    raw: Tensor,
    names: Sequence[str],
    masks: State,
    *,
    batches: int,
    clamp: bool,
) -> Tensor:
    """d loss / d raw."""
    used = (raw.clamp(0, 1) if clamp else raw).expand(-1, len(names))
    g = weight_gradients(model, combine(base, deltas, used, names, masks), heads, streams, batches)
    found = torch.zeros(len(deltas), len(names), dtype=raw.dtype)
    for t, D in enumerate(deltas):
        for k, name in enumerate(names):
            found[t, k] = (g[name] * masks[name] * D[name]).sum()
    if raw.shape[1] == 1:
        found = found.sum(1, keepdim=True)
    return torch.where((raw < 0) | (raw > 1), 0.0, found) if clamp else found


def soft_mask(noise: Tensor, x: Tensor, temperature: float) -> Tensor:
    return torch.sigmoid((torch.log(noise) - torch.log(1 - noise) + x) / temperature)


def literal_mask(
    model: nn.Module,
    base: State,
    deltas: Sequence[State],
    heads: Sequence[Head],
    streams: Sequence[Stream],
    noises: Iterator[State],
    *,
    scale: float,
    temperature: float,
    lr: float,
    steps: int,
    inner_lr: float | None,
    clamp: bool,
) -> State:
    """Logits x after `steps`; with `inner_lr` λ takes one step of Adam from `scale` before each."""
    names = list(base)
    x = {name: torch.zeros_like(W) for name, W in base.items()}
    start = torch.full((len(deltas), len(names)), scale, dtype=base[names[0]].dtype)
    adam, inner = Adam(lr), Adam(inner_lr or 0.0)
    for _ in range(steps):
        noise = next(noises)
        m = {name: soft_mask(noise[name], x[name], temperature) for name in names}
        hat = {name: m[name] / m[name].mean() for name in names}
        used = start
        if inner_lr is not None:
            state = {"raw": start.clone()}
            inner.step(
                state,
                {"raw": coefficient_gradient(
                    model, base, deltas, heads, streams, start, names, hat, batches=1, clamp=clamp
                )},
            )  # fmt: skip
            used = state["raw"].clamp(0, 1) if clamp else state["raw"]
        g = weight_gradients(model, combine(base, deltas, used, names, hat), heads, streams, 1)
        gradients = {}
        for k, name in enumerate(names):
            U = torch.zeros_like(base[name])
            for t, D in enumerate(deltas):
                U += used[t, k] * D[name]
            into_hat = g[name] * U
            mean, n = m[name].mean(), m[name].numel()
            into_m = into_hat / mean - (into_hat * m[name]).sum() / (n * mean**2)
            gradients[name] = into_m * m[name] * (1 - m[name]) / temperature
        adam.step(x, gradients)
    return x
