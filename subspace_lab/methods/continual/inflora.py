"""InfLoRA: adapters whose down-projection lies outside the inputs of earlier tasks.

Liang & Li, CVPR 2024, arXiv 2404.00228; released code liangyanshuo/InfLoRA.  For a weight W and task t:

    W + B A         A (r, d): the r leading directions of the task's inputs in what earlier tasks leave free, over √3
    train B only    it starts at zero; at the end of the task W <- W + B A

A is fixed, so training B is training W with ΔW = ΔB A: the weight itself is moved, by `subspaces.Given`, in exactly the
steps that an optimizer takes on B, and there is nothing to merge.

What earlier tasks leave free is kept by dual gradient projection memory (DualGPM, Liang & Li, NeurIPS 2023): a basis M
of their inputs to be removed, grown until it holds the share ε_t of a task's energy; once M has more than half of all
directions, a basis of its complement, to be retained, which shrinks until it holds less than 1 − ε_t.
ε_t = threshold + (threshold_end − threshold) t / T.

``variant: release`` applies both rules to the Gram matrix G of the inputs as if it were the inputs: its energies are
fourth powers of singular values, so the same ε keeps far fewer directions.  The published figures and their thresholds
come from it.  ``paper`` applies them to the inputs.  A first basis of more than half of all directions is turned
into its complement; the release labels it so without turning it.

In timm's fused attention input projection (``qkv``) only the rows of keys and values move.

Here              paper
down              A of each layer
memory, kinds     M of each layer, and whether it is removed or retained
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.continual.activations import Layers, input_grams, protected_layers
from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.memory import BasisMemory
from subspace_lab.errors import UserError
from subspace_lab.linalg.energy import energy_directions
from subspace_lab.linalg.removal import complement_basis
from subspace_lab.methods.continual.adapting import check_positive, check_share, groups_with_head
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.protecting import freeze_rest, weight_of
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
from subspace_lab.optim.traits import OptimizerFactory
from subspace_lab.subspaces.fixed import Given

FUSED = r"attn\.qkv$"
_SCALE = math.sqrt(3)


class DualMemory:
    """Old inputs of each layer: a basis of their space to be removed, or of its complement to be retained."""

    def __init__(self) -> None:
        self.bases = BasisMemory()
        self.retains: set[str] = set()

    def free(self, path: str, C: Tensor) -> Tensor:
        """P C P (d, d) for a Gram matrix C, P the projector on what is free."""
        M = self.bases.get(path)
        if M is None:
            return C
        M = M.to(C)
        inside = M @ (M.mT @ C)
        half = inside if path in self.retains else C - inside
        inside = (half @ M) @ M.mT
        full = inside if path in self.retains else half - inside
        return (full + full.mT) / 2

    def update(self, path: str, C: Tensor, threshold: float) -> None:
        """Take in a task whose inputs have the Gram matrix C (d, d), float64."""
        d = C.shape[0]
        M = self.bases.get(path)
        if path in self.retains:
            assert M is not None
            self.bases.put(path, _shrunk(M.to(C), C, threshold).float())
            return
        new = energy_directions(C, M.to(C.device) if M is not None else None, threshold)
        if M is None and not new.shape[1]:
            new = energy_directions(C, C.new_zeros(d, 0), threshold)  # at least one
        self.bases.extend(path, new)
        M = self.bases[path]
        if 2 * M.shape[1] > d:
            self.bases.put(path, complement_basis(M))
            self.retains.add(path)

    def ranks(self) -> dict[str, int]:
        """Directions of each layer that may not be used any more."""
        return {
            path: M.shape[0] - k if path in self.retains else k for path, M in self.bases.items() for k in M.shape[1:]
        }


def _shrunk(M: Tensor, C: Tensor, threshold: float) -> Tensor:
    """M without its leading directions, as few of them as leave it less than 1 − threshold of C's energy."""
    T = M.mT @ C @ M
    values, V = torch.linalg.eigh((T + T.mT) / 2)
    values, V = values.flip(0).clamp_min(0), V.flip(1)
    left = values.sum() - torch.cat([values.new_zeros(1), values.cumsum(0)[:-1]])  # before each removal
    r = int((left >= (1 - threshold) * C.diagonal().sum()).sum())
    rest: Tensor = M @ V[:, r:]
    return rest


