"""HLOP: Hebbian learning of the protected subspace while a task is learnt; here with rates instead of spikes.

Xiao, Meng, Zhang, He & Lin, "Hebbian Learning based Orthogonal Projection for Continual Learning of Spiking Neural
Networks", ICLR 2024, arXiv 2402.11984.  Beside each layer, rows H of lateral weights learn the principal subspace of
its inputs x by Oja's subspace rule; old rows stay, new ones learn.  For every batch, of all processes, five times:

    y = H x,    x̂ = Hᵀ y,    ΔH = mean y (x − x̂)ᵀ, clamped to ±10,    v <- 0.9 v + 0.1 ΔH,    H_new <- H_new + η v
    W's gradient is that of the inputs x − H_oldᵀ H_old x

At the end of a task new rows join the old ones, and are made orthonormal to them: so the update of W avoids the merged
rows exactly, not only as well as they have converged (the release projects with the rows as they are).

Here            paper
memory[path]    H_oldᵀ  (d, k), orthonormal columns
rows[path]      H_new   (m, d)
velocity[path]  v       (m, d)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from typing_extensions import override

from subspace_lab.continual.activations import input_rows, input_size
from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.sharing import mean_over_processes
from subspace_lab.errors import UserError
from subspace_lab.linalg import derive_key
from subspace_lab.methods.continual.protecting import ProtectingMethod

CLAMP, KEEP, INNER = 10.0, 0.9, 5

Rows = int | float


class HLOP(ProtectingMethod):
    """Projection with a subspace that is learnt online.

    Args:
        rows: new rows in the first task, for each layer in order; the last entry counts for all further layers. A
            fraction below 1 is taken of the layer's inputs.
        more: the same for later tasks.
        fewer: by how much `more` shrinks each time; the same forms.
        fewer_every: tasks between two shrinkings.
        hebbian_lr: η.
        hebbian_lr_first: η of the first layer.
        targets: regular expressions on the paths of protected layers; None: all.
    """

    name: ClassVar[str] = "hlop"

    def __init__(
        self,
        rows: Sequence[Rows] = (80, 200, 100),
        more: Sequence[Rows] = (70,),
        fewer: Sequence[Rows] = (20,),
        fewer_every: int = 3,
        hebbian_lr: float = 0.01,
        hebbian_lr_first: float = 0.001,
        targets: Sequence[str] | None = None,
    ) -> None:
        for option, values in (("rows", rows), ("more", more), ("fewer", fewer)):
            if not values or any(v < 0 or (v > 1 and v != int(v)) for v in values):
                raise UserError(
                    f"method.{option}={list(values)}: expected numbers of rows, or fractions of a layer's inputs"
                )
        if fewer_every < 1:
            raise UserError(f"method.fewer_every={fewer_every}: expected at least 1 task")
        if hebbian_lr <= 0 or hebbian_lr_first <= 0:
            raise UserError(
                f"method.hebbian_lr={hebbian_lr}, hebbian_lr_first={hebbian_lr_first}: expected more than 0"
            )
        super().__init__(targets=targets)
        self.first, self.more, self.fewer, self.fewer_every = list(rows), list(more), list(fewer), fewer_every
        self.hebbian_lr, self.hebbian_lr_first = hebbian_lr, hebbian_lr_first
        self.rows: dict[str, Tensor] = {}
        self.velocity: dict[str, Tensor] = {}
        self._hooks: list[RemovableHandle] = []

    def new_rows(self, task: int, layer: int, d: int) -> int:
        """How many rows layer number `layer` with d inputs learns in a task (numbers from 0)."""

        def entry(values: list[Rows]) -> int:
            value = values[min(layer, len(values) - 1)]
            return round(value * d) if isinstance(value, float) and value < 1 else int(value)

        wanted = entry(self.more) - entry(self.fewer) * (task // self.fewer_every) if task else entry(self.first)
        return max(0, wanted)

    @override
    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        self.rows, self.velocity = {}, {}
        for number, (path, layer) in enumerate(self.layers.items()):
            d = input_size(layer)
            M = self.memory.get(path)
            m = min(self.new_rows(task.index, number, d), d - (0 if M is None else M.shape[1]))
            if m:
                generator = torch.Generator().manual_seed(derive_key(task.seed, path, "hlop/1"))
                H = nn.init.orthogonal_(torch.empty(m, d), generator=generator)
                self.rows[path], self.velocity[path] = H.to(task.device), torch.zeros(m, d, device=task.device)

    @override
    def install(self, model: nn.Module, index: int) -> None:
        super().install(model, index)
        self._unhook()
        first = next(iter(self.layers))
        for path in self.rows:
            eta = self.hebbian_lr_first if path == first else self.hebbian_lr
            self._hooks.append(self.layers[path].register_forward_pre_hook(self._learner(path, eta)))

    def _unhook(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks.clear()

    def _learner(self, path: str, eta: float) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def learn(layer: nn.Module, arguments: tuple[Any, ...]) -> None:
            if layer.training and torch.is_grad_enabled():
                X = torch.cat(list(input_rows(layer, arguments[0].detach()))).float()
                H, v = (state[path].to(X.device) for state in (self.rows, self.velocity))
                M = self.memory.get(path)
                self.rows[path], self.velocity[path] = oja(H, v, X, None if M is None else M.to(X.device), eta)

        return learn

    @override
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        """Merge the new rows, orthonormalised by the first process."""
        self._unhook()
        tensors: dict[str, Tensor] = {}
        if task.leads:
            for path, H in self.rows.items():
                self.memory.extend(path, H.mT)
                tensors[f"bases/{path}"] = self.memory[path]
        self.receive(task.share(tensors))
        self.rows, self.velocity = {}, {}

    @override
    def basis_bytes(self) -> int:
        learning = [*self.rows.values(), *self.velocity.values()]
        return super().basis_bytes() + sum(t.numel() * t.element_size() for t in learning)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "rows": {path: H.cpu() for path, H in self.rows.items()},
            "velocity": {path: v.cpu() for path, v in self.velocity.items()},
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.rows = {path: H.clone() for path, H in state["rows"].items()}
        self.velocity = {path: v.clone() for path, v in state["velocity"].items()}


@torch.no_grad()
def oja(H: Tensor, v: Tensor, X: Tensor, M: Tensor | None, eta: float) -> tuple[Tensor, Tensor]:
    """Five steps of the subspace rule on a batch X (n, d) for rows H (m, d) with velocity v, given old rows Mᵀ (k, d).

    Returns:
        The new H and v.
    """
    with torch.autocast(X.device.type, enabled=False):
        rest = X if M is None else X - (X @ M) @ M.mT
        for _ in range(INNER):
            Y = X @ H.mT
            change = mean_over_processes(Y.mT @ (rest - Y @ H) / len(X)).clamp_(-CLAMP, CLAMP)
            v = KEEP * v + (1 - KEEP) * change
            H = H + eta * v
    return H, v
