"""CoSO: continuous subspace optimization for continual learning.

Cheng, Wan, Wu, Hou & Zhang, NeurIPS 2025, arXiv 2505.11816; released code quinn-ch/CoSO.  For a weight W whose
gradient is G (written for the output side; the input side is the same with Gᵀ):

    each step          G' = G − M Mᵀ G,     R = Pᵀ G',     N = Adam(R),     W <- W − η P N
    every K steps      P  = the r1 leading left singular vectors of G'
                       S <- frequent directions of (S, G'),  r2 columns
    end of a task      M <- (M, the leading directions of S that hold less than ε of its energy),  S <- 0

Two things depend on where one looks, and are options here:

*   Which side.  The release takes LEFT singular vectors of a gradient in torch's layout (out, in): the space of errors
    that are propagated back.  MᵀΔW = 0 then says that no update adds to old tasks' *output directions*; what the layer
    answers to old inputs does change.  ``side: input`` takes right ones, so that ΔW M = 0 and inputs in the span of M
    give what they gave.  ``output`` is the default, as released.
*   The sketch.  Frequent directions shrinks once, by the squared singular value r2 + 1 of (S, G').  The release shrinks
    each gradient's own spectrum first, then the joined one, which forgets more.

Unlike the release, directions that join M are orthonormalised, and a layer with fewer than r2 + 1 directions keeps as
many as it has (the release stops with an index error).  Adam's moments are not rotated when P changes.

Here              paper
method.r1         r1: directions of a step         Sketched.rank
method.r2         r2: columns of the sketch        Sketched.sketch
method.every      K                                SubspaceOptimizer.refresh_every
method.threshold  ε
memory            M, of each layer
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.continual.activations import Layers, protected_layers
from subspace_lab.continual.context import TaskContext
from subspace_lab.errors import UserError
from subspace_lab.linalg.energy import energy_directions
from subspace_lab.methods.continual.adapting import check_positive, check_share, groups_with_head
from subspace_lab.methods.continual.protecting import freeze_rest, weight_of
from subspace_lab.methods.continual.remembering import RememberingMethod
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
from subspace_lab.optim.traits import OptimizerFactory
from subspace_lab.subspaces.within import Sketched

ATTENTION_OUTPUT = r"attn\.proj$"


class CoSO(RememberingMethod):
    """Any optimizer in a gradient's leading subspace, outside the directions of earlier tasks.

    Args:
        r1: directions of an update.
        r2: columns of the sketch of a task's gradients.
        every: steps between new directions (K).
        threshold: share ε of the sketch's energy that joins the memory at the end of a task.
        side: ``output`` protects output directions (the release), ``input`` the answers to old inputs.
        variant: ``release`` shrinks the sketch twice, leaves the signs of singular vectors as they come and puts ε
            beside √v before bias correction; ``paper`` is plain frequent directions, and a new direction takes the sign
            that agrees with the one it replaces.
        solver: ``gram`` finds directions from the Gram matrix of the gradient's short side, ``svd`` by LAPACK.
        targets: regular expressions on the paths of the layers to train; null takes the attention blocks' output
            projections (``attn.proj``) where there are any, else every layer.
        head_lr: learning rate of the head; null: the optimizer's.
        temperature: divides the logits in training.
    """

    name: ClassVar[str] = "coso"

    def __init__(
        self,
        r1: int = 15,
        r2: int = 100,
        every: int = 1,
        threshold: float = 0.98,
        side: Literal["output", "input"] = "output",
        variant: Literal["release", "paper"] = "release",
        solver: Literal["gram", "svd"] = "gram",
        targets: Sequence[str] | None = None,
        head_lr: float | None = None,
        temperature: float = 3.0,
    ) -> None:
        for option, value in {"r1": r1, "r2": r2, "every": every, "temperature": temperature}.items():
            check_positive(value, option)
        if head_lr is not None:
            check_positive(head_lr, "head_lr")
        check_share(threshold, "threshold")
        super().__init__()
        self.r1, self.r2, self.every, self.threshold = r1, r2, every, threshold
        self.side, self.variant, self.solver = side, variant, solver
        self.targets, self.head_lr, self.temperature = targets, head_lr, temperature
        self._optimizer: SubspaceOptimizer | None = None
        self._layers: Layers = {}

    @override
    def install(self, model: nn.Module, index: int) -> None:
        self._layers = self._choose(model)
        freeze_rest(model, self._layers)

    def _choose(self, model: nn.Module) -> Layers:
        if self.targets is not None:
            return protected_layers(model, self.targets)
        layers = protected_layers(model)
        attention = protected_layers(model, [ATTENTION_OUTPUT]) if any("attn.proj" in path for path in layers) else {}
        return attention or layers

    @override
    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        subspace = Sketched(
            self.r1,
            {weight_of(path): M for path, M in self.memory.items()},
            sketch=self.r2,
            shrink="double" if self.variant == "release" else "single",
            solver=self.solver,
            side="left" if self.side == "output" else "right",
            align_signs=self.variant == "paper",
        )
        return groups_with_head(model, {weight_of(path) for path in self._layers}, self.head_lr, subspace=subspace)

    @override
    def build_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        self._optimizer = SubspaceOptimizer(
            self.param_groups(model),
            factory,
            refresh_every=self.every,
            moments="keep",
            eps_before_correction=self.variant == "release",
        )
        return self._optimizer

    @override
    @torch.no_grad()
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        if self._optimizer is None:
            raise UserError("CoSO has no sketch of this task: its optimizer was never built")
        found = {}
        for path in task.split(list(self._layers)):
            S = self._optimizer.directions(weight_of(path))["sketch"].double()
            # GPM's rule for a first task: the sketch was taken outside the memory as it is.
            new = energy_directions(S @ S.mT, None, self.threshold)
            self.memory.extend(path, new)
            found[path] = self.memory[path]
        for path, M in task.gather(found).items():
            self.memory.put(path, M)
        self._optimizer = None

    @override
    def metrics(self) -> dict[str, Any]:
        return self._optimizer.metrics() if self._optimizer is not None else {}
