"""Weights on manifolds: chosen ones move along a Grassmannian, a Stiefel manifold or spheres, all others as configured.

The constraint is kept by the optimizer (`optim.riemannian`): gradient to the tangent space, momentum, retraction. Which
weights those are is said by the configuration, and by modules themselves through a method `on_manifold()`, which
returns {parameter name: manifold} (see `models.heads.GrassmannHead`); so a copy of a model, an average of models or a
model from a checkpoint says it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import override

from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.linalg.precision import full_precision, matmul
from subspace_lab.manifolds.base import Retraction, polar
from subspace_lab.manifolds.gram import Kind
from subspace_lab.methods.base import Method
from subspace_lab.optim.compound import Compound
from subspace_lab.optim.riemannian import Momentum, RiemannianSGD, points
from subspace_lab.optim.shards import local
from subspace_lab.optim.stack import as_matrix
from subspace_lab.optim.traits import OptimizerFactory

# With SGD one learning rate serves both; of an adaptive optimizer's the manifold's gradient knows nothing.
_LR_BESIDE_ADAPTIVE = 0.1


class ManifoldMethod(Method):
    """Keeps weights on manifolds.

    Args:
        grassmann, stiefel, sphere: regular expressions searched in parameter names. A weight is read as a matrix
            (out, rest): orthonormal along its shorter side, or, on the sphere, with unit rows.
        update: polar, geodesic or qr: how a step returns to the manifold; all three agree to third order.
        momentum: transported (kept tangent, carried along) or ambient (projected only when used).
        lr: learning rate on the manifold; null is the optimizer's own with SGD, 0.1 with any other.
        momentum_factor: μ.
    """

    name: ClassVar[str] = "manifold"

    def __init__(
        self,
        grassmann: Sequence[str] = (),
        stiefel: Sequence[str] = (),
        sphere: Sequence[str] = (),
        update: Retraction = "geodesic",
        momentum: Momentum = "transported",
        lr: float | None = None,
        momentum_factor: float = 0.9,
    ) -> None:
        if lr is not None and lr < 0:
            raise UserError(f"method.lr={lr}: expected 0 or a positive number")
        if not 0 <= momentum_factor < 1:
            raise UserError(f"method.momentum_factor={momentum_factor}: expected a number in [0, 1)")
        self.patterns: dict[Kind, Sequence[str]] = {"grassmann": grassmann, "stiefel": stiefel, "sphere": sphere}
        self.update: Retraction = update
        self.momentum: Momentum = momentum
        self.lr, self.momentum_factor = lr, momentum_factor
        self._groups: list[dict[str, Any]] = []

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        """Move the chosen weights to the nearest points of their manifolds."""
        named = dict(model.named_parameters())
        with torch.no_grad():
            for name, kind in self._chosen(model).items():
                place(named[name], kind)
        return model

    def _chosen(self, model: nn.Module) -> dict[str, Kind]:
        """The weights that the configuration names."""
        found: dict[str, Kind] = {}
        names = [name for name, p in model.named_parameters() if p.requires_grad and p.ndim > 1]
        for kind, pattern in [(kind, pattern) for kind, own in self.patterns.items() for pattern in own]:
            mine = [name for name in names if re.search(pattern, name)]
            if not mine:
                raise UserError(
                    f"method.{kind}: {pattern} matches no weight matrix of the model",
                    hint=did_you_mean(pattern, names) or f"they are {', '.join(names[:4])} …",
                )
            for name in mine:
                if found.setdefault(name, kind) != kind:
                    raise UserError(f"method.{kind}: {pattern} matches {name}, which is on the {found[name]} already")
        return found

    @override
    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """The other parameters' groups, then one group of each kind of point; marked by ``manifold`` and ``blocks``."""
        declared = {
            f"{path}.{name}".removeprefix("."): (kind, True)
            for path, module in model.named_modules()
            if hasattr(module, "on_manifold")
            for name, kind in module.on_manifold().items()
        }
        declared |= {name: (kind, False) for name, kind in self._chosen(model).items()}
        if not declared:
            raise UserError("no weight of this model is on a manifold", hint="method.stiefel=[PATTERN], or method=gcr")
        groups: list[dict[str, Any]] = []
        for group in super().param_groups(model):
            rest = [(name, p) for name, p in group["params"] if name not in declared]
            groups += [group | {"params": rest}] if rest else []
        named = dict(model.named_parameters())
        for mark in dict.fromkeys(declared.values()):
            mine = [(name, named[name]) for name, own in declared.items() if own == mark]
            groups.append({"params": mine, "manifold": mark[0], "blocks": mark[1]})
        return groups

    @override
    def build_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """The configured optimizer on all other weights and Riemannian SGD on these, as one optimizer.

        Raises:
            UserError: a weight on a manifold is in half precision, or a matrix that has to be whole is sharded.
        """
        probe = factory([{"params": [nn.Parameter(torch.zeros(1, 1))], "kind": "matrix"}])
        lr = self.lr
        if lr is None:
            lr = float(probe.defaults["lr"]) if isinstance(probe, SGD) else _LR_BESIDE_ADAPTIVE
        riemannian = partial(
            RiemannianSGD,
            lr=lr,
            momentum=self.momentum_factor,
            update=self.update,
            transport=self.momentum,
            reorthonormalize_every=self._reorthonormalize_every(probe),
        )
        groups = self.param_groups(model)
        for group in groups:
            for name, p in group["params"] if "manifold" in group else ():
                _check(name, p, group)
        optimizer = Compound(groups, lambda group: "manifold" in group, {False: factory, True: riemannian})
        self._groups = [group for group in optimizer.param_groups if "manifold" in group]
        return optimizer

    def _reorthonormalize_every(self, body: Optimizer) -> int:
        return 0

    @override
    def metrics(self) -> dict[str, Tensor | float]:
        """Return the largest |SᵀS − I| over the points of this process: a device scalar."""
        errors = [distance(p, group) for group in self._groups for p in group["params"]]
        return {"orthonormality": torch.stack(errors).amax()} if errors else {}


