"""A run in a subspace without a trainer: digits, a small net, seconds; its folder is what a finished run leaves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from subspace_lab.compression.solution import FILE, Solution
from subspace_lab.methods.intrinsic import IntrinsicDimension
from subspace_lab.subspaces.flat import FlatModel

DATA = {"_target_": "subspace_lab.data.images.ImageDataModule", "dataset": "digits", "batch_size": 64, "val_size": 0}
MLP = {"_target_": "subspace_lab.models.mlp.build_mlp", "hidden": [20]}
SEED = 3


@dataclass
class Trained:
    """A run folder and the model that was trained in it."""

    folder: Path
    model: FlatModel
    method: IntrinsicDimension
    solution: Solution

    @property
    def file(self) -> Path:
        return self.folder / FILE


def train(folder: Path, node: dict[str, Any], *, steps: int = 60, **method_kwargs: Any) -> Trained:
    from omegaconf import OmegaConf

    from subspace_lab import build
    from subspace_lab.training import rng

    cfg = OmegaConf.create({"seed": SEED, "data": DATA, "model": node})
    data: Any = build.build_data(cfg)
    data.configure(0, 1, SEED)
    data.prepare_data()
    data.setup("fit")
    rng.seed(SEED)
    method = IntrinsicDimension(seed=SEED, **method_kwargs)
    model = method.prepare(build.build_model(cfg, data))
    optimizer = torch.optim.Adam([p for p in (model.z, model.lambdas) if p is not None], lr=0.1)
    for _, batch in zip(range(steps), data.train_dataloader(), strict=False):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"]).backward()
        optimizer.step()
    model.eval()
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(cfg, folder / "config.yaml")
    solution = Solution.of(model, method, seed=SEED, node=node, arguments=data.model_arguments())
    solution.save(folder / FILE)
    return Trained(folder, model, method, solution)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """60 numbers that move 1,510 weights."""
    return train(tmp_path_factory.mktemp("run"), MLP, d=60)


@pytest.fixture
def training() -> Callable[..., Trained]:
    return train
