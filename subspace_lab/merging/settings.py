"""What every merge of checkpoints is told, whatever its method: the group `merge`, and which tensors are matrices."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from subspace_lab.errors import UserError
from subspace_lab.merging.base import Kind
from subspace_lab.merging.sources import TensorInfo

VECTORS = ("text_projection",)


@dataclass(frozen=True)
class TensorRules:
    """Which tensors are merged as matrices, which as anything else, and which are left as the base has them.

    Attributes:
        vectors: regular expressions; matrices with such a name are treated as `other`.
        exclude: regular expressions; tensors with such a name stay the base's.
        split_fused_qkv: whether the weights of queries, keys and values in one (3d, d) matrix are three matrices.
    """

    vectors: tuple[str, ...] = VECTORS
    exclude: tuple[str, ...] = ()
    split_fused_qkv: bool = False

    def kind(self, name: str, info: TensorInfo) -> Kind | None:
        """How a tensor is merged; None: not at all (excluded, empty, or not of floating point)."""
        if not info.dtype.is_floating_point or info.numel == 0 or self.excluded(name):
            return None
        if len(info.shape) != 2 or any(re.search(pattern, name) for pattern in self.vectors):
            return "other"
        return "matrix"

    def excluded(self, name: str) -> bool:
        """Whether a tensor stays the base's because its name says so."""
        return any(re.search(pattern, name) for pattern in self.exclude)


class MergeSettings:
    """The group `merge`.

    Args:
        models: checkpoints of the fine-tuned models: a list, or names of the tasks and their checkpoints; each is a
            safetensors file, a folder or a name on the hub.
        base: the checkpoint that they were fine-tuned from; null for methods that need none.
        output: folder of the merged checkpoint; null: `merged` in the run folder.
        vectors: regular expressions on names of matrices that are no linear maps, to be treated like biases.
        exclude: regular expressions on names of tensors that stay the base's.
        split_fused_qkv: treat the weights of queries, keys and values in one matrix (open_clip's in_proj_weight, timm's
            qkv) as three.
        device: where merged; auto: the GPU if there is one.
        family: of the checkpoints, recorded with the results: figures of different families are never compared.

    Raises:
        UserError: a pattern is no regular expression, or there is no such device.
    """

    def __init__(
        self,
        models: Sequence[str] | Mapping[str, str] | None = None,
        base: str | None = None,
        output: str | None = None,
        vectors: Sequence[str] = VECTORS,
        exclude: Sequence[str] = (),
        split_fused_qkv: bool = False,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        family: str | None = None,
    ) -> None:
        for option, patterns in {"vectors": vectors, "exclude": exclude}.items():
            for pattern in patterns:
                try:
                    re.compile(pattern)
                except re.error as error:
                    raise UserError(f"merge.{option}: {pattern!r} is no regular expression: {error}") from None
        self.models: dict[str, str] | None = None
        if isinstance(models, Mapping):
            self.models = {str(name): str(path) for name, path in models.items()}
        elif models is not None:
            self.models = {str(t + 1): str(path) for t, path in enumerate(models)}
        #: whether the models came with names of tasks
        self.named = isinstance(models, Mapping)
        self.base, self.output, self.family, self.device = base, output, family, device
        self.rules = TensorRules(tuple(vectors), tuple(exclude), split_fused_qkv)

    def find_device(self) -> torch.device:
        """Where to merge.

        Raises:
            UserError: cuda was asked for, and there is none.
        """
        there = torch.cuda.is_available()
        if self.device == "cuda" and not there:
            raise UserError("merge.device=cuda: no CUDA device here", hint="merge.device=cpu")
        return torch.device("cuda" if there and self.device != "cpu" else "cpu")
