"""What a method is: a plain object whose hooks the trainer calls.  Nothing here knows Hydra or Lightning."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from subspace_lab.optim.traits import OptimizerFactory


@dataclass(frozen=True)
class Origin:
    """How a run's model was made, so that it can be made again.

    Attributes:
        seed: with which the generators were seeded just before the model was built.
        node: the model group's resolved configuration, plain containers.
        arguments: what the data added to it (`data_shape`, …).
    """

    seed: int
    node: Mapping[str, Any]
    arguments: Mapping[str, Any]


Named = list[tuple[str, nn.Parameter]]
_MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Method:
    """Base of all methods: trains every parameter with the configured optimizer.

    Every hook is optional.  Order of calls in a run: `prepare` (before weights are restored), `build_optimizer`,
    then `after_step` after each optimizer step, `begin`/`end` at task, round or epoch boundaries, `export` once.
    """

    name: ClassVar[str] = "none"
    #: times the closure runs in one optimizer step (accumulation and fp16 need 1)
    passes_per_step: ClassVar[int] = 1
    #: gradients are consumed during the backward pass
    per_layer: bool = False
    #: whether weights may be sharded (FSDP2), each along the dimension that `shard_dimensions` says
    shards: ClassVar[bool] = True

    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model to train: with another head, or reparametrised; before a checkpoint is read."""
        return model

    def param_groups(self, model: nn.Module) -> list[dict[str, Any]]:
        """Parameter groups of (name, parameter) pairs with their ``kind``: "matrix" or "other"."""
        inside, outside = split_parameters(model, ("attn", "mlp"))
        return [{"params": ps, "kind": k} for ps, k in ((inside, "matrix"), (outside, "other")) if ps]

    def shard_dimensions(self, model: nn.Module) -> dict[str, int]:
        """The dimension along which weights are cut among processes, by name; 0 for those that are not in it."""
        return {}

    def build_optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """The optimizer of the run; `factory` makes the configured one from parameter groups."""
        return factory(self.param_groups(model))

    def after_step(self, optimizer: Optimizer) -> None:
        """Act on the weights after an optimizer step: retract, project again, mask."""

    def begin(self, kind: str, index: int) -> None:
        """A task, round or epoch starts."""

    def end(self, kind: str, index: int) -> None:
        """A task, round or epoch has ended."""

    def export(self, model: nn.Module) -> dict[str, Tensor]:
        """Plain weights that the rest of the world can load."""
        return model.state_dict()

    def save(self, model: nn.Module, folder: Path, origin: Origin) -> None:
        """Write what the method keeps of a finished run beside the exported weights."""

    def metrics(self) -> dict[str, Tensor | float]:
        """Figures to log under ``subspace/``; device scalars are fine."""
        return {}


def split_parameters(model: nn.Module, targets: Sequence[str] | str) -> tuple[Named, Named]:
    """Trainable parameters in (targeted matrices, all others).

    Args:
        model: any module.
        targets: regular expressions searched in the path of linear and convolution layers, whose weights are
            targeted; or ``all-linear`` for every such layer except the output head (``lm_head``, ``head``,
            ``classifier``, ``fc`` at the top level).
    """
    weights: set[str] = set()
    for path, module in model.named_modules():
        if not isinstance(module, _MATRIX_LAYERS):
            continue
        if isinstance(targets, str):
            chosen = (
                path.split(".")[-1] not in ("lm_head", "head", "classifier", "fc")
                if targets == "all-linear"
                else bool(re.search(targets, path))
            )
        else:
            chosen = any(re.search(t, path) for t in targets)
        if chosen:
            weights.add(f"{path}.weight" if path else "weight")
    inside: Named = []
    outside: Named = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (inside if name in weights else outside).append((name, p))
    return inside, outside
