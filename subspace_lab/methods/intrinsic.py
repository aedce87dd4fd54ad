"""Intrinsic dimension: train d numbers z that move all D weights, θ = θ0 + P z.

Li, Farkhoor, Liu & Yosinski, "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, arXiv 1804.08838,
equation 2; SAID and DID from Aghajanyan, Gupta & Zettlemoyer, ACL 2021, arXiv 2012.13255, equations 2 and 3.

==========  =======================================================================================
symbol      here
==========  =======================================================================================
θ0          `FlatModel.theta0()`, the frozen initial weights as one vector, (D,)
P           `FlatModel.projection`, D × d, unit columns over all D rows, regenerated from a seed
θ^(d), z    `FlatModel.z`, the trained numbers, (d,), zero at the start
λ_i         `FlatModel.lambdas`, one scale per layer (SAID), taken out of the d numbers
==========  =======================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab import projections
from subspace_lab.errors import UserError
from subspace_lab.methods.base import Method, Origin
from subspace_lab.optim.traits import OptimizerFactory
from subspace_lab.projections import Projection
from subspace_lab.projections.per_layer import PerLayer
from subspace_lab.subspaces.flat import FlatModel
from subspace_lab.subspaces.layout import FlatLayout

Kind = Literal["orthoblock", "fastfood", "fastfood_blocked", "dense", "gaussian", "sparse", "one_hot", "kronecker"]


class IntrinsicDimension(Method):
    """Trains in a random d-dimensional subspace of all weights.

    Args:
        d: trained numbers; null where a dimension search chooses it.
        d_max: the largest d of a sweep: P(d) is the first d columns of P(d_max); null is d.
        projection: how P is made.
        scope: global: every column of P moves all weights; per_layer: each column moves one layer.
        variant: did: θ0 + P z; said: each layer's part has a trained scale of its own, counted in d.
        targets: regular expressions searched in parameter names; null is every trainable parameter. The others stay
            as they are.
        lr: of z; null is optimizer.lr · sqrt(D/d), for columns of unit norm.
        lr_factor: multiplies the learning rate of z; what a search over learning rates varies.
        initial: a solution file of the same subspace with a smaller d to continue from.
        seed: of P.
    """

    name: ClassVar[str] = "intrinsic_dimension"
    shards = False

    def __init__(
        self,
        d: int | None = None,
        d_max: int | None = None,
        projection: Kind = "orthoblock",
        scope: Literal["global", "per_layer"] = "global",
        variant: Literal["did", "said"] = "did",
        targets: Sequence[str] | None = None,
        lr: float | None = None,
        lr_factor: float = 1.0,
        initial: str | None = None,
        seed: int = 0,
    ) -> None:
        for key, value in (("d", d), ("d_max", d_max)):
            if value is not None and value < 1:
                raise UserError(f"method.{key}={value}: expected at least 1")
        if d is not None and d_max is not None and d_max < d:
            raise UserError(f"method.d_max={d_max} is less than method.d={d}")
        for key, number in (("lr", lr), ("lr_factor", lr_factor)):
            if number is not None and not (number > 0 and math.isfinite(number)):
                raise UserError(f"method.{key}={number}: expected a positive number")
        self.d, self.d_max, self.projection = d, d_max, projection
        self.scope, self.variant, self.targets = scope, variant, targets
        self.lr, self.lr_factor, self.initial, self.seed = lr, lr_factor, initial, seed
        self._model: FlatModel | None = None

    @override
    def prepare(self, model: nn.Module) -> FlatModel:
        """Return the model reparametrised by z.

        Raises:
            UserError: no d, more dimensions than weights, too few for one per layer, nothing selected.
        """
        if self.d is None:
            raise UserError(
                "method.d has no value and needs one", hint="write method.d=200, or protocol=dimension_search"
            )
        layout = FlatLayout.of(model, self.targets)
        m = len(layout.layer_names) if self.variant == "said" else 0
        if self.d <= m:
            raise UserError(
                f"method.d={self.d} leaves no direction: SAID spends {m} numbers on the scales of {m} layers",
                hint=f"method.d={m + 1} or more, or method.variant=did",
            )
        wrapped = FlatModel(model, layout, self._projection(layout, m), scales=bool(m))
        if self.initial is not None:
            self._continue_from(wrapped, Path(self.initial))
        self._model = wrapped
        return wrapped

    def _projection(self, layout: FlatLayout, m: int) -> Projection:
        assert self.d is not None
        D, d = layout.D, self.d - m
        d_max = min((self.d_max or self.d) - m, D)
        if d > D:
            raise UserError(f"method.d={self.d} is more than the D={D} weights of the model")
        if self.scope == "per_layer":
            return PerLayer(layout.layer_sizes, d=d, d_max=d_max, seed=self.seed, kind=self.projection)
        return projections.create(self.projection, D=D, d=d, seed=self.seed, d_max=d_max)

    def _continue_from(self, model: FlatModel, file: Path) -> None:
        from subspace_lab.compression.solution import Solution

        earlier = Solution.load(file)
        same = earlier.projection_fingerprint == model.projection.fingerprint()
        if not same or earlier.theta0_sha256 != model.theta0_sha256() or earlier.z.numel() > model.z.numel():
            raise UserError(
                f"method.initial={file}: not a solution in a smaller subspace of this one",
                hint="the same model, seed, projection, variant and method.d_max, and at most as large a d",
            )
        with torch.no_grad():
            model.z[: earlier.z.numel()] = earlier.z.to(model.z)
            if model.lambdas is not None and earlier.lambdas is not None:
                model.lambdas.copy_(earlier.lambdas)
        buffers = dict(model.inner.named_buffers())
        for name, value in earlier.buffers.items():
            buffers[name].copy_(value)

    @override
    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Return one group of z and, with SAID, one of the layers' scales."""
        assert isinstance(model, FlatModel)
        groups = [{"params": [("z", model.z)], "kind": "other"}]
        if model.lambdas is not None:
            groups.append({"params": [("lambdas", model.lambdas)], "kind": "other"})
        return groups

    @override
    def build_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """The configured optimizer on z, with the direct learning rate times sqrt(D/d) unless `lr` says otherwise."""
        assert isinstance(model, FlatModel)
        optimizer = factory(self.param_groups(model))
        model.watch(optimizer)
        rule = math.sqrt(model.layout.D / model.z.numel())
        for group in optimizer.param_groups:
            group["lr"] = (self.lr if self.lr is not None else group["lr"] * rule) * self.lr_factor
        if model.lambdas is not None and "weight_decay" in optimizer.param_groups[-1]:
            optimizer.param_groups[-1]["weight_decay"] = 0.0  # a scale's origin is 1: decay would pull weights to θ0
        return optimizer

    @override
    def export(self, model: nn.Module) -> dict[str, Tensor]:
        """Plain weights of the wrapped model, with θ in the bits that `subspace-lab rebuild` gives."""
        assert isinstance(model, FlatModel)
        model.settle()
        return model.inner.state_dict()

    @override
    def save(self, model: nn.Module, folder: Path, origin: Origin) -> None:
        """Write solution.safetensors: the d numbers, and what `subspace-lab rebuild` needs beside them."""
        from subspace_lab.compression import solution

        assert isinstance(model, FlatModel)
        found = solution.Solution.of(model, self, seed=origin.seed, node=origin.node, arguments=origin.arguments)
        found.save(folder / solution.FILE)

    @override
    def metrics(self) -> dict[str, Tensor | float]:
        """Return d, D, and how far θ has moved: ‖z‖ (of DID with orthonormal columns, ‖θ − θ0‖)."""
        if self._model is None:
            return {}
        model = self._model
        m = 0 if model.lambdas is None else model.lambdas.numel()
        return {
            "d": float(model.z.numel() + m),
            "D": float(model.layout.D),
            "z_norm": model.z.detach().norm(),
        }
