"""What a client does in a round: some optimizer steps on its own examples, from the weights that the server sends.

Small networks of linear layers are trained for many clients at once, each with weights of its own in one stacked
tensor: a step is then one batched product per layer.  Which way is taken depends on model and optimizer alone, and
every client's numbers on nothing but its own, so that groups of any size give the same updates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim import Optimizer

from subspace_lab.data.packing import Batch
from subspace_lab.federated.layout import Layout

Loss = Callable[[nn.Module, Batch], Tensor]
MakeOptimizer = Callable[[Mapping[str, Tensor]], Optimizer]

_STACKABLE = (nn.Linear, nn.LayerNorm, nn.ReLU, nn.GELU, nn.Tanh, nn.SiLU, nn.Flatten, nn.Identity, nn.Dropout)


@dataclass(frozen=True)
class Recipe:
    """How clients train.

    Attributes:
        loss: mean training loss of a batch.
        optimizer: makes the optimizer of tensors by name; a new one in every round.
        lr_scale: factor of its learning rates.
        clip: largest norm of a client's gradient; None does not clip.
        autocast: number type that products are computed in; None: that of the weights.
    """

    loss: Loss
    optimizer: MakeOptimizer
    lr_scale: float = 1.0
    clip: float | None = None
    autocast: torch.dtype | None = None

    def begin(self, tensors: Mapping[str, Tensor]) -> Optimizer:
        """A new optimizer at this round's learning rate."""
        optimizer = self.optimizer(tensors)
        for group in optimizer.param_groups:
            group["lr"] *= self.lr_scale
        return optimizer


def stackable(model: nn.Module) -> bool:
    """Whether many copies of a model can be trained in stacked tensors with the same numbers as one by one."""
    for module in model.modules():
        if isinstance(module, _DropoutNd) and module.p > 0:
            return False  # random numbers of a stack would depend on who is in it
        leaf = not any(True for _ in module.children())
        if leaf and not isinstance(module, _STACKABLE):
            return False
    return not any(b.is_floating_point() for b in model.buffers())


def train_one(
    model: nn.Module,
    layout: Layout,
    weights: Tensor,
    batches: Iterable[Batch],
    recipe: Recipe,
    after_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Train one client.

    Args:
        model: to work in.
        layout: of its state.
        weights: w (size,), where training starts.
        batches: of the client's examples, one for each step.
        recipe: how to train.
        after_step: called after each step.

    Returns:
        w_c − w (size,), float32.
    """
    layout.write(model, weights)
    model.train()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = recipe.begin(trained)
    device = weights.device.type
    for batch in batches:
        optimizer.zero_grad()
        with torch.autocast(device, recipe.autocast, enabled=recipe.autocast is not None):
            loss = recipe.loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(trained.values(), recipe.clip)
        optimizer.step()
        after_step()
    return layout.read(model) - weights


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Compute in one thread meanwhile, on a CPU."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _LossOf(nn.Module):
    """The loss as the output of a module, so that `functional_call` finds the parameters."""

    def __init__(self, model: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, batch: Batch) -> Tensor:
        return self._loss(self.model, batch)


def train_stacked(
    model: nn.Module,
    layout: Layout,
    weights: Tensor,
    steps: Sequence[int],
    batch: Callable[[int], Batch],
    recipe: Recipe,
) -> Tensor:
    """Train several clients at once.

    Args:
        model: `stackable`; its own weights are not used.
        layout: of its state.
        weights: w (size,), where all of them start.
        steps: of each client (c,); who has fewer waits.
        batch: gives stacked batch k, tensors (c, b, …); labels of -100 are no examples.
        recipe: how to train, with an optimizer whose rule for an entry looks at no other entry.

    Returns:
        w_c − w (c, size), float32.
    """
    count = len(steps)
    device = weights.device.type
    holder = _LossOf(model.train(), recipe.loss)
    shared = {name: p.detach() for name, p in model.named_parameters()} | layout.named(weights)
    taken = {name for name, p in model.named_parameters() if p.requires_grad}
    start = weights.expand(count, -1)
    stacks = {name: view.clone().requires_grad_() for name, view in layout.named(start).items() if name in taken}
    fixed = {f"model.{name}": tensor for name, tensor in shared.items() if name not in taken}

    def loss_of(own: dict[str, Tensor], one: Batch) -> Tensor:
        named = {f"model.{name}": tensor for name, tensor in own.items()}
        loss: Tensor = torch.func.functional_call(holder, {**fixed, **named}, (one,))
        return loss

    optimizer = recipe.begin(stacks)
    least = min(steps)
    left = torch.tensor(steps, device=weights.device) if least < max(steps) else None
    for step in range(max(steps)):
        optimizer.zero_grad()
        with torch.autocast(device, recipe.autocast, enabled=recipe.autocast is not None):
            losses = torch.func.vmap(loss_of)(stacks, batch(step))
        losses.sum().backward()  # type: ignore[no-untyped-call]
        if recipe.clip is not None:
            _clip_each(stacks.values(), recipe.clip)
        waiting = step >= least and left is not None
        before = {name: tensor.detach().clone() for name, tensor in stacks.items()} if waiting else {}
        optimizer.step()
        for name, tensor in before.items():
            assert left is not None
            active = (left > step).view(-1, *[1] * (tensor.dim() - 1))
            with torch.no_grad():
                stacks[name].copy_(torch.where(active, stacks[name], tensor))
    return _differences(layout, weights, stacks, count)


def _differences(layout: Layout, weights: Tensor, stacks: Mapping[str, Tensor], count: int) -> Tensor:
    update = weights.new_zeros(count, layout.size)
    for name, part in zip(layout.names, layout.parts, strict=True):
        if name in stacks:
            update[:, part] = stacks[name].detach().reshape(count, -1) - weights[part]
    return update


def _clip_each(stacks: Iterable[Tensor], largest: float) -> None:
    gradients = [tensor.grad for tensor in stacks if tensor.grad is not None]
    norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    factors = (largest / (norms + 1e-6)).clamp(max=1.0)  # as torch's clip_grad_norm_ has it
    for g in gradients:
        g.mul_(factors.view(-1, *[1] * (g.dim() - 1)))


def parameter_groups(groups: Sequence[Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """A method's parameter groups with other tensors in the places of the parameters of the same names."""
    return [{**group, "params": [(name, tensors[name]) for name, _ in group["params"]]} for group in groups]
