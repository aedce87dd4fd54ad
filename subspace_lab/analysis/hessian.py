"""The Hessian of a loss without forming it: products, extreme eigenvalues, spectral density, and where gradients lie.

A product costs about two gradients. Vectors are flat: the parameters in their order, row-major, one after the other.

    product = hessian_product(lambda batch: functional.cross_entropy(model(batch[0]), batch[1]), parameters, batches)
    top = top_eigenvalues(product, parameters, 10)
    density = slq_density(product, parameters, runs=5, steps=40)

Put the model into evaluation mode first: with dropout or batch statistics every call is another function, and the
matrix is not symmetric. Compiled models have no second derivatives; attention takes torch's plain kernel here, as the
fused ones have none either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from subspace_lab.analysis.lanczos import Product, Ritz, lanczos, slq_density, top_eigenvalues
from subspace_lab.linalg.precision import full_precision

__all__ = [
    "GradientOverlap",
    "flat_gradient",
    "gradient_overlap",
    "hessian_product",
    "lanczos",
    "slq_density",
    "top_eigenvalues",
]

Batch = TypeVar("Batch")


class GradientOverlap(NamedTuple):
    """Where a gradient lies; see `gradient_overlap`.

    Attributes:
        overlap: ‖V_kᵀ g‖² / ‖g‖², float64 scalar, 0 … 1.
        sharpness: λ_1 · lr / 2, float64 scalar; above 1 plain gradient descent is unstable along the first eigenvector.
    """

    overlap: Tensor
    sharpness: Tensor


def flat_gradient(loss: Callable[[Batch], Tensor], parameters: Sequence[Tensor], batches: Sequence[Batch]) -> Tensor:
    """Mean over the batches of the gradient of loss(batch), flat (n,); arguments as in `hessian_product`."""
    total = torch.zeros_like(_flat(parameters))
    for batch in batches:
        found = torch.autograd.grad(loss(batch), parameters, allow_unused=True, materialize_grads=True)
        total += _flat(found)
    return total / len(batches)


def hessian_product(loss: Callable[[Batch], Tensor], parameters: Sequence[Tensor], batches: Sequence[Batch]) -> Product:
    """The map v ↦ H v with H the Hessian of the mean of loss(batch) over the batches, by double backward.

    Args:
        loss: scalar loss of a batch, a function of the parameters' present values (mean over its examples).
        parameters: tensors that require gradients, the same at every call; one the loss does not use has zeros.
        batches: at least one; each counts the same, so give all of them the same number of examples.

    Returns:
        A function of flat vectors (n,), any floating type on the parameters' device, to the same type. It leaves
        ``.grad`` alone.

    Raises:
        ValueError: no batches.
    """
    if not batches:
        raise ValueError("the Hessian needs at least one batch")
    sizes, parameters = [p.numel() for p in parameters], list(parameters)

    @full_precision
    def product(vector: Tensor) -> Tensor:
        split = torch.split_with_sizes(vector.detach(), sizes)
        parts = [part.view_as(p).to(p.dtype) for part, p in zip(split, parameters, strict=True)]
        total = torch.zeros_like(vector)
        for batch in batches:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
                value = loss(batch)
                slopes = torch.autograd.grad(
                    value, parameters, create_graph=True, allow_unused=True, materialize_grads=True
                )
                along = torch.stack([(g * v).sum() for g, v in zip(slopes, parts, strict=True)]).sum()
                if along.requires_grad:  # not for a loss that is linear in all parameters
                    total += _flat(
                        torch.autograd.grad(along, parameters, allow_unused=True, materialize_grads=True)
                    ).to(vector.dtype)
        return total / len(batches)

    return product


@full_precision
def gradient_overlap(top: Ritz, gradient: Tensor, lr: float) -> GradientOverlap:
    """‖V_kᵀ g‖² / ‖g‖², the share of a gradient in the span of the top eigenvectors, beside λ_1 · lr / 2.

    Gur-Ari, Roberts & Dyer, "Gradient Descent Happens in a Tiny Subspace", 2018 (k = number of classes). The figure
    means nothing without saying whose gradient it is: on one network the full gradient had 0.00 under full-batch
    training below the edge of stability, .93 above it (λ_1 lr / 2 > 1), .17 and a minibatch's gradient .62 under
    minibatch SGD. Random directions have k / n. Record which gradient, and both numbers.

    Args:
        top: of `top_eigenvalues`, at the same parameters.
        gradient: (n,), full (`flat_gradient`) or of one batch.
        lr: learning rate of plain gradient descent; for momentum β the edge is at 2 (1 + β) / lr instead of 2 / lr.

    Returns:
        overlap and sharpness, float64 scalars; overlap is nan for a zero gradient.
    """
    g = gradient.double()
    g = g / g.abs().amax()  # its square must not underflow late in training
    inside = (top.vectors.double().mT @ g).square().sum()
    return GradientOverlap(inside / g.square().sum(), top.values[0] * (lr / 2))


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])
