"""Backward feature projection: old features stay a linear function of the new ones.

Gu, Shim & Shkurti, "Preserving Linear Separability in Continual Learning by Backward Feature Projection", CVPR 2023,
arXiv 2303.14595 (release: rvl-lab-utoronto/BFP).

    L = L_replay + γ · mean_i ‖A h(x_i) + b − h_old(x_i)‖₂ / √d

    L_replay      ER's, DER's or DER++'s loss; see `replay`
    h, d          features before the output layer, and how many
    h_old         of the network as it was at the end of the last task, in evaluation mode
    x_i           the batch of the task and a third draw from the reservoir together
    A, b          `projection`: linear (drawn anew for each task, trained by its own SGD beside the network), an mlp
                  of two layers, or identity: A = I, b = 0, which is feature distillation
    γ             `gamma`; 0 with targets=stored is DER++
"""

from __future__ import annotations

import copy
import math
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.features import Glimpse, all_logits, feature_size, watching
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.linalg.random import derive_key
from subspace_lab.methods.continual.base import Loss
from subspace_lab.methods.continual.replay import Replay, check_weight
from subspace_lab.models.initialization import bell_

Projection = Literal["identity", "linear", "mlp"]
Targets = Literal["stored", "old_model"]


class BFP(Replay):
    """Replay, and the new features are to be turned into the old ones by a linear map.

    Args:
        gamma: weight of the projection's loss (the release's alpha_bfp); 0 is DER++ (or ER).
        projection: see the file's head.
        projection_lr: learning rate of A and b.
        projection_momentum: of their SGD.
        targets: replayed logits are compared with those that were stored, or with the old model's, as in the release
            (which takes the stored ones in the first task).
        buffer_size: see `Replay`, as all that follow.
        minibatch_size: examples per process and draw.
        alpha: weight of the squared error of replayed logits.
        beta: weight of the loss on replayed labels.
        balanced: keep classes in equal numbers.
    """

    name: ClassVar[str] = "bfp"

    def __init__(
        self,
        gamma: float = 1.0,
        projection: Projection = "linear",
        projection_lr: float = 0.1,
        projection_momentum: float = 0.9,
        targets: Targets = "old_model",
        buffer_size: int = 200,
        minibatch_size: int = 32,
        alpha: float = 0.1,
        beta: float = 0.5,
        balanced: bool = True,
    ) -> None:
        super().__init__(buffer_size, minibatch_size, alpha, beta, balanced)
        check_weight("gamma", gamma)
        check_weight("projection_lr", projection_lr)
        if not 0 <= projection_momentum < 1:
            raise UserError(f"method.projection_momentum={projection_momentum}: expected a number in [0, 1)")
        self.gamma, self.projection, self.targets = gamma, projection, targets
        self._lr, self._momentum = projection_lr, projection_momentum
        self._old: nn.Module | None = None
        self._restored: dict[str, Any] = {}
        self._passes = 0

    @override
    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        super().begin_task(model, task)
        self._make_projection(feature_size(model), task.seed)

    def _make_projection(self, d: int, seed: int) -> None:
        widths = {"identity": 0, "linear": 1, "mlp": 2}[self.projection]
        layers: list[nn.Module] = []
        for number in range(widths):
            layer = nn.Linear(d, d)
            for name, p in layer.named_parameters():  # the spread of torch's own initialisation
                bell_(p.data, 1 / math.sqrt(3 * d), derive_key("bfp/1", seed, number, name))
            layers += [nn.ReLU(), layer] if layers else [layer]
        self._A = nn.Sequential(*layers)
        self._sgd = torch.optim.SGD(self._A.parameters(), self._lr, self._momentum) if layers else None

    @override
    def install(self, model: nn.Module, index: int) -> None:
        super().install(model, index)
        device = next(model.parameters()).device
        if self._restored:
            self._make_projection(feature_size(model), 0)
            self._A.load_state_dict(self._restored["projection"])
        self._A.to(device)
        if self._restored:
            if self._sgd is not None:
                self._sgd.load_state_dict(self._restored["sgd"])
            if self._restored["old"] is not None:
                self._old = _frozen_copy(model)
                self._old.load_state_dict(self._restored["old"])
            self._restored = {}

    @override
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        self._restored = {}
        self._old = _frozen_copy(model)

    @override
    def _targets(self, rows: dict[str, Tensor]) -> Tensor:
        if self._old is None or self.targets == "stored":
            return super()._targets(rows)
        with torch.no_grad(), watching(self._old) as past:
            self._old(rows["inputs"])
            return all_logits(self._old, past.features).float()

    @override
    def _rehearsal(
        self, model: nn.Module, batch: Batch, features: Tensor, loss: Loss, glimpse: Glimpse
    ) -> Tensor | float:
        total = super()._rehearsal(model, batch, features, loss, glimpse)
        if self._old is None or not self.gamma:
            return total
        rows = self.reservoir.draw(self.minibatch_size)
        model(rows["inputs"])
        h = torch.cat([features, glimpse.features])
        with torch.no_grad(), watching(self._old) as past:
            self._old(torch.cat([batch["inputs"], rows["inputs"]]))
        with torch.autocast(h.device.type, enabled=False):
            return total + self.gamma * self._match(h.float(), past.features.float())

    def _match(self, h: Tensor, h_old: Tensor) -> Tensor:
        """Return mean_i ‖A h_i + b − h_old,i‖ / √d, and leave A and b their gradient.

        Theirs is computed apart: no loss scale, no clipping and no averaging by a strategy that does not know them.
        """
        if self._sgd is not None:
            own = self.gamma * _distance(self._A(h.detach()), h_old)
            own.backward()  # type: ignore[no-untyped-call]
            self._passes += 1
        fixed = {name: p.detach() for name, p in self._A.named_parameters()}
        return _distance(functional_call(self._A, fixed, (h,)), h_old)

    @override
    def after_step(self, optimizer: Optimizer) -> None:
        """Step A and b, on the mean of the micro-batches and processes."""
        if not self._passes or self._sgd is None:
            return
        for p in self._A.parameters():
            assert p.grad is not None
            if dist.is_initialized():
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()
            p.grad /= self._passes
        self._sgd.step()
        self._sgd.zero_grad()
        self._passes = 0

    @override
    def basis_bytes(self) -> int:
        old = [] if self._old is None else [*self._old.parameters(), *self._old.buffers()]
        return super().basis_bytes() + sum(tensor.numel() * tensor.element_size() for tensor in old)

    @override
    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict() | self._restored
        if self._reservoir is not None and not self._restored:
            state["projection"] = {name: p.clone() for name, p in self._A.state_dict().items()}
            state["sgd"] = copy.deepcopy(self._sgd.state_dict()) if self._sgd is not None else None
            state["old"] = {n: p.clone() for n, p in self._old.state_dict().items()} if self._old is not None else None
        return state

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._restored = {name: state[name] for name in ("projection", "sgd", "old") if name in state}


def _frozen_copy(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def _distance(a: Tensor, b: Tensor) -> Tensor:
    distances: Tensor = torch.linalg.vector_norm(a - b, dim=1)
    return distances.mean() / math.sqrt(a.shape[1])
