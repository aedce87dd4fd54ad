"""Small checkpoints on disk and a merge of them, for the tests of merging files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging import Merge, Stack
from subspace_lab.merging.averaging import TaskArithmetic
from subspace_lab.merging.files import merge_files
from subspace_lab.merging.settings import MergeSettings

State = dict[str, Tensor]


class Halved(Merge):
    """The sum, halved by a factor that is known at the end: what keeps updates on disk."""

    @override
    def update(self, stack: Stack) -> Tensor:
        return stack.total()

    @override
    def factor(self) -> float:
        return 0.5

    @property
    @override
    def has_factor(self) -> bool:
        return True


def state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    g = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {
        "embed.weight": (20, 8),
        "layers.0.attn.in_proj_weight": (24, 8),
        "layers.0.mlp.weight": (16, 8),
        "layers.1.mlp.weight": (16, 8),
        "norm": (8,),
        "one": (),
        "none": (0, 8),
    }
    made = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    return made | {"position_ids": torch.arange(5) + seed, "mask": torch.tensor([seed == 0, True])}


def write_checkpoints(folder: Path) -> Path:
    """base.safetensors and 1, 2, 3.safetensors."""
    save_file(state(0), folder / "base.safetensors")
    for t in (1, 2, 3):
        save_file(state(t), folder / f"{t}.safetensors")
    return folder


def merge(folder: Path, method: Merge | None = None, models: Any = None, output: str = "out", **given: Any) -> Any:
    models = [str(folder / f"{t}.safetensors") for t in (1, 2, 3)] if models is None else models
    given = {"base": str(folder / "base.safetensors"), "device": "cpu"} | given
    return merge_files(method or TaskArithmetic(0.3), MergeSettings(models, **given), folder / output, lambda _: None)


def refused(folder: Path, *words: str, **given: Any) -> None:
    """It is refused in one line for each of `words`, and nothing is left."""
    before = sorted(folder.iterdir())
    with pytest.raises(UserError) as caught:
        merge(folder, **given)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(words), lines
    for line, wanted in zip(lines, words, strict=True):
        assert wanted in line
    assert sorted(folder.iterdir()) == before
