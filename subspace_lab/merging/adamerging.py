"""AdaMerging: coefficients of task vectors that make predictions on unlabelled test examples sure.

Yang et al., ICLR 2024, arXiv 2310.02575; released code EnnengYang/AdaMerging.  With D_t = W_t − W0, k over tensors and
H the entropy of softmax:

    W_k(λ) = W0_k + Σ_t λ_tk D_tk
    λ <- Adam(λ, ∇_λ Σ_t mean_{x ∈ B_t} H(head_t(f(x; W(λ)))))        B_t: test images of task t, without labels

Layer-wise has a λ of its own for every tensor and task; task-wise one for every task.

Two settings are in use.  The release clamps λ to [0, 1] in the forward pass, takes two batches of 16 of each task a
step, and 500 steps: the defaults.  FusionBench does not clamp, takes one batch, and 1000 steps: clamp=false batches=1
steps=1000.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging.base import Stack
from subspace_lab.merging.coefficients import (
    Wise,
    adapt,
    clamped,
    coefficients_by_name,
    describe_coefficients,
    initial_coefficients,
    weighted_sum,
)
from subspace_lab.merging.entropy import TestEntropy
from subspace_lab.merging.learning import LearningMerge, check_positive, under
from subspace_lab.merging.task_vectors import TaskVectors
from subspace_lab.merging.workshop import Workshop


class AdaMerging(LearningMerge):
    """Coefficients learnt on the test images, without their labels.

    Args:
        wise: layer: λ of every tensor and task; task: of every task.
        initial: λ at the start.
        clamp: use λ clamped to [0, 1].
        lr: Adam's learning rate.
        steps: of Adam.
        batch_size: images of a batch.
        batches: of every task in a step.
    """

    elementwise: ClassVar[bool] = True
    transductive: ClassVar[bool] = True

    def __init__(
        self,
        wise: Wise = "layer",
        initial: float = 0.3,
        clamp: bool = True,
        lr: float = 1e-3,
        steps: int = 500,
        batch_size: int = 16,
        batches: int = 2,
    ) -> None:
        super().__init__()
        check_positive(lr=lr, batch_size=batch_size, batches=batches)
        if steps < 0:
            raise UserError(f"method.steps={steps}: expected 0 or more")
        self.wise, self.initial, self.clamp = wise, initial, clamp
        self.lr, self.steps, self.batch_size, self.batches = lr, steps, batch_size, batches
        self._coefficients: dict[str, Tensor] = {}
        self._learned: dict[str, Any] = {}

    @override
    def learn(self, workshop: Workshop) -> None:
        vectors = TaskVectors(workshop)
        objective = TestEntropy(workshop, self.batch_size, "adamerging", self.batches)
        raw = initial_coefficients(vectors, self.wise, self.initial, workshop.device)
        before = vectors.merged(raw.detach())
        adapt(raw, vectors.merged, objective, clamp=self.clamp, lr=self.lr, steps=self.steps, what="coefficients")
        used = clamped(raw.detach(), self.clamp)
        self._learned = describe_coefficients(used, self.steps, self.wise)
        self._learned["predictions"] = objective.report(before, vectors.merged(used))
        self._coefficients = coefficients_by_name(used, vectors)

    @override
    def update(self, stack: Stack) -> Tensor:
        return weighted_sum(stack, self._coefficients)

    @override
    def learned(self) -> dict[str, Any]:
        return self._learned

    @override
    def state_dict(self) -> dict[str, Tensor]:
        return {f"coefficients/{name}": value for name, value in self._coefficients.items()}

    @override
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._coefficients = under("coefficients/", state)
