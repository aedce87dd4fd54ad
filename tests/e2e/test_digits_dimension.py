"""The digits gate: what a right projection reaches, and wrong ones do not (figures of the reference measurements)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace_lab import projections
from subspace_lab.app import compose_config
from subspace_lab.methods.intrinsic import IntrinsicDimension
from subspace_lab.protocols.fit import Fit

SIZES = [6400, 100, 10000, 100, 1000, 10]  # weights and biases of 64-100-100-10
OWN = 0.9 * 0.975  # of the directly trained net


def accuracy(folder: Path, *words: str) -> float:
    folder.mkdir(exist_ok=True)
    cfg = compose_config(
        [
            "method=intrinsic_dimension",
            "protocol=fit",
            "trainer=cpu",
            "trainer.progress=off",
            "export=false",
            f"paths.output_dir={folder}",
            *words,
        ]
    )
    return float(Fit().run(cfg, folder, label="digits", resume_dir=folder).metrics["test/accuracy"])


@pytest.mark.slow
def test_fifty_numbers_do_not_reach_the_threshold_and_two_hundred_do(tmp_path: Path) -> None:
    baseline = accuracy(tmp_path / "direct", "method=none", "data=digits", "model=mlp", "optimizer.lr=0.003")
    assert baseline > 0.95
    assert accuracy(tmp_path / "50", "method.d=50") < 0.9 * baseline - 0.05
    assert accuracy(tmp_path / "200", "method.d=200") > 0.9 * baseline


def test_the_direct_learning_rate_on_z_is_far_too_small(tmp_path: Path) -> None:
    assert accuracy(tmp_path, "method.d=150", "method.lr=0.001") < 0.6


class Broken:
    """A projection with a mistake that public re-implementations make."""

    def __init__(self, right: projections.Projection) -> None:
        self.right = right

    def __getattr__(self, name: str) -> Any:
        return getattr(self.right, name)

    def scale(self, y: Tensor) -> Tensor:
        raise NotImplementedError

    def lift(self, z: Tensor, *, base: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        y = self.scale(self.right.lift(z))
        y = y if base is None else base + y
        return y if out is None else out.copy_(y)

    lift_exact = lift

    def project(self, g: Tensor) -> Tensor:
        return self.right.project(self.scale(g))


def _each(y: Tensor, factor: Callable[[int], float], sizes: Sequence[int] = SIZES) -> Tensor:
    return torch.cat([part * factor(n) for part, n in zip(y.split(sizes), sizes, strict=True)])


class Unnormalised(Broken):
    """Entries of variance 1/d: columns of norm sqrt(D/d)."""

    def scale(self, y: Tensor) -> Tensor:
        return y * math.sqrt(self.right.D / self.right.d)


class UnitColumnsInEachTensor(Broken):
    """A bias of ten numbers gets as much energy as a kernel of ten thousand."""

    def scale(self, y: Tensor) -> Tensor:
        return _each(y, lambda n: math.sqrt(self.right.D / n))


class WrongAdjoint(Broken):
    """The transform's backward pass divides by the size each tensor was padded to."""

    def scale(self, y: Tensor) -> Tensor:
        return y

    def project(self, g: Tensor) -> Tensor:
        return self.right.project(_each(g, lambda n: 2.0 ** -math.ceil(math.log2(n))))


@pytest.mark.parametrize("broken", [None, Unnormalised, UnitColumnsInEachTensor, WrongAdjoint])
def test_the_gate_tells_broken_projections(
    broken: type[Broken] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under plain SGD, whose steps keep the scale of gradients: Adam would hide a wrong scale."""
    if broken is not None:
        right = projections.create
        monkeypatch.setattr(projections, "create", lambda *args, **options: broken(right(*args, **options)))
        monkeypatch.setattr(IntrinsicDimension, "save", lambda *args: None)
    reached = accuracy(tmp_path, "method.d=200", "method.d_max=4096", "optimizer=sgd", "optimizer.lr=0.1")
    assert (reached > OWN) is (broken is None)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_search_finds_the_reference_dimension(tmp_path: Path) -> None:
    """The reference measured 125 ± 25 relative to the own baseline."""
    from subspace_lab.protocols.dimension_search import DimensionSearch

    words = [
        "method=intrinsic_dimension",
        "trainer=cpu",
        f"paths.output_dir={tmp_path}",
        f"paths.output_root={tmp_path}",
    ]
    cfg = compose_config(words)
    node = {key: value for key, value in cfg.protocol.items() if key not in ("_target_", "cell")}
    found = DimensionSearch(**node, cell=cfg.protocol.cell).run(cfg, tmp_path, label="digits", resume_dir=tmp_path)
    assert 85 <= found.metrics["d_int90/own"] <= 165
    assert found.metrics["d_int90/own/low"] <= found.metrics["d_int90/own"] <= found.metrics["d_int90/own/high"]
    assert found.metrics["d_int90/own"] <= found.metrics["d_int90/global"]
