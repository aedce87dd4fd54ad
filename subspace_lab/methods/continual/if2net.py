"""IF2Net: frozen random features, and output weights that are updated where they do not disturb old answers.

Li, Wang, Xu, Zhong, Zeng & Zeng, "IF2Net: Innately Forgetting-Free Networks for Continual Learning", 2023,
arXiv 2306.10480. Only the abstract could be checked: weights below the output are random, frozen and reused;
updates of the output weights are projected so that they do not disturb what was learnt; no task is told at test time.
The equations below are the recursive least squares that this amounts to, not a transcription; the paper's adjustment
of representations to each task is not here.

    H = relu(h(x) R + r)                    random features of the batch, or of all of the task's examples, (N, m)
    P ← P − P Hᵀ (I + H P Hᵀ)⁻¹ H P,        P = I/λ at first
    W ← W + P Hᵀ (Y − H W)                  (with the new P)

λP is a projector onto the complement of all features seen, up to the ridge λ (exactly, as λ → 0), so updates leave the
answers to old inputs in place; and W is at any time the ridge solution over all examples of all tasks, whose order and
division do not matter.

    h(x)    features before the model's output layer (the layer itself is not used), in evaluation mode
    R, r    (n, m), (m,): drawn once, entries of variance 1/n and 1; `width` is m
    λ       `ridge`
    Y       one-hot labels over all outputs
    A       P⁻¹ = λI + Σ HᵀH, kept in P's place: sums lose no symmetry and come from processes in any order
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.features import evaluating, feature_size, outputs, watching
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.models.initialization import bell_
from subspace_lab.training.tasks import logits_of


class IF2Net(ContinualMethod):
    """Random features of a frozen model and recursive least squares; each example is seen once, nothing is trained.

    Args:
        width: random features, m.
        ridge: λ.
    """

    name: ClassVar[str] = "if2net"
    trains: ClassVar[bool] = False

    def __init__(self, width: int = 2000, ridge: float = 1.0) -> None:
        if width < 1:
            raise UserError(f"method.width={width}: expected at least 1")
        if not (ridge > 0 and math.isfinite(ridge)):
            raise UserError(f"method.ridge={ridge}: expected a positive number")
        self.width, self.ridge = width, ridge
        self._seed: int | None = None
        self._A: Tensor | None = None  # (m, m) float64
        self._W: Tensor | None = None  # (m, outputs) float64
        self._occupied = 0
        self._weights: tuple[Tensor, Tensor] | None = None

    @override
    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        if self._seed is None:
            self._seed = task.seed

    @override
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        G = torch.zeros(self.width, self.width, dtype=torch.float64, device=task.device)
        C = torch.zeros(self.width, outputs(model), dtype=torch.float64, device=task.device)
        if task.leads:
            with torch.no_grad(), evaluating(model):
                for batch in task.batches():
                    H = self.random_features(model, batch).double()
                    G.addmm_(H.mT, H)
                    C.index_add_(1, batch["labels"], H.mT)
        shared = task.share({"G": G, "C": C})
        G, C = shared["G"], shared["C"]
        eye = torch.eye(self.width, dtype=G.dtype, device=G.device)
        A = G + (self.ridge * eye if self._A is None else self._A.to(G))
        W = torch.zeros_like(C) if self._W is None else self._W.to(C)
        L = torch.linalg.cholesky(A)
        self._A, self._W = A, W + torch.cholesky_solve(C - G @ W, L)
        self._occupied = round(self.width - self.ridge * float(torch.cholesky_inverse(L).trace()))

    def random_features(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return H (b, m), float32."""
        with watching(model) as glimpse:
            logits_of(model, batch)
        h = glimpse.features.float()
        if self._weights is None or self._weights[0].device != h.device:
            n = feature_size(model)
            R, r = h.new_empty(n, self.width), h.new_empty(self.width)
            bell_(R, 1 / math.sqrt(n), derive_key("if2net/1", self._seed or 0, "R"))
            bell_(r, 1.0, derive_key("if2net/1", self._seed or 0, "r"))
            self._weights = R, r
        R, r = self._weights
        return torch.relu(h @ R + r)

    @override
    def scores(self, model: nn.Module, batch: Batch, columns: range) -> Tensor | None:
        """Return H W (b, len(columns)) in float32."""
        if self._W is None:
            return None
        H = self.random_features(model, batch)
        return H @ self._W[:, columns.start : columns.stop].to(H)

    @override
    def ranks(self) -> dict[str, int]:
        """Effective directions of the random features that are taken: tr(I − λP), rounded."""
        return {"random_features": self._occupied}

    @override
    def basis_bytes(self) -> int:
        kept = [tensor for tensor in (self._A, self._W) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed, "A": self._A, "W": self._W, "occupied": self._occupied}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._seed, self._A, self._W = state["seed"], state["A"], state["W"]
        self._occupied = state["occupied"]
        self._weights = None
