"""Nearest mean classifier on frozen features.

Janson, Zhang, Aljundi & Elhoseiny, "A Simple Baseline that Questions the Use of Pretrained-Models in Continual
Learning", 2022, arXiv 2210.04428 (release: Pauljanson002/pretrained-cl).

    φ(x) = h(x) / ‖h(x)‖₂,    μ_c = Σ_{y_i = c} φ(x_i) / n_c,    answer: argmin_c ‖φ(x) − μ_c‖₂

    h      features before the output layer, in evaluation mode; nothing is trained
    μ_c    mean of class c, itself not normalised; `_sums` / `_counts`: running sums, so that a class may come again

The release prints the mean over sessions of the accuracy on all classes so far (`average_incremental_accuracy` here).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.features import evaluating, feature_size, outputs, watching
from subspace_lab.data.packing import Batch
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.training.tasks import logits_of


class NearestMean(ContinualMethod):
    """Answers with the class whose mean feature is nearest; each class is gone through once and nothing is trained."""

    name: ClassVar[str] = "nmc"
    trains: ClassVar[bool] = False

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (outputs, n) float64
        self._counts: Tensor | None = None  # (outputs,) float64

    @override
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        sums = torch.zeros(outputs(model), feature_size(model), dtype=torch.float64, device=task.device)
        counts = torch.zeros(len(sums), dtype=torch.float64, device=task.device)
        if task.leads:
            with torch.no_grad(), evaluating(model):
                for batch in task.batches():
                    features, labels = _unit_features(model, batch).double(), batch["labels"]
                    sums.index_add_(0, labels, features)
                    counts.index_add_(0, labels, torch.ones_like(labels, dtype=torch.float64))
        shared = task.share({"sums": sums, "counts": counts})
        self._sums = shared["sums"] if self._sums is None else self._sums.to(sums) + shared["sums"]
        self._counts = shared["counts"] if self._counts is None else self._counts.to(counts) + shared["counts"]

    @override
    def scores(self, model: nn.Module, batch: Batch, columns: range) -> Tensor | None:
        """Return negative distances (b, len(columns)); −∞ for classes without examples so far."""
        if self._sums is None or self._counts is None:
            return None
        features = _unit_features(model, batch)
        counts = self._counts[columns.start : columns.stop].to(features.device)
        sums = self._sums[columns.start : columns.stop].to(features.device)
        means = (sums / counts.clamp_min(1)[:, None]).to(features.dtype)
        # Without the shortcut over inner products, which loses the digits that small differences need.
        distances = torch.cdist(features, means, compute_mode="donot_use_mm_for_euclid_dist")
        return (-distances).masked_fill(counts == 0, -torch.inf)

    @override
    def basis_bytes(self) -> int:
        kept = [tensor for tensor in (self._sums, self._counts) if tensor is not None]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._sums is None else {"sums": self._sums, "counts": self._counts}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._sums, self._counts = state.get("sums"), state.get("counts")


def _unit_features(model: nn.Module, batch: Batch) -> Tensor:
    with watching(model) as glimpse:
        logits_of(model, batch)
    return nn.functional.normalize(glimpse.features.float(), dim=1)
