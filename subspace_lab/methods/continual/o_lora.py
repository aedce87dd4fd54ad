"""O-LoRA: low-rank adapters that are kept orthogonal to those of earlier tasks by a penalty.

Wang, Chen, Ge, Xia, Bao, Zheng, Zhang, Gui & Huang, Findings of EMNLP 2023, arXiv 2310.14152; released code
cmnfriend/O-LoRA.  For a weight W, task t with the adapter (A_t, B_t) of rank r:

    y = W x + (α / r) B_t A_t x,      A_t drawn anew, B_t = 0 at the start
    minimise   loss + λ1 Σ_{i<t} Σ |A_i A_tᵀ| + λ2 (|A_t|_F + |B_t|_F)       over A_t and B_t
    at the end of the task             W <- W + (α / r) B_t A_t,   A_t is kept for later penalties

The adapters are PEFT's.  They wrap their layers once, before the first task, so that a checkpoint has the same entries
at any time; `export` folds them in and has the names of the model that was given.  Nothing is guaranteed: the penalty
makes overlaps small, and inputs decide what they matter.

The release sums L1 norms over layers and tasks, and takes lengths, not their squares, for λ2; both as here.  Published
runs on four tasks have λ1 = 0.5, λ2 = 0; on fifteen λ1 is 0.5 up to 5 and λ2 0 to 0.3, set by hand for each task.

Here              paper
old               A_i, i < t, of each layer, one below the other
penalty           λ1, λ2
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from subspace_lab import linalg
from subspace_lab.continual.activations import protected_layers
from subspace_lab.continual.context import TaskContext
from subspace_lab.data.packing import Batch
from subspace_lab.errors import UserError
from subspace_lab.methods.continual.adapting import check_positive
from subspace_lab.methods.continual.base import ContinualMethod, Loss
from subspace_lab.methods.continual.protecting import freeze_rest

_ADAPTER = "default"


class OLoRA(ContinualMethod):
    """PEFT's LoRA, one adapter per task, each pushed away from the earlier ones.

    Args:
        rank: r.
        alpha: α; the adapter's output is multiplied by α / r.
        dropout: of the adapter's inputs.
        lambda1: weight of the overlap with earlier A.
        lambda2: weight of the factors' lengths.
        targets: regular expressions on the paths of the adapted layers; null takes all linear and convolution layers
            but the heads of single tasks.
    """

    name: ClassVar[str] = "o_lora"

    def __init__(
        self,
        rank: int = 8,
        alpha: int = 32,
        dropout: float = 0.1,
        lambda1: float = 0.5,
        lambda2: float = 0.0,
        targets: Sequence[str] | None = None,
    ) -> None:
        check_positive(rank, "rank")
        check_positive(alpha, "alpha")
        if not 0 <= dropout < 1:
            raise UserError(f"method.dropout must be in [0, 1), not {dropout}")
        if lambda1 < 0 or lambda2 < 0:
            raise UserError(f"method.lambda1 and method.lambda2 must not be negative: {lambda1}, {lambda2}")
        self.rank, self.alpha, self.dropout = rank, alpha, dropout
        self.lambda1, self.lambda2, self.targets = lambda1, lambda2, targets
        self.old: dict[str, Tensor] = {}

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        """Wrap the layers.

        Raises:
            UserError: `targets` matches nothing.
        """
        from peft import LoraConfig, inject_adapter_in_model

        chosen = "|".join(re.escape(path) for path in protected_layers(model, self.targets))
        config = LoraConfig(
            r=self.rank, lora_alpha=self.alpha, lora_dropout=self.dropout, target_modules=f"(?:{chosen})"
        )
        wrapped: nn.Module = inject_adapter_in_model(config, model, _ADAPTER)
        return wrapped

    @override
    @torch.no_grad()
    def begin_task(self, model: nn.Module, task: TaskContext) -> None:
        """Draw A as PEFT and the release do, uniform with variance 1 / (3 in), the same on every process; B is zero."""
        for path, layer in adapters(model).items():
            A, B = _factors(layer)
            bound = 1 / math.sqrt(A[0].numel())
            key = linalg.derive_key(task.seed, "o_lora/1", path)
            A.copy_((2 * linalg.uniform(tuple(A.shape), key=key, device=A.device) - 1) * bound)
            B.zero_()

    @override
    def install(self, model: nn.Module, index: int) -> None:
        freeze_rest(model, {})
        for path, layer in adapters(model).items():
            for factor in _factors(layer):
                factor.requires_grad_(True)
            if path in self.old:
                self.old[path] = self.old[path].to(_factors(layer)[0].device)

    @override
    def objective(self, model: nn.Module, batch: Batch, loss: Loss) -> Tensor:
        return loss(model, batch) + self.penalty(model)

    def penalty(self, model: nn.Module) -> Tensor:
        """λ1 Σ |A_old Aᵀ| + λ2 Σ (|A|_F + |B|_F), summed over layers; fp32 scalar."""
        total = torch.zeros((), device=next(model.parameters()).device)
        for path, layer in adapters(model).items():
            A, B = _factors(layer)
            if self.lambda1 and path in self.old:
                total = total + self.lambda1 * (self.old[path] @ A.flatten(1).mT).abs().sum()
            if self.lambda2:
                total = total + self.lambda2 * (A.norm() + B.norm())
        return total

    @override
    @torch.no_grad()
    def end_task(self, model: nn.Module, task: TaskContext) -> None:
        """Fold the adapters into the weights and keep their A."""
        for path, layer in adapters(model).items():
            A, B = _factors(layer)
            layer.base_layer.weight += layer.get_delta_weight(_ADAPTER).to(layer.base_layer.weight.dtype)
            rows = A.detach().flatten(1).clone()
            self.old[path] = torch.cat([self.old[path].to(rows), rows]) if path in self.old else rows
            B.zero_()

    @override
    @torch.no_grad()
    def export(self, model: nn.Module) -> dict[str, Tensor]:
        deltas = {
            f"{path}.base_layer.weight": layer.get_delta_weight(_ADAPTER) for path, layer in adapters(model).items()
        }
        plain = {}
        for name, value in model.state_dict().items():
            if re.search(r"\.lora_[A-Za-z_]+\.", name):
                continue
            whole = value + deltas[name].to(value) if name in deltas else value
            plain[name.replace(".base_layer.", ".")] = whole
        return plain

    @override
    def ranks(self) -> dict[str, int]:
        return {path: A.shape[0] for path, A in self.old.items()}

    @override
    def dimensions(self) -> dict[str, int]:
        return {path: A.shape[1] for path, A in self.old.items()}

    @override
    def basis_bytes(self) -> int:
        return sum(A.numel() * A.element_size() for A in self.old.values())

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"old": {path: A.detach().cpu() for path, A in self.old.items()}}

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.old = {path: A.clone() for path, A in state["old"].items()}


def adapters(model: nn.Module) -> dict[str, Any]:
    """PEFT's wrapped layers by the path of the layer that each replaces."""
    from peft.tuners.lora import LoraLayer

    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A (r, in) and B (out, r), with further dimensions for convolutions."""
    return layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
