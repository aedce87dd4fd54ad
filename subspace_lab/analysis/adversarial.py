"""Adversarial examples in an L∞ ball: FGSM and PGD.

Goodfellow, Shlens & Szegedy, "Explaining and Harnessing Adversarial Examples", ICLR 2015 (FGSM), and Madry, Makelov,
Schmidt, Tsipras & Vladu, "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018 (PGD):

    FGSM    x' = x + ε sign ∇ L(x)
    PGD     x⁰ uniform in the ball around x,    xᵏ⁺¹ = Π( xᵏ + α sign ∇ L(xᵏ) )

with L the cross-entropy of the true label and Π the projection on the ball and on the range that inputs can take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Bounds = tuple[float | Tensor, float | Tensor]


def fgsm(
    model_fn: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    epsilon: float | Tensor,
    bounds: Bounds | None = None,
) -> Tensor:
    """One step of length ε along the sign of the loss's gradient.

    Args:
        model_fn: inputs (b, …) -> logits (b, classes); a module is run in evaluation mode and left as it was.
        inputs: floating (b, …).
        labels: int64 (b,), columns of the logits.
        epsilon: radius of the ball in units of the inputs; a tensor broadcasts against them (normalised channels).
        bounds: smallest and largest value that an input can take.

    Returns:
        Inputs like ``inputs``, detached, at most ε away in every entry.

    Raises:
        ValueError: a negative radius, labels that do not fit or a range that is empty.
    """
    _check(inputs, labels, epsilon, bounds)
    with _evaluating(model_fn):
        x, labels = inputs.detach().clone(), labels.clone()  # what a graph is made of must be no inference tensors
        return _inside(x + epsilon * _gradient(model_fn, x, labels).sign(), x, epsilon, bounds)


def pgd(
    model_fn: Callable[[Tensor], Tensor],
    inputs: Tensor,
    labels: Tensor,
    epsilon: float | Tensor,
    steps: int,
    step_size: float | Tensor,
    seed: int,
    bounds: Bounds | None = None,
) -> Tensor:
    """Projected gradient ascent of the loss from a random start in the ball.

    Nothing is read back to the host. The start is a function of the seed, the shape and the kind of device, so give
    each batch its own seed.

    Args:
        model_fn: inputs (b, …) -> logits (b, classes); a module is run in evaluation mode and left as it was.
        inputs: floating (b, …).
        labels: int64 (b,), columns of the logits.
        epsilon: radius of the ball in units of the inputs; a tensor broadcasts against them (normalised channels).
        steps: gradient steps, at least 1.
        step_size: length of a step in every entry.
        seed: of the random start.
        bounds: smallest and largest value that an input can take.

    Returns:
        Inputs like ``inputs``, detached, at most ε away in every entry.

    Raises:
        ValueError: a negative radius, no steps, labels that do not fit or a range that is empty.
    """
    _check(inputs, labels, epsilon, bounds)
    if steps < 1:
        raise ValueError(f"pgd needs at least 1 step, not {steps}")
    with _evaluating(model_fn):
        x, labels = inputs.detach().clone(), labels.clone()
        generator = torch.Generator(device=x.device).manual_seed(seed)
        start = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
        moved = _inside(x + epsilon * (2 * start - 1), x, epsilon, bounds)
        for _ in range(steps):
            moved = _inside(moved + step_size * _gradient(model_fn, moved, labels).sign(), x, epsilon, bounds)
        return moved


def _gradient(model_fn: Callable[[Tensor], Tensor], x: Tensor, labels: Tensor) -> Tensor:
    """∇ of the examples' summed cross-entropy, so that no example's gradient depends on the batch size."""
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model_fn(x).float(), labels, reduction="sum")
        return torch.autograd.grad(loss, x)[0]


def _inside(moved: Tensor, x: Tensor, epsilon: float | Tensor, bounds: Bounds | None) -> Tensor:
    moved = torch.maximum(torch.minimum(moved, x + epsilon), x - epsilon)
    if bounds is None:
        return moved
    low, high = (torch.as_tensor(b, dtype=x.dtype, device=x.device) for b in bounds)
    return torch.maximum(torch.minimum(moved, high), low)


@contextmanager
def _evaluating(model_fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Gradients can be taken, whatever the caller's mode, and modules are in evaluation mode."""
    modules = list(model_fn.modules()) if isinstance(model_fn, nn.Module) else []
    were = [m.training for m in modules]
    for m in modules:
        m.training = False
    try:
        with torch.inference_mode(False):
            yield
    finally:
        for m, training in zip(modules, were, strict=True):
            m.training = training


def _check(inputs: Tensor, labels: Tensor, epsilon: float | Tensor, bounds: Bounds | None) -> None:
    if not isinstance(epsilon, Tensor) and epsilon < 0:
        raise ValueError(f"the radius epsilon must be 0 or more, not {epsilon}")
    if not inputs.is_floating_point() or labels.shape != inputs.shape[:1]:
        raise ValueError(f"attack got inputs {tuple(inputs.shape)} {inputs.dtype}, labels {tuple(labels.shape)}")
    if bounds is not None and not any(isinstance(b, Tensor) for b in bounds) and bounds[0] >= bounds[1]:
        raise ValueError(f"the range of the inputs is empty: {bounds[0]} to {bounds[1]}")
