"""Replay of kept examples: ER, DER and DER++.

Buzzega et al., "Dark Experience for General Continual Learning: a Strong, Simple Baseline", NeurIPS 2020,
arXiv 2004.07211.

    L = ℓ(f(x), y) + α · mean (f(x') − z')² + β · ℓ(f(x''), y'')

    (x, y)        the batch of the task that is trained; f its logits
    x', z'        `minibatch_size` examples of the reservoir with the logits they had when they were put there
    x'', y''      another draw, with labels
    α, β          `alpha`, `beta`: ER is (0, 1), DER (α, 0), DER++ (α, β)

Logits are kept and compared over all outputs, as published, also those of classes that nobody has seen yet: it is what
holds the logits of new classes down on old examples (without it DER alone forgets like fine-tuning). The heads of later
tasks are therefore trained too. What is kept and replayed are the inputs as they were trained on, augmented ones as
augmented; they are not augmented again.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.features import Glimpse, all_logits, outputs, watching
from subspace_lab.continual.reservoir import Reservoir
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.base import ContinualMethod, Loss
from subspace_lab.models.task_heads import find_task_heads


class Replay(ContinualMethod):
    """Experience replay: a reservoir of old examples is rehearsed beside every batch.

    All processes of a run keep the same reservoir (each sees what the others train on) and divide what is drawn from
    it. The training loss has to compare all classes seen so far: scenario.loss_over=seen, or a single head.

    Args:
        buffer_size: examples kept.
        minibatch_size: examples per process and draw.
        alpha: weight of the squared error of replayed logits.
        beta: weight of the loss on replayed labels.
        balanced: keep classes in equal numbers; see `Reservoir`.
    """

    name: ClassVar[str] = "replay"

    def __init__(
        self,
        buffer_size: int = 200,
        minibatch_size: int = 32,
        alpha: float = 0.0,
        beta: float = 1.0,
        balanced: bool = False,
    ) -> None:
        for key, count in (("buffer_size", buffer_size), ("minibatch_size", minibatch_size)):
            if count < 1:
                raise UserError(f"method.{key}={count}: expected at least 1")
        for key, weight in (("alpha", alpha), ("beta", beta)):
            check_weight(key, weight)
        self.buffer_size, self.minibatch_size = buffer_size, minibatch_size
        self.alpha, self.beta, self.balanced = alpha, beta, balanced
        self._reservoir: Reservoir | None = None
        self._width = 0

    @property
    def reservoir(self) -> Reservoir:
        """The kept examples, once the first task has begun."""
        if self._reservoir is None:
            raise RuntimeError("begin_task() comes first")
        return self._reservoir

    @override
    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        if self._reservoir is None:
            self._reservoir = Reservoir(self.buffer_size, task.seed, self.balanced, outputs(model))

    @override
    def install(self, model: nn.Module, index: int) -> None:
        """Train old heads by replayed examples and, where logits are kept, later ones by theirs."""
        heads = find_task_heads(model)
        if heads is not None:
            heads.train_only(range(len(heads.sizes) if self.alpha else index + 1))
        self._width = outputs(model, index + 1)
        self.reservoir.to(next(model.parameters()).device)

    @override
    def objective(self, model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
        if "inputs" not in batch or batch["labels"].is_floating_point():
            kind = "labels that are whole, not mixed" if "inputs" in batch else "inputs of one shape, such as images"
            raise UserError(f"method={self.name} replays examples with {kind}")
        with watching(model) as glimpse:
            total = loss(model, batch)
            features, logits = glimpse.features, glimpse.logits
            if logits.shape[1] != self._width:
                found = f"{logits.shape[1]} of the {self._width} classes seen so far"
                raise UserError(f"method={self.name}: the loss compares {found}", hint="scenario.loss_over=seen")
            if len(self.reservoir):
                total = total + self._rehearsal(model, batch, features, loss, glimpse)
            elif self.alpha:  # the first batch trains no later head, and DDP waits for the gradient of each
                total = total + 0.0 * all_logits(model, features).float().sum()
        kept = {"inputs": batch["inputs"], "labels": batch["labels"]}
        if self.alpha:
            with torch.no_grad():
                kept["logits"] = all_logits(model, features).float()
        self.reservoir.add(kept)
        return total

    def _rehearsal(
        self, model: nn.Module, batch: Batch, features: Tensor, loss: Loss, glimpse: Glimpse
    ) -> Tensor | float:
        """Return the weighted losses on replayed examples."""
        total: Tensor | float = 0.0
        if self.alpha:
            rows = self.reservoir.draw(self.minibatch_size)
            model(rows["inputs"])
            logits = all_logits(model, glimpse.features).float()
            total = total + self.alpha * nn.functional.mse_loss(logits, self._targets(rows))
        if self.beta:
            rows = self.reservoir.draw(self.minibatch_size)
            total = total + self.beta * loss(model, {"inputs": rows["inputs"], "labels": rows["labels"]})
        return total

    def _targets(self, rows: dict[str, Tensor]) -> Tensor:
        """Return the logits (k, all outputs) that replayed examples are to keep."""
        return rows["logits"]

    @override
    def basis_bytes(self) -> int:
        return self._reservoir.bytes() if self._reservoir is not None else 0

    @override
    def state_dict(self) -> dict[str, Any]:
        return {} if self._reservoir is None else {"reservoir": self._reservoir.state_dict()}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reservoir = Reservoir.from_state(state["reservoir"]) if "reservoir" in state else None


def check_weight(key: str, value: float) -> None:
    """Refuse what is no weight of a loss."""
    if not (value >= 0 and math.isfinite(value)):
        raise UserError(f"method.{key}={value}: expected a number of at least 0")
