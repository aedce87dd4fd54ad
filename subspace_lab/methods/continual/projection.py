"""Gradient projection memory and scaled gradient projection.

GPM: Saha, Garg & Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021, arXiv 2103.09762; released code
sahagobinda/GPM.  SGP: Saha & Roy, "Continual Learning with Scaled Gradient Projection", AAAI 2023, arXiv 2302.01386;
released code sahagobinda/SGP.  For the weight W (out, d) of a layer with inputs x, on every task after the first:

    GPM    ∇W <- ∇W − ∇W M Mᵀ
    SGP    ∇W <- ∇W − ∇W M Λ Mᵀ

    after each task, R (d, n) the layer's inputs on n training examples (patches, for convolutions):
    first  R = U S Vᵀ,                M <- the leading columns of U that together hold less than ε of |R|²   (eq. 5)
    later  R̂ = R − M MᵀR = Û Ŝ V̂ᵀ,   M <- [M, û_1 … û_r], the fewest with |MᵀR|² ≥ ε |R|²              (eqs. 8, 9)
    SGP    s = (√diag(MᵀR RᵀM), ŝ_1 … ŝ_r),  λ = (α + 1) s / (α s + max s),  old directions: λ <- min(1, λ + λ_old)

==========  ==============================================================================================
symbol      here
==========  ==============================================================================================
ε           ``method.threshold`` (PMNIST: .95 for the first layer, .99; CIFAR-100: .97 + .003 t)
n           ``method.samples``
M           ``memory[path]``
R Rᵀ        the Gram matrix that `continual.activations.input_statistics` sums up
Λ, λ        ``importance[path]``
α           ``method.alpha``
==========  ==============================================================================================

The constraint is on what is applied, not on the gradient alone: Adam's division, decay and momentum are projected too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.continual.layers import ProtectedLinear
from subspace_lab.continual.thresholds import Spec
from subspace_lab.errors import UserError
from subspace_lab.linalg.removal import Removal
from subspace_lab.methods.continual.protecting import ProtectingMethod, Statistic, energy_along, weight_of
from subspace_lab.optim.traits import OptimizerFactory, is_linear
from subspace_lab.subspaces import Complement, Subspace


class GPM(ProtectingMethod):
    """Updates orthogonal to the inputs of all old tasks; arguments as in `ProtectingMethod`."""

    name: ClassVar[str] = "gpm"


class SGP(ProtectingMethod):
    """As GPM, but along a protected direction of importance λ a part 1 − λ of every update remains.

    Args:
        threshold: ε as in `ProtectingMethod`.
        samples: examples gathered after each task.
        targets: the protected layers.
        alpha: α: the larger, the nearer importances are to 1 and the method to GPM.
    """

    name: ClassVar[str] = "sgp"

    def __init__(
        self,
        threshold: Spec = 0.97,
        samples: int | None = 300,
        targets: Sequence[str] | None = None,
        alpha: float = 10.0,
    ) -> None:
        if alpha < 0:
            raise UserError(f"method.alpha={alpha}: expected 0 or a positive number")
        super().__init__(threshold, samples, targets)
        self.alpha = alpha
        self.importance: dict[str, Tensor] = {}

    @override
    def removal(self, path: str) -> Removal | None:
        M = self.memory.get(path)
        return Removal.of(M, self.importance[path]) if M is not None and M.shape[1] else None

    @override
    def subspace(self, bases: Mapping[str, Tensor]) -> Subspace:
        importance = {weight_of(path): weights for path, weights in self.importance.items()}
        return Complement(bases, importance=importance, clean=self.clean())

    @override
    def build_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        if not is_linear(factory):  # such steps are scaled themselves, and scaled gradients would scale them twice
            for layer in self.layers.values():
                if isinstance(layer, ProtectedLinear):
                    layer.protect(None)
        return super().build_optimizer(model, factory)

    @override
    def remember(self, path: str, statistic: Statistic, threshold: float) -> dict[str, Tensor]:
        shared = super().remember(path, statistic, threshold)
        M = self.memory[path]
        old = self.importance.get(path, M.new_zeros(0)).to(M.device)
        s = energy_along(statistic, M).clamp_min(0).sqrt()
        largest = s.max() if len(s) else s.sum()
        weights = (self.alpha + 1) * s / torch.where(largest > 0, self.alpha * s + largest, 1.0)
        weights[: len(old)] += old.to(weights)
        self.importance[path] = weights.clamp_max(1.0).float()
        return shared | {f"importance/{path}": self.importance[path]}

    @override
    def receive(self, tensors: Mapping[str, Tensor]) -> None:
        super().receive(tensors)
        for name, tensor in tensors.items():
            kind, _, path = name.partition("/")
            if kind == "importance":
                self.importance[path] = tensor

    @override
    def basis_bytes(self) -> int:
        return super().basis_bytes() + sum(w.numel() * w.element_size() for w in self.importance.values())

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"importance": {path: w.cpu() for path, w in self.importance.items()}}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.importance = {path: w.clone() for path, w in state["importance"].items()}