class InfLoRA(ContinualMethod):
    """Any optimizer on B of W + B A, with A out of the way of earlier tasks.

    Args:
        rank: r, rows of A.
        threshold: ε of the first task.
        threshold_end: what ε rises to, in equal steps, one task after the last.
        variant: ``release`` takes energies from the Gram matrix, ``paper`` from the inputs.
        samples: training examples whose inputs are gathered; null takes all.
        targets: regular expressions on the paths of the adapted layers; null takes the fused attention input
            projections (``attn.qkv``) where there are any, else every layer.
    """

    name: ClassVar[str] = "inflora"

    def __init__(
        self,
        rank: int = 10,
        threshold: float = 0.95,
        threshold_end: float = 1.0,
        variant: Literal["release", "paper"] = "release",
        samples: int | None = None,
        targets: Sequence[str] | None = None,
    ) -> None:
        check_positive(rank, "rank")
        check_share(threshold, "threshold")
        check_share(threshold_end, "threshold_end")
        if samples is not None and samples < 1:
            raise UserError(f"method.samples={samples}: expected a positive number, or null for all examples")
        self.rank, self.threshold, self.threshold_end = rank, threshold, threshold_end
        self.variant, self.samples, self.targets = variant, samples, targets
        self.memory = DualMemory()
        self.down: dict[str, Tensor] = {}
        self._layers: Layers = {}

    def _choose(self, model: nn.Module) -> Layers:
        if self.targets is not None:
            return protected_layers(model, self.targets)
        layers = protected_layers(model)
        return protected_layers(model, [FUSED]) if any(path.endswith("attn.qkv") for path in layers) else layers

    def _grams(self, model: nn.Module, task: TaskContext) -> dict[str, Tensor]:
        """What stands for the inputs' Gram matrix, of trace 1 before it is squared, of this process's layers."""
        layers, batches = self._choose(model), task.batches(count=self.samples)
        grams = input_grams(model, layers, batches, task.forward, task.split(list(layers)))
        grams = {path: G / G.diagonal().sum().clamp_min(torch.finfo(G.dtype).tiny) for path, G in grams.items()}
        return {path: G @ G for path, G in grams.items()} if self.variant == "release" else grams

    @override
    @torch.no_grad()
    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        """Choose A of every layer from the coming task's inputs."""
        found = {}
        for path, C in self._grams(model, task).items():
            values, vectors = torch.linalg.eigh(self.memory.free(path, C))
            known = values.flip(0)[: self.rank] > 1e-12 * C.diagonal().sum()  # the rest is not in the free space
            found[path] = (vectors.flip(1)[:, : self.rank][:, known].mT / _SCALE).float().contiguous()
        found = task.gather(found)
        self.down = {path: found[path] for path in self._choose(model) if path in found}

    @override
    def install(self, model: nn.Module, index: int) -> None:
        self._layers = self._choose(model)
        freeze_rest(model, self._layers)

    @override
    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        bases = {weight_of(path): A for path, A in self.down.items()}
        rows = {}
        for path, layer in self._layers.items():
            if path.rpartition(".")[2] == "qkv" and isinstance(layer, nn.Linear):
                third = layer.out_features // 3
                rows[weight_of(path)] = range(third, 3 * third)
        return groups_with_head(model, bases, None, subspace=Given(bases, rows))

    @override
    def build_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        return SubspaceOptimizer(self.param_groups(model), factory, refresh_every=0)

    @override
    @torch.no_grad()
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        """Take the task's inputs into the memory."""
        threshold = self.threshold + (self.threshold_end - self.threshold) * task.index / task.tasks
        kinds, found = {True: "retain", False: "remove"}, {}
        for path, C in self._grams(model, task).items():
            self.memory.update(path, C, threshold)
            found[f"{kinds[path in self.memory.retains]}/{path}"] = self.memory.bases[path]
        shared = task.gather(found)
        self.memory.retains = set()
        for name, M in shared.items():
            kind, _, path = name.partition("/")
            self.memory.bases.put(path, M)
            if kind == "retain":
                self.memory.retains.add(path)

    @override
    def ranks(self) -> dict[str, int]:
        return self.memory.ranks()

    @override
    def dimensions(self) -> dict[str, int]:
        return {path: M.shape[0] for path, M in self.memory.bases.items()}

    @override
    def basis_bytes(self) -> int:
        return self.memory.bases.bytes()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "bases": self.memory.bases.state_dict(),
            "retains": sorted(self.memory.retains),
            "down": {path: A.detach().cpu() for path, A in self.down.items()},
        }

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.bases.load_state_dict(state["bases"])
        self.memory.retains = set(state["retains"])
        self.down = {path: A.clone() for path, A in state["down"].items()}
