"""Linear layers that project the batch's inputs instead of the gradient, where that is cheaper.

The gradient of W (out, d) is δᵀX for inputs X (n, d) and errors δ (n, out), so its projection is a gradient too:

    δᵀX (I − M Mᵀ) = δᵀ (X − X M Mᵀ)

at a cost of n·d·k instead of out·d·k (Xiao et al., HLOP, ICLR 2024, project inputs for locality's sake).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from subspace_lab.linalg.removal import Removal

# Multiplications that must be saved to be worth the detour through Python (about 50 µs).
_WORTH = {"cpu": 1 << 20, "cuda": 1 << 30}


class _InputProjection(torch.autograd.Function):
    """y = x Wᵀ + b whose gradient with respect to W is made of projected inputs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: ProtectedLinear) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.layer, ctx.removal = layer, layer.removal
        return functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, delta: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # a graph of this gradient has ways to W of its own
            ctx.layer.pending["raw"] = True
        dx = dW = db = None
        rows = delta if delta.dim() == 2 else delta.reshape(-1, delta.shape[-1])
        if ctx.needs_input_grad[0]:
            dx = (delta @ weight.to(delta.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            # In the weight's precision also under autocast: rounding would lead out of the complement.
            X = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
            dW = _outer(rows.to(weight.dtype), ctx.removal(X.to(weight.dtype)))
        if ctx.needs_input_grad[2]:
            db = rows.sum(0, dtype=weight.dtype)
        return dx, dW, db, None


def _outer(rows: Tensor, inputs: Tensor) -> Tensor:
    if torch.is_autocast_enabled(rows.device.type):
        with torch.autocast(rows.device.type, enabled=False):
            return rows.mT @ inputs
    return rows.mT @ inputs


class ProtectedLinear(nn.Linear):
    """`nn.Linear` that may have protected input directions; parameters and state are those of `nn.Linear`.

    Nothing is enforced here: the constraint is kept by `subspace_lab.subspaces.Complement`, which asks `take_clean`
    whether the gradients have arrived projected.  What adds to the weight's gradient by other ways than the layer's
    output (a penalty on the weights) has to call `mark_raw`.

    Attributes:
        removal: takes protected directions out of input rows; None: the plain layer.
        pending: whether a ``raw`` gradient, one that has taken the plain way, may be among those since the last step.
    """

    removal: Removal | None
    pending: dict[str, bool]  # no plain attribute: setting one of a module takes as long as a small product

    @override
    def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None) -> None:
        super().__init__(in_features, out_features, bias, device)
        self.protect(None)

    @classmethod
    def of(cls, layer: nn.Linear) -> ProtectedLinear:
        """The same layer, with the same parameters."""
        new = cls.__new__(cls)
        new.__dict__.update(layer.__dict__)
        new.protect(None)
        return new

    def protect(self, removal: Removal | None) -> None:
        """Take this out of the inputs from now on; None: nothing."""
        self.removal = removal
        self.pending = {"raw": True}
        self._choices: dict[int, bool] = {}  # rows -> whether to project them

    def mark_raw(self) -> None:
        """Say that a gradient outside the complement is on its way."""
        self.pending["raw"] = True

    def take_clean(self) -> bool:
        """Whether all gradients since the last call were made of projected inputs."""
        clean = self.removal is not None and not self.pending["raw"]
        self.pending["raw"] = False
        return clean

    @override
    def forward(self, input: Tensor) -> Tensor:
        if self.removal is None or not (torch.is_grad_enabled() and self.weight.requires_grad):
            return functional.linear(input, self.weight, self.bias)
        rows = input.numel() // self.in_features
        worth = self._choices.get(rows)
        if worth is None:
            worth = self._choices[rows] = self._worth_it(rows)
        if not worth:
            self.pending["raw"] = True
            return functional.linear(input, self.weight, self.bias)
        if self.removal.factors.device != input.device:
            self.removal = self.removal.to(input.device)
        y: Tensor = _InputProjection.apply(input, self.weight, self.bias, self)
        return y

    def _worth_it(self, rows: int) -> bool:
        """Whether projecting so many input rows saves enough over projecting the gradient's `out` rows."""
        assert self.removal is not None
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return False  # processes have batches of different sizes, and must agree on the way
        saved = 2 * (self.out_features - rows) * self.removal.factors.numel()
        return saved > _WORTH.get(self.weight.device.type, _WORTH["cuda"])


def replace_linear(model: nn.Module, layers: Mapping[str, nn.Module]) -> nn.Module:
    """Put a `ProtectedLinear` in the place of every `nn.Linear` among `layers`; returns the model.

    Subclasses of `nn.Linear` and other layers stay: their gradients are projected.
    """
    new = {id(layer): ProtectedLinear.of(layer) for layer in layers.values() if type(layer) is nn.Linear}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new:
                parent._modules[name] = new[id(child)]
    return new.get(id(model), model)
