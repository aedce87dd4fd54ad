"""Fisher-weighted averaging: each parameter where the models that depend on it want it.

Matena & Raffel, NeurIPS 2022, arXiv 2111.09832; released code mmatena/model_merging.  With F_t the diagonal Fisher
information of model t on its own training examples, exact in the labels y:

    F_t = mean_x Σ_y p(y|x; W_t) (∂ log p(y|x; W_t) / ∂W)²        entry by entry, of every example on its own
    W = Σ_t F_t W_t / Σ_t F_t  =  W0 + Σ_t F_t D_t / Σ_t F_t

As in the release, and not in the equation: entries of F_t below `floor` are raised to it, and each F_t is divided by
its L2 norm over all parameters (taken before the floor), so that no task outweighs another by its scale.  The release
raises the first model's alone unless told otherwise, which favours that model where no F_t says anything; here the
tasks are equals and all are raised.  It takes 4096 examples; 256 is what is usual for vision models (FusionBench).

Squaring the gradient of a batch, or of Σ_y √p_y log p_y, as other code does, gives cross terms and not this Fisher.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from typing_extensions import override

from subspace_lab.data.packing import Batch
from subspace_lab.merging.base import Stack
from subspace_lab.merging.learning import (
    LearningMerge,
    check_positive,
    draw_seed,
    entries,
    floating,
    stop_if_asked,
    under,
)
from subspace_lab.merging.workshop import Workshop

_ENTRIES = 1 << 24  # of per-example gradients at a time: 64 MiB in float32


class Fisher(LearningMerge):
    """Mean of the models, weighted by diagonal Fisher information.

    Args:
        examples: training examples of each task.
        normalize: divide each Fisher by its L2 norm.
        floor: least entry.
    """

    elementwise: ClassVar[bool] = True
    needs_base: ClassVar[bool] = False

    def __init__(self, examples: int = 256, normalize: bool = True, floor: float = 1e-6) -> None:
        super().__init__()
        check_positive(examples=examples, floor=floor)
        self.examples, self.normalize, self.floor = examples, normalize, floor
        self._weights: list[dict[str, Tensor]] = []
        self._learned: dict[str, Any] = {}

    @override
    def learn(self, workshop: Workshop) -> None:
        self._weights = []
        norms = []
        for t, task in enumerate(workshop.tasks):
            F = diagonal_fisher(workshop, t, self.examples)
            norm = torch.stack([f.square().sum() for f in F.values()]).sum().sqrt()
            norms.append(float(norm))
            factor = 1 / norm.clamp_min(torch.finfo(norm.dtype).tiny) if self.normalize else torch.ones_like(norm)
            weights = {name: f.clamp_min_(self.floor).mul_(factor) for name, f in F.items()}
            # Buffers have no Fisher: their plain mean.
            others = floating(workshop.base)
            self._weights.append({name: weights.get(name, torch.ones_like(W)) for name, W in others.items()})
            workshop.tell(f"{task.name}: Fisher information of L2 norm {norms[-1]:.3g}")
        self._learned = {"examples": self.examples, "norms": norms}

    @override
    def update(self, stack: Stack) -> Tensor:
        weighted: Tensor | None = None
        total: Tensor | None = None
        for D, weights in zip(stack.deltas(), self._weights, strict=True):
            F = entries(weights, stack).to(D)
            D.mul_(F)
            weighted = D if weighted is None else weighted.add_(D)
            total = F if total is None else total.add_(F)
        assert weighted is not None and total is not None
        return weighted.div_(total)

    @override
    def learned(self) -> dict[str, Any]:
        return self._learned

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return {f"{t}/{name}": F for t, weights in enumerate(self._weights) for name, F in weights.items()}

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        models = 1 + max(int(name.partition("/")[0]) for name in state)
        self._weights = [under(f"{t}/", state) for t in range(models)]


def diagonal_fisher(workshop: Workshop, t: int, examples: int) -> dict[str, Tensor]:
    """mean_x Σ_y p_y (∂ log p_y / ∂W)² of every parameter of model t on its own training examples.

    Examples are drawn without labels and each is differentiated on its own, so a model whose examples depend on one
    another (batch normalisation in training mode) cannot be meant; the workshop's is in evaluation mode.

    Returns:
        name -> float32 (float64 where the model is), shape of the parameter.
    """
    task = workshop.tasks[t]
    names = {name for name, _ in workshop.model.named_parameters()}
    tuned = {name: W.detach() for name, W in floating(workshop.models[t]).items()}
    parameters = {name: W for name, W in tuned.items() if name in names}
    buffers = {name: W for name, W in tuned.items() if name not in names}
    found = {name: torch.zeros_like(W, dtype=_wide(W)) for name, W in parameters.items()}
    wanted = min(examples, task.examples["train"])
    size = sum(W.numel() for W in parameters.values())
    together: int | None = None

    def one(example: Batch) -> list[Tensor]:
        def log_probabilities(weights: dict[str, Tensor]) -> Tensor:
            batch = {name: value.unsqueeze(0) for name, value in example.items()}
            logits = task.head(workshop.features({**weights, **buffers}, batch))[0]
            return functional.log_softmax(logits.float() if logits.dtype != torch.float64 else logits, dim=0)

        log_p, back, *_ = vjp(log_probabilities, parameters)
        p = log_p.exp()
        total: list[Tensor] | None = None
        eye = torch.eye(len(log_p), dtype=log_p.dtype, device=log_p.device)
        for rows in torch.split(eye, max(1, _ENTRIES // size)):
            (J,) = vmap(back)(rows)
            chosen = rows @ p
            parts = [torch.einsum("y,y...->...", chosen.to(_wide(g)), g.to(_wide(g)).square()) for g in J.values()]
            total = parts if total is None else [a + b for a, b in zip(total, parts, strict=True)]
        assert total is not None
        return total

    seen = 0
    stream = task.draw("train", min(32, wanted), draw_seed(workshop, "fisher", t))
    while seen < wanted:
        stop_if_asked()
        batch = {name: value[: wanted - seen] for name, value in next(stream).items() if name != "labels"}
        count = len(next(iter(batch.values())))
        if together is None:
            classes = len(task.head(workshop.features(tuned, {name: v[:1] for name, v in batch.items()}))[0])
            together = max(1, _ENTRIES // (size * classes))
        for first in range(0, count, together):
            part = {name: value[first : first + together] for name, value in batch.items()}
            with sdpa_kernel(SDPBackend.MATH):  # fused kernels have no rule for vmap
                squares = vmap(one)(part)
            for f, new in zip(found.values(), squares, strict=True):
                f += new.sum(0)
        seen += count
    return {name: f.div_(seen) for name, f in found.items()}


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
