"""TRGP: old tasks whose inputs matter to the new one lend it their subspace, scaled.

Lin, Yang, Fan & Zhang, "TRGP: Trust Region Gradient Projection for Continual Learning", ICLR 2022, arXiv 2202.02931.
Before task t, with G the gradient of each layer on a few examples and S_j the subspace of old task j:

    trusted     the (at most two) tasks j with the largest ‖G S_j S_jᵀ‖, if it is more than ε₁ ‖G‖    (eqs. 3, 4)
    forward     W + Σ_j W S_j (Q_j − I) S_jᵀ,   Q_j trained from I                                     (eq. 5)
    W           moves outside the memory M of all old tasks only

Q is kept with its task, which is answered with its own: the task has to be known at test time.  At the end of a task
its subspace S_t are the directions of most energy among the columns of M and the singular vectors of what M leaves
over, until they hold ε of it; those that are new join M.

The release gathers the inputs with the unscaled weights and leaves the longest new direction out of M; here the inputs
are those the task is answered with, and all of S_t is protected, without which Q_t would not keep its meaning.

Here              paper
memory[path]      M
_columns[t][path] S_t, as columns of M, which only grows
_scales[t][path]  Q_j of task t, for the tasks in _trusted[t][path]
trust             ε₁ (0.5; 0.2 for permuted MNIST)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.scaled_layers import Scaled
from subspace_lab.continual.thresholds import Spec
from subspace_lab.errors import UserError
from subspace_lab.linalg.svd import descending_eigh
from subspace_lab.methods.continual.protecting import Statistic, directions, energy_along
from subspace_lab.methods.continual.scaling import ScalingMethod


class TRGP(ScalingMethod):
    """Projection with scaled subspaces of trusted old tasks.

    Args:
        threshold: ε as in `ProtectingMethod`.
        samples: examples gathered after each task, and examples of the gradient before it.
        targets: the protected layers.
        trust: ε₁, in [0, 1]: the share of the gradient's norm that has to lie in an old task's subspace.
        trusted_tasks: how many old tasks a layer trusts at most; 0 is GPM with TRGP's subspaces.
    """

    name: ClassVar[str] = "trgp"

    def __init__(
        self,
        threshold: Spec = 0.97,
        samples: int | None = 300,
        targets: Sequence[str] | None = None,
        trust: float = 0.5,
        trusted_tasks: int = 2,
    ) -> None:
        if not 0 <= trust <= 1:
            raise UserError(f"method.trust={trust}: expected a share of the gradient's norm between 0 and 1")
        if trusted_tasks < 0:
            raise UserError(f"method.trusted_tasks={trusted_tasks}: expected 0 or a positive number")
        super().__init__(threshold, samples, targets)
        self.trust, self.trusted_tasks = trust, trusted_tasks
        self._columns: list[dict[str, Tensor]] = []
        self._trusted: list[dict[str, list[int]]] = []
        self._scales: list[dict[str, list[Tensor]]] = []

    def spaces(self, path: str, index: int) -> list[Tensor]:
        """S_j (d, r_j) of the old tasks that task `index` trusts in a layer."""
        M = self.memory.get(path)
        trusted = self._trusted[index].get(path, []) if index < len(self._trusted) else []
        return [] if M is None else [M[:, self._columns[j][path].to(M.device)] for j in trusted]

    @override
    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        del self._trusted[task.index :]
        shared: dict[str, Tensor] = {}
        if task.leads and task.index > 0 and self.trusted_tasks:
            shared = self._alignments(model, task)
        chosen: dict[str, list[int]] = {}
        for path, shares in task.share(shared).items():
            ranked = shares.sort(descending=True, stable=True)
            pairs = zip(ranked.indices.tolist(), ranked.values.tolist(), strict=True)
            chosen[path] = [j for j, share in list(pairs)[: self.trusted_tasks] if share > self.trust]
        self._trusted.append(chosen)

    def _alignments(self, model: nn.Module, task: TaskContext) -> dict[str, Tensor]:
        """‖G S_j S_jᵀ‖ / ‖G‖ of every old task j (tasks,), by path."""
        layers = self.scaled()
        gradients = _mean_gradients(model, layers, task, self.samples)
        found = {}
        for path, G in gradients.items():
            M = self.memory[path].to(G)
            energy = (G @ M).square().sum(0)  # of each column of M
            parts = torch.stack([energy[columns[path].to(G.device)].sum() for columns in self._columns])
            found[path] = (parts / G.square().sum().clamp_min(torch.finfo(G.dtype).tiny)).sqrt().cpu()
        return found

    @override
    def install(self, model: nn.Module, index: int) -> None:
        super().install(model, index)
        learning = index >= len(self._scales)
        for path, layer in self.scaled().items():
            layer.set_regions(self.spaces(path, index) if learning else ())
            for Q in layer.scales:
                Q.requires_grad_(True)

    @override
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        del self._columns[task.index :], self._scales[task.index :]
        self._columns.append({})
        super().end_task(model, task)
        self._scales.append({p: [Q.detach().clone() for Q in layer.scales] for p, layer in self.scaled().items()})
        for layer in self.scaled().values():
            layer.set_regions(())

    @override
    def remember(self, path: str, statistic: Statistic, threshold: float) -> dict[str, Tensor]:
        M = self.memory.get(path)
        if M is None:
            known, new = torch.zeros(0, dtype=torch.int64), directions(statistic, None, threshold)
            k = 0
        else:
            known, new = joint_directions(statistic, M, threshold)
            k = M.shape[1]
        self.memory.extend(path, new)
        M = self.memory[path]
        columns = torch.cat([known.to(M.device), torch.arange(k, M.shape[1], device=M.device)])
        return {f"bases/{path}": M, f"columns/{path}": columns}

    @override
    def receive(self, tensors: Mapping[str, Tensor]) -> None:
        super().receive(tensors)
        for name, tensor in tensors.items():
            kind, _, path = name.partition("/")
            if kind == "columns":
                self._columns[-1][path] = tensor

    @contextmanager
    def _as_of(self, index: int) -> Iterator[None]:
        with ExitStack() as stack:
            for path, layer in self.scaled().items():
                stack.enter_context(layer.scaled_as(self.spaces(path, index), self._scales[index].get(path, [])))
            yield

    @override
    def as_of(self, model: nn.Module, index: int) -> AbstractContextManager[None]:
        """The scalings of a finished task; a task that is being learnt has its own in the model already."""
        return self._as_of(index) if index < len(self._scales) else nullcontext()

    @override
    def basis_bytes(self) -> int:
        kept = [c for columns in self._columns for c in columns.values()]
        kept += [Q for scales in self._scales for Qs in scales.values() for Q in Qs]
        return super().basis_bytes() + sum(t.numel() * t.element_size() for t in kept)

    @override
    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "columns": [{path: c.cpu() for path, c in columns.items()} for columns in self._columns],
            "trusted": [{path: list(js) for path, js in trusted.items()} for trusted in self._trusted],
            "scales": [{path: [Q.cpu() for Q in Qs] for path, Qs in scales.items()} for scales in self._scales],
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._columns = [{path: c.clone() for path, c in columns.items()} for columns in state["columns"]]
        self._trusted = [{path: list(js) for path, js in trusted.items()} for trusted in state["trusted"]]
        self._scales = [{path: [Q.clone() for Q in Qs] for path, Qs in scales.items()} for scales in state["scales"]]


def joint_directions(statistic: Statistic, M: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    """The subspace of a task among known and new directions, those of most energy until they hold the threshold.

    Args:
        statistic: of the task's inputs x (n, d).
        M: (d, k) orthonormal, k ≥ 0.
        threshold: ε in [0, 1], of all energy.

    Returns:
        The chosen columns of M (int64, ascending), and the new directions (d, n), float64, orthonormal and orthogonal
        to M, longest first.
    """
    M = M.double()
    k, free = M.shape[1], M.shape[0] - M.shape[1]
    if isinstance(statistic, Tensor):
        G, M = statistic.double(), M.to(statistic.device)
        total = G.diagonal().sum()
        half = G - (G @ M) @ M.mT
        rest = half - M @ (M.mT @ half)
        values, vectors = descending_eigh((rest + rest.mT) / 2)
    else:
        assert statistic.sketch is not None
        rows = statistic.sketch[0].double()
        M = M.to(rows.device)
        total = statistic.total[0].double()
        _, s, Vh = torch.linalg.svd(rows - (rows @ M) @ M.mT, full_matrices=False)
        values, vectors = s.square(), Vh.mT
    energies = torch.cat([energy_along(statistic, M).clamp_min(0), values[:free]])
    ordered, order = energies.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    noise = torch.finfo(torch.float32).eps * energies.max() if len(energies) else 0.0
    taken = order[(before < threshold * total) & (ordered > noise)]
    return taken[taken < k].sort().values, vectors[:, (taken[taken >= k] - k).sort().values]


def _mean_gradients(
    model: nn.Module, layers: Mapping[str, Scaled], task: TaskContext, samples: int | None
) -> dict[str, Tensor]:
    """Gradient (out, d) of the mean loss of some examples for each layer's weight, in evaluation mode."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    weights = [layer.weight for layer in layers.values()]
    sums = [torch.zeros_like(W) for W in weights]
    count = 0
    try:
        with torch.enable_grad():
            for batch in task.batches(count=samples, purpose="gradient"):
                n = len(next(iter(batch.values())))
                for total, g in zip(sums, torch.autograd.grad(task.loss(model, batch), weights), strict=True):
                    total += n * g
                count += n
    finally:
        for module, mode in modes:
            module.training = mode
    return {path: g.flatten(1).float() / max(count, 1) for path, g in zip(layers, sums, strict=True)}
