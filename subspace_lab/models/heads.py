"""Classifier heads: class subspaces (GCR) and cosine softmax, and how a model's head is found and swapped.

Wang, Li & Zhang, "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
Representation", ICCV 2023: class i is a subspace of the feature space with orthonormal basis S_i, and the logit of a
feature x is γ ‖S_iᵀ x / ‖x‖‖.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.linalg import derive_key, orthonormalize
from subspace_lab.linalg.precision import full_precision
from subspace_lab.manifolds import Grassmann
from subspace_lab.models.initialization import bell_


class GrassmannHead(nn.Module):
    """Logits γ ‖S_iᵀ x / ‖x‖‖ of C class subspaces S_i; in float32 whatever the features' precision.

    Classes of one dimension k lie together in one parameter ``bases.k<k>`` (C_k, k, n), whose rows are the basis
    vectors: S_iᵀ. The first dimension is the class, so sharding it (FSDP2) never cuts a subspace.

    Args:
        in_features: n.
        dims: k of each class; they may differ.
        gamma: γ, the largest logit.

    Raises:
        UserError: a dimension below 1 or above n, γ not positive.
    """

    def __init__(self, in_features: int, dims: Sequence[int], gamma: float = 25.0) -> None:
        super().__init__()
        if not dims or min(dims) < 1 or max(dims) > in_features:
            wrong = next((k for k in dims if not 1 <= k <= in_features), None)
            raise UserError(f"method.k={wrong}: expected between 1 and the n={in_features} features of this model")
        _check_gamma(gamma)
        self.in_features, self.dims, self.gamma = in_features, tuple(dims), gamma
        kinds = sorted(set(dims))
        key = derive_key("grassmann_head/1", torch.initial_seed())
        self.bases = nn.ParameterDict()
        for k in kinds:
            rows = torch.empty(self.dims.count(k), k, in_features)
            self.bases[f"k{k}"] = nn.Parameter(_random_bases(rows, derive_key(key, k)))
        by_kind = [i for k in kinds for i, own in enumerate(dims) if own == k]
        self.order: Tensor | None
        self.register_buffer("order", torch.tensor(by_kind).argsort() if len(kinds) > 1 else None, persistent=False)

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Logits (…, C) in [0, γ] of features x (…, n), float32 (float64 if the bases are)."""
        with torch.autocast(x.device.type, enabled=False):
            parts = [self._lengths(x, S) for S in self.bases.values()]
            lengths = parts[0] if self.order is None else torch.cat(parts, dim=-1)[..., self.order]
            return self.gamma * lengths

    def _lengths(self, x: Tensor, S: Tensor) -> Tensor:
        unit = functional.normalize(x.to(S.dtype), dim=-1)
        coordinates = functional.linear(unit, S.flatten(0, 1))
        lengths: Tensor = torch.linalg.vector_norm(coordinates.view(*coordinates.shape[:-1], *S.shape[:2]), dim=-1)
        return lengths

    def on_manifold(self) -> Mapping[str, str]:
        """Names of parameters that are batches of points, and of which manifold."""
        return {f"bases.{name}": "grassmann" for name in self.bases}

    def basis(self, i: int) -> Tensor:
        """S_i (n, k_i), a view."""
        k = self.dims[i]
        S: Tensor = self.bases[f"k{k}"]
        return S[self.dims[:i].count(k)].mT

    @torch.no_grad()
    def orthonormality(self) -> Tensor:
        """Largest |S_iᵀ S_i − I| over the classes, a scalar on the device."""
        return torch.stack([Grassmann().check(S.mT).amax() for S in self.bases.values()]).amax()

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move as asked, but never below float32: bases in half precision are off orthonormal by 5e-4."""
        before = {name: S.data for name, S in self.bases.items()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, S in self.bases.items():
            if S.dtype in (torch.float16, torch.bfloat16):
                S.data = before[name].to(S.device)
        return self

    @override
    def extra_repr(self) -> str:
        ks = sorted(set(self.dims))
        k = str(ks[0]) if len(ks) == 1 else f"{ks[0]}…{ks[-1]}"
        return f"in_features={self.in_features}, classes={len(self.dims)}, k={k}, gamma={self.gamma:g}"


class CosineHead(nn.Module):
    """Logits γ cos(w_i, x), no bias: what class subspaces of one dimension are but for the sign.

    Args:
        in_features: n.
        classes: C.
        gamma: γ.
    """

    def __init__(self, in_features: int, classes: int, gamma: float = 25.0) -> None:
        super().__init__()
        _check_gamma(gamma)
        self.in_features, self.gamma = in_features, gamma
        self.weight = nn.Parameter(torch.empty(classes, in_features))
        bell_(self.weight, 1 / math.sqrt(in_features), derive_key("cosine_head/1", torch.initial_seed()))

    @override
    def forward(self, x: Tensor) -> Tensor:
        """Logits (…, C) in [−γ, γ] of features x (…, n), float32."""
        with torch.autocast(x.device.type, enabled=False):
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            unit = functional.normalize(x.to(dtype), dim=-1)
            return self.gamma * functional.linear(unit, functional.normalize(self.weight.to(dtype), dim=-1))

    @override
    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, classes={len(self.weight)}, gamma={self.gamma:g}"


def find_head(model: nn.Module, path: str | None = None) -> tuple[str, nn.Module]:
    """Return (path, module) of a classifier's last layer.

    A head of this module if there is one, else what a timm model calls its classifier, else the last linear layer.

    Args:
        model: any classifier.
        path: its name, where the rule would find another.

    Raises:
        UserError: no such layer, or it is not linear.
    """
    modules = dict(model.named_modules())
    linear = {name: m for name, m in modules.items() if isinstance(m, nn.Linear | GrassmannHead | CosineHead)}
    if path is not None:
        if path in linear:
            return path, linear[path]
        raise UserError(
            f"method.head={path}: {'not a linear layer' if path in modules else 'no such layer'} of this model",
            hint=did_you_mean(path, linear) or f"its last linear layers are {', '.join(list(linear)[-3:])}",
        )
    ours = [name for name, m in linear.items() if not isinstance(m, nn.Linear)]
    if ours:
        return ours[-1], linear[ours[-1]]
    ask: Any = getattr(model, "get_classifier", None)
    classifier = ask() if callable(ask) else None
    for name, module in linear.items():
        if module is classifier:
            return name, module
    if not linear:
        raise UserError("this model has no linear layer to take for its head", hint="method.head=PATH names one")
    name = list(linear)[-1]
    return name, linear[name]


def replace_head(model: nn.Module, path: str, head: nn.Module) -> nn.Module:
    """Put `head` at `path`, on the device of what was there; returns the model (the head, where that is all of it)."""
    old = model.get_submodule(path)
    device = next(old.parameters()).device
    if any(p.device != device for p in head.parameters()):  # torch's fake tensors cannot be moved
        head.to(device)
    if not path:
        return head
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, head)
    return model


@full_precision
def _random_bases(rows: Tensor, key: int) -> Tensor:
    """Fill (C, k, n) with orthonormal rows, uniform on the Grassmannian up to the bell's deviation from a normal."""
    bell_(rows, 1.0, key)
    return orthonormalize(rows.mT).mT.contiguous()


def _check_gamma(gamma: float) -> None:
    if not (gamma > 0 and math.isfinite(gamma)):
        raise UserError(f"method.gamma={gamma}: expected a positive number")
