"""What methods that protect the inputs of old tasks share: gathering, bases, freezing of the rest, the optimizer.

After each task every layer's inputs x on training examples give G = Σ x xᵀ, whose leading directions join its basis M.
Later tasks then train with ΔW M = 0, so that inputs of old tasks meet the weights they met before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.continual.activations import Layers, input_statistics, protected_layers
from subspace_lab.continual.context import TaskContext
from subspace_lab.continual.layers import ProtectedLinear, replace_linear
from subspace_lab.continual.thresholds import Spec, Thresholds
from subspace_lab.errors import UserError
from subspace_lab.linalg.energy import energy_directions, row_directions
from subspace_lab.linalg.frequent_directions import FrequentDirections
from subspace_lab.linalg.removal import Removal
from subspace_lab.methods.continual.remembering import RememberingMethod
from subspace_lab.models.task_heads import TaskHeads
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
from subspace_lab.optim.traits import OptimizerFactory
from subspace_lab.subspaces import Complement, Subspace

Statistic = Tensor | FrequentDirections


class ProtectingMethod(RememberingMethod):
    """Base of methods that keep a basis M (d, k) of each layer's old inputs.

    Args:
        threshold: ε, the share of the inputs' energy that is protected: a number, ``[start, step per task]``, or
            regular expressions on layers' paths with either.
        samples: training examples whose inputs are gathered after each task; null takes all.
        targets: regular expressions on the paths of the protected layers; null takes all linear and convolution layers
            but the heads of single tasks.  What is not protected is frozen after the first task.

    Attributes:
        memory: the bases.
        layers: the protected layers of the model, by path.
    """

    #: whether linear layers may make projected gradients out of projected inputs
    projects_inputs: ClassVar[bool] = True

    def __init__(self, threshold: Spec = 0.97, samples: int | None = 300, targets: Sequence[str] | None = None) -> None:
        if samples is not None and samples < 1:
            raise UserError(f"method.samples={samples}: expected a positive number, or null for all examples")
        super().__init__()
        self.thresholds = Thresholds(threshold)
        self.samples, self.targets = samples, targets
        self.layers: Layers = {}
        self._index = 0

    # -- the model ---------------------------------------------------------------------------------------------

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        """Swap in linear layers that can project their inputs; names, weights and state stay.

        Raises:
            UserError: `targets` matches nothing, or a layer without a threshold.
        """
        self.layers = protected_layers(model, self.targets)
        for path in self.layers:
            self.thresholds.at(path, 0)
        return replace_linear(model, self.layers) if self.projects_inputs else model

    @override
    def install(self, model: nn.Module, index: int) -> None:
        self._index = index
        self.layers = protected_layers(model, self.targets)
        if index > 0:
            freeze_rest(model, self.layers)
        for path, layer in self.layers.items():
            if isinstance(layer, ProtectedLinear):
                layer.protect(self.removal(path))

    def removal(self, path: str) -> Removal | None:
        """What input projection takes out of a layer's inputs; None where nothing is protected."""
        M = self.memory.get(path)
        return Removal.of(M) if M is not None and M.shape[1] else None

    # -- the optimizer -----------------------------------------------------------------------------------------

    def subspace(self, bases: Mapping[str, Tensor]) -> Subspace:
        """Where the weights named in `bases` may move."""
        return Complement(bases, clean=self.clean())

    def clean(self) -> dict[str, Callable[[], bool]]:
        """For `Complement`: name of a weight -> whether its gradient has arrived projected."""
        layers = {weight_of(path): layer for path, layer in self.layers.items()}
        return {name: layer.take_clean for name, layer in layers.items() if isinstance(layer, ProtectedLinear)}

    @override
    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        bases = {weight_of(path): M for path, M in self.memory.items() if path in self.layers and M.shape[1]}
        if self._index == 0 or not bases:
            return super().param_groups(model)
        inside = self.subspace(bases)
        groups: list[dict[str, Any]] = []
        for group in super().param_groups(model):
            for constrained in (True, False):
                named = [(name, p) for name, p in group["params"] if (name in bases) is constrained]
                if named:
                    groups.append({**group, "params": named} | ({"subspace": inside} if constrained else {}))
        return groups

    @override
    def build_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        groups = self.param_groups(model)
        if not any("subspace" in group for group in groups):
            return factory(groups)
        return SubspaceOptimizer(groups, factory, refresh_every=0)

    # -- the bases ---------------------------------------------------------------------------------------------

    @override
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        """Extend every layer's basis by what the finished task's inputs need."""
        self.layers = protected_layers(model, self.targets)
        tensors: dict[str, Tensor] = {}
        # Every process looks at the same few inputs, each of them for its share of the layers.
        mine = task.split(list(self.layers))
        batches = task.batches(count=self.samples)
        for path, statistic in input_statistics(model, self.layers, batches, task.forward, mine).items():
            tensors |= self.remember(path, statistic, self.thresholds.at(path, task.index))
        self.receive(task.gather(tensors))

    def remember(self, path: str, statistic: Statistic, threshold: float) -> dict[str, Tensor]:
        """Extend the basis of one layer; returns what other processes need to know, for `receive`."""
        self.memory.extend(path, directions(statistic, self.memory.get(path), threshold))
        return {f"bases/{path}": self.memory[path]}

    def receive(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what the processes have found."""
        for name, tensor in tensors.items():
            kind, _, path = name.partition("/")
            if kind == "bases":
                self.memory.put(path, tensor)


def weight_of(path: str) -> str:
    """Name of the weight of the layer at `path`."""
    return f"{path}.weight" if path else "weight"


def directions(statistic: Statistic, protected: Tensor | None, threshold: float) -> Tensor:
    """New directions (d, k) by the energy rule, from a Gram matrix or from a sketch."""
    if isinstance(statistic, Tensor):
        M = None if protected is None else protected.to(statistic.device)
        return energy_directions(statistic, M, threshold)
    assert statistic.sketch is not None
    M = None if protected is None else protected.to(statistic.sketch.device)
    return row_directions(statistic.sketch[0], M, threshold, total=float(statistic.total[0]))


def energy_along(statistic: Statistic, U: Tensor) -> Tensor:
    """Σ (uᵀx)² (k,) for the columns u of U (d, k), in float64."""
    if isinstance(statistic, Tensor):
        D = U.to(statistic.device, torch.float64)
        return ((statistic.double() @ D) * D).sum(0)
    assert statistic.sketch is not None
    rows = statistic.sketch[0].double()
    return (rows @ U.to(rows.device, torch.float64)).square().sum(0)


def freeze_rest(model: nn.Module, layers: Layers) -> None:
    """Leave only the weights of `layers` and the task heads that have gradients now to be trained.

    Biases, norms and embeddings keep the values, batch norms the statistics of the first task: anything else that moved
    would change the outputs of old tasks whatever the weights do.  The released GPM does the same.
    """
    free = {id(layer.weight) for layer in layers.values()}
    for module in model.modules():
        if isinstance(module, TaskHeads):
            free |= {id(p) for p in module.parameters()}
        elif isinstance(module, _NormBase) and _hold_statistics not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(_hold_statistics)
    for p in model.parameters():
        if id(p) not in free:
            p.requires_grad_(False)


def _hold_statistics(module: nn.Module, arguments: tuple[Any, ...]) -> None:
    # In the forward pass, because trainers call `model.train()` whenever they like.
    module.training = False
