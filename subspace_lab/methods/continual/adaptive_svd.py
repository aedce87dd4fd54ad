"""Sculpting subspaces: full fine-tuning in the directions that a weight uses least (adaptive SVD, OSFT).

Nayak et al., arXiv 2504.07097; released code Red-Hat-AI-Innovation-Team/orthogonal-subspace-learning and mini_trainer.
Before each task, for every weight:

    W = U_h S_h V_hᵀ + U_l S_l V_lᵀ      the r leading singular triplets are "high": what old tasks live on
    train with   U_hᵀ ΔW = 0,   ΔW V_h = 0

    r / min(out, in) = mrr + I (trr − mrr),    I = mean cos(x, W x) over a layer's inputs, over the mean of all layers

The papers train U_l, S_l and V_l, keeping the gradients of U_l and V_l orthogonal to U_h and V_h.  Here the weight
itself is trained in the two-sided complement of (U_h, V_h), with coordinates of its own shape.  Both reach the same
weights: whatever satisfies the two equations is a low part.  But the constraint on factors holds for their gradients
only: AdamW divides them entry by entry and its steps leave the complement (half of an update's norm, on PEFT's OSF),
while a projection of the *step* cannot leak.  The plain weight also needs no rebuilding in the forward pass, works
with any optimizer, and is its own export.  Coordinates U_⊥ᵀ G V_⊥ would be smaller, but then Adam would depend on how
the bases of the complements are turned, and these would have to be stored: (out − r)² + (in − r)² entries instead of
(out + in) r.

``variant: release`` is the schedule of the released T5 script: in task t ``growth`` · t of max(out, in) directions are
kept, at most min(out, in); none in the first.

A layer's inputs and outputs of different lengths are compared over the first min(out, in) entries, as released.  For
convolutions x is an unfolded patch.  Weights that this rule does not cover (biases, norms, embeddings) train only where
nothing is kept, in the first task of a model that was not trained before.

Here              paper
mrr, trr          minimum and target retention ratio
importance        I, of each layer
pairs             U_h, V_h of the coming task
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.continual.activations import Layers, protected_layers, stream_inputs
from subspace_lab.continual.context import TaskContext
from subspace_lab.errors import UserError
from subspace_lab.linalg.precision import full_precision
from subspace_lab.methods.continual.adapting import check_share
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.protecting import freeze_rest, weight_of
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
from subspace_lab.optim.traits import OptimizerFactory
from subspace_lab.subspaces.two_sided import TwoSided


class AdaptiveSVD(ContinualMethod):
    """Any optimizer on the whole weight, leaving its leading singular vectors alone.

    Args:
        mrr: share of the directions kept in a layer of no importance (minimum retention ratio).
        trr: share kept in a layer of mean importance (target retention ratio).
        variant: ``paper`` sets ranks by importance, ``release`` by the number of tasks behind.
        growth: share of max(out, in) that each task adds, with ``release``.
        pretrained: whether the first task, too, keeps what the weights hold (``paper`` only).
        samples: training examples on which importance is measured; null takes all.
        targets: regular expressions on the paths of the layers; null takes all linear and convolution layers but the
            heads of single tasks.
    """

    name: ClassVar[str] = "adaptive_svd"

    def __init__(
        self,
        mrr: float = 0.1,
        trr: float = 0.8,
        variant: Literal["paper", "release"] = "paper",
        growth: float = 0.07,
        pretrained: bool = False,
        samples: int | None = 128,
        targets: Sequence[str] | None = None,
    ) -> None:
        check_share(trr, "trr")
        check_share(growth, "growth")
        if not 0 <= mrr <= trr:
            raise UserError(f"method.mrr must be between 0 and method.trr={trr}, not {mrr}")
        if samples is not None and samples < 1:
            raise UserError(f"method.samples={samples}: expected a positive number, or null for all examples")
        self.mrr, self.trr, self.variant, self.growth = mrr, trr, variant, growth
        self.pretrained, self.samples, self.targets = pretrained, samples, targets
        self.importance: dict[str, float] = {}
        self.pairs: dict[str, tuple[Tensor, Tensor]] = {}
        self._shapes: dict[str, int] = {}

    @override
    @torch.no_grad()
    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        """Measure importance if no task has, and decompose every weight."""
        layers = protected_layers(model, self.targets)
        self.pairs = {}
        if task.index == 0 and (self.variant == "release" or not self.pretrained):
            return
        if self.variant == "paper" and not self.importance:
            self._measure(model, task)
        found: dict[str, Tensor] = {}
        ranks = self._ranks(layers, task.index)
        for path in task.split(list(layers)):  # minutes for a model of some billions of weights
            U, V = leading_pair(_weight(layers[path]), ranks[path])
            found |= {f"U/{path}": U, f"V/{path}": V}
        found = task.gather(found)
        self.pairs = {path: (found[f"U/{path}"], found[f"V/{path}"]) for path in layers}

    @override
    def install(self, model: nn.Module, index: int) -> None:
        layers = protected_layers(model, self.targets)
        self._shapes = {path: min(_weight(layer).shape) for path, layer in layers.items()}
        if self.pairs:
            freeze_rest(model, layers)

    @override
    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        pairs = {weight_of(path): pair for path, pair in self.pairs.items()}
        if not pairs:
            return super().param_groups(model)
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        inside = [item for item in named if item[0] in pairs]
        outside = [item for item in named if item[0] not in pairs]
        groups: list[dict[str, Any]] = [{"params": inside, "subspace": TwoSided(pairs), "kind": "matrix"}]
        return groups + ([{"params": outside, "kind": "other"}] if outside else [])

    @override
    def build_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        groups = self.param_groups(model)
        return SubspaceOptimizer(groups, factory, refresh_every=0) if self.pairs else factory(groups)

    @override
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        """Measure how important each layer is to the finished task."""
        if self.variant == "paper":
            self._measure(model, task)

    def _measure(self, model: nn.Module, task: TaskContext) -> None:
        layers = protected_layers(model, self.targets)
        values: dict[str, Tensor] = {}
        if task.leads:
            measured = importances(model, layers, task, self.samples)
            values = {path: torch.tensor(value) for path, value in measured.items()}
        self.importance = {path: float(value) for path, value in task.share(values).items()}

    def _ranks(self, layers: Layers, index: int) -> dict[str, int]:
        """Directions kept in each layer: of min(out, in), at least 1."""
        ranks = {}
        # A negative cosine is no importance; if no layer has any, none ranks above another.
        importance = {path: max(0.0, value) for path, value in self.importance.items()}
        mean = sum(importance.values()) / max(1, len(importance))
        for path, layer in layers.items():
            shape = _weight(layer).shape
            d = min(shape)
            if self.variant == "release":
                ranks[path] = min(d, max(1, int(self.growth * index * max(shape) + 1e-9)))
                continue
            share = importance[path] / mean if mean > 0 else 1.0
            ranks[path] = min(d, max(1, round(d * (self.mrr + share * (self.trr - self.mrr)))))
        return ranks

    @override
    def ranks(self) -> dict[str, int]:
        return {path: pair[0].shape[1] for path, pair in self.pairs.items()}

    @override
    def dimensions(self) -> dict[str, int]:
        return dict(self._shapes)

    @override
    def basis_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.pairs.values() for t in pair)

    @override
    def state_dict(self) -> dict[str, Any]:
        pairs = {path: {"U": U.detach().cpu(), "V": V.detach().cpu()} for path, (U, V) in self.pairs.items()}
        return {"importance": dict(self.importance), "pairs": pairs}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.importance = dict(state["importance"])
        self.pairs = {path: (pair["U"].clone(), pair["V"].clone()) for path, pair in state["pairs"].items()}


def _weight(layer: nn.Module) -> Tensor:
    """A layer's weight as (out, in): convolutions in the order of unfolded patches."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.detach().flatten(1)


@full_precision
def leading_pair(W: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U (out, r) and V (in, r): the leading singular vectors of W (out, in), float32, orthonormal to rounding."""
    U, _, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :rank].float().contiguous(), Vh[:rank].mT.float().contiguous()


def importances(model: nn.Module, layers: Layers, task: TaskContext, samples: int | None) -> dict[str, float]:
    """Mean cosine between each layer's input rows and their products with its weight, bias left out (§3.2).

    Args:
        model: on its device.
        layers: path -> layer.
        task: gives examples and runs the model.
        samples: how many examples; None: all.
    """
    sums = {path: torch.zeros(2, dtype=torch.float64, device=task.device) for path in layers}

    def add(path: str, X: Tensor) -> None:
        W = _weight(layers[path])
        d = min(W.shape)
        x, y = X[:, :d], X.to(W.dtype) @ W[:d].mT
        cosines = nn.functional.cosine_similarity(x.double(), y.double(), dim=1)
        sums[path] += torch.stack([cosines.sum(), cosines.new_tensor(float(len(x)))])

    stream_inputs(model, layers, task.batches(count=samples, purpose="importance"), task.forward, add)
    return {path: float(total[0] / total[1].clamp_min(1)) for path, total in sums.items()}
