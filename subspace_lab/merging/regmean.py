"""RegMean: the linear layers that give closest to what each model's own layer gives on its own inputs.

Jin et al., ICLR 2023, arXiv 2212.09849; released code bloomberg/dataless-model-merging.  With X_t the inputs (rows) of
a layer inside model t on examples of its task, and W_t (out, in):

    G_t = X_tᵀ X_t / rows,        off the diagonal times `reduction`
    W = (Σ_t W_t G_t)(Σ_t G_t)⁻¹  =  W0 + (Σ_t D_t G_t)(Σ_t G_t)⁻¹

which minimises Σ_t ‖X_t Wᵀ − X_t W_tᵀ‖² / rows for reduction = 1.  Everything but the weights of linear layers (here
also of convolutions, whose inputs are patches) is averaged.  Inputs that no task uses would leave Σ G_t singular: every
G_t gets 1e-6 of its mean diagonal, so there the mean holds.  The release inverts in float32; this solves in float64.

`reduction` is 0.9 or 0.1 in the release, by task and model; FusionBench has 0.95 for CLIP and 256 examples, the release
1000 batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.continual.activations import LARGEST_GRAM, input_rows, input_size
from subspace_lab.errors import UserError
from subspace_lab.linalg.precision import matmul
from subspace_lab.merging.base import Stack
from subspace_lab.merging.learning import (
    LearningMerge,
    check_positive,
    draw_seed,
    floating,
    source_name,
    stop_if_asked,
    under,
)
from subspace_lab.merging.workshop import Workshop

_RIDGE = 1e-6


class RegMean(LearningMerge):
    """Least squares on the inputs of every linear layer.

    Args:
        examples: training examples of each task.
        reduction: factor of the Gram matrices off their diagonals, 0 to 1.
    """

    needs_base: ClassVar[bool] = False

    def __init__(self, examples: int = 256, reduction: float = 0.9) -> None:
        super().__init__()
        check_positive(examples=examples)
        if not 0 <= reduction <= 1:
            raise UserError(f"method.reduction={reduction}: expected 0 to 1")
        self.examples, self.reduction = examples, reduction
        self._weighted: dict[str, Tensor] = {}
        self._grams: dict[str, Tensor] = {}
        self._learned: dict[str, Any] = {}

    @override
    def learn(self, workshop: Workshop) -> None:
        self._weighted, self._grams = {}, {}
        base = floating(workshop.base)
        for t, task in enumerate(workshop.tasks):
            for path, G in input_second_moments(workshop, t, self.examples).items():
                G = self._reduced(G)
                name = f"{path}.weight"
                D = (workshop.models[t][name].double() - base[name].double()).flatten(1) @ G
                if t == 0:
                    self._weighted[name], self._grams[name] = D, G
                else:
                    self._weighted[name] += D
                    self._grams[name] += G
            workshop.tell(f"{task.name}: inputs of {len(self._grams)} layers")
        self._learned = {"examples": self.examples, "layers": len(self._grams)}

    def _reduced(self, G: Tensor) -> Tensor:
        diagonal = G.diagonal()
        ridge = _RIDGE * diagonal.mean()
        return self.reduction * G + torch.diag((1 - self.reduction) * diagonal + ridge)

    @override
    def update(self, stack: Stack) -> Tensor:
        known = [k for k, name in enumerate(stack.names) if source_name(name) in self._grams]
        if not known:
            return stack.mean()
        found = stack.base() if len(known) == len(stack.names) else stack.mean()
        G = torch.stack([self._grams[source_name(stack.names[k])] for k in known]).to(found.device)
        right = torch.stack([self._right(stack.names[k], stack.shape[0]) for k in known]).to(found.device)
        U = torch.linalg.solve(G, right.mT).mT  # G is symmetric
        found[known] = U.reshape(len(known), *stack.shape).to(found.dtype)
        return found

    def _right(self, name: str, rows: int) -> Tensor:
        """Rows of Σ_t D_t G_t that belong to a tensor, or to a part of it."""
        part = name.partition("#")[2]
        start = int(part or 0) * rows
        return self._weighted[source_name(name)][start : start + rows]

    @override
    def learned(self) -> dict[str, Any]:
        return self._learned

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return {
            **{f"weighted/{name}": value for name, value in self._weighted.items()},
            **{f"grams/{name}": value for name, value in self._grams.items()},
        }

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._weighted, self._grams = under("weighted/", state), under("grams/", state)


@torch.no_grad()
def input_second_moments(workshop: Workshop, t: int, examples: int) -> dict[str, Tensor]:
    """X_tᵀ X_t / rows of each layer of model t on its own training examples, by path.

    Layers with more than 8192 inputs, convolutions in groups, and layers that the model never calls (those inside
    `nn.MultiheadAttention`) are left out.

    Returns:
        path -> float64 (d, d), on the device.
    """
    task = workshop.tasks[t]
    tuned = floating(workshop.models[t])
    layers = {
        path: module
        for path, module in workshop.model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
        and f"{path}.weight" in tuned
        and input_size(module) <= LARGEST_GRAM
        and getattr(module, "groups", 1) == 1
    }
    found: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def hook(path: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def watch(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            for X in input_rows(layer, arguments[0].detach()):
                X = X if X.dtype == torch.float64 else X.float()
                G = matmul(X.mT, X).double()
                found[path] = found[path].add_(G) if path in found else G
                rows[path] = rows.get(path, 0) + len(X)

        return watch

    handles = [layer.register_forward_pre_hook(hook(path)) for path, layer in layers.items()]
    try:
        wanted, seen = min(examples, task.examples["train"]), 0
        stream = task.draw("train", min(64, wanted), draw_seed(workshop, "regmean", t))
        while seen < wanted:
            stop_if_asked()
            batch = {name: value[: wanted - seen] for name, value in next(stream).items() if name != "labels"}
            workshop.features(tuned, batch)
            seen += len(next(iter(batch.values())))
    finally:
        for handle in handles:
            handle.remove()
    return {path: G.div_(rows[path]) for path, G in found.items()}