def _check(name: str, p: Tensor, group: Mapping[str, Any]) -> None:
    """Say in the run's words what `RiemannianSGD` would refuse."""
    if p.dtype in (torch.float16, torch.bfloat16):
        kind = str(p.dtype).removeprefix("torch.")
        raise UserError(
            f"{name} is on a manifold and needs float32, not {kind}", hint="trainer.precision=bf16-mixed or 32-true"
        )
    if hasattr(p, "to_local") and not group["blocks"] and group["manifold"] != "sphere":
        raise UserError(f"{name} is one matrix on a manifold, which trainer=fsdp cuts", hint="trainer=ddp")


@full_precision
@torch.no_grad()
def distance(p: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Largest |SᵀS − I| of the points of one weight; 0 of an empty shard."""
    rows = points(local(p).detach(), group["manifold"], group["blocks"])
    if not len(rows):
        return torch.zeros((), device=rows.device)
    gram = matmul(rows, rows.mT)
    return (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax()


@full_precision
@torch.no_grad()
def place(weight: Tensor, kind: Kind, *, blocks: bool = False, near: bool = False) -> None:
    """Move a weight to the nearest point of its manifold, in place.

    Args:
        weight: drawn freely, or an average of points.
        kind: the manifold.
        blocks: as in `optim.riemannian`.
        near: the weight is known to be of full rank; saves the singular value decomposition. Without it a
            rank-deficient matrix, which has several nearest points, goes to one of them.
    """
    rows = points(weight.detach(), kind, blocks)
    if near:
        new = polar(rows.double().mT).mT
    else:
        U, _, Vh = torch.linalg.svd(rows.double(), full_matrices=False)
        new = U @ Vh
    if not blocks:
        new = new[:, 0] if kind == "sphere" else new[0]
        new = new if new.shape == as_matrix(weight).shape else new.mT
    weight.copy_(new.reshape(weight.shape))
