"""Linear mode connectivity: barriers of known curves, and what weight matching does to one between two trainings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from contracts.merging import State
from contracts.permuted_networks import GREY, alive, answers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspace_lab.errors import UserError
from subspace_lab.merging.connectivity import Connectivity, connect, connectivity_table, draw_connectivity
from subspace_lab.merging.weight_matching import WeightMatching
from subspace_lab.models.mlp import build_mlp


def test_a_network_that_cannot_be_permuted_is_found_out() -> None:
    """Local response normalisation looks at neighbouring channels and leaves no trace in the names."""

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.ReLU(), nn.LocalResponseNorm(4, 10.0), nn.Flatten(), nn.Linear(72, 5)
        )

    nets: list[Any] = [alive(build, seed) for seed in (0, 1)]
    for net in nets:
        net[4].weight.data.mul_(30)
    x, y = 3 * torch.randn(32, 1, 5, 5, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 5

    def evaluate(weights: Any) -> tuple[float, float]:
        z = answers(nets[0], dict(weights), x)
        return float(cross_entropy(z, y)), float((z.argmax(1) == y).float().mean())

    with pytest.raises(UserError, match="permuted as a chain, the second network has a loss of"):
        WeightMatching().curves([net.state_dict() for net in nets], evaluate, points=2)


def test_barrier_of_a_known_curve(tmp_path: Path) -> None:
    """L(w) = (1 − w²)² between −1 and 1: flat ends, a barrier of 1 in the middle; tilted, of the same height."""
    a, b = {"w": torch.tensor([-1.0]), "n": torch.tensor(3)}, {"w": torch.tensor([1.0]), "n": torch.tensor(4)}

    def evaluate(weights: Any, tilt: float = 0.0) -> tuple[float, float]:
        w = float(weights["w"])
        return (1 - w * w) ** 2 + tilt * w, 1 - w * w / 2

    flat = connect(a, b, evaluate)
    tilted = connect(a, b, lambda weights: evaluate(weights, 0.7))
    assert flat.scales == tuple(i / 24 for i in range(25))
    assert flat.barrier == pytest.approx(1.0, abs=1e-6)
    assert tilted.barrier == pytest.approx(1.0, abs=1e-6)
    assert flat.record()["midpoint_accuracy"] == pytest.approx(1.0)
    assert Connectivity((0.0, 0.5, 1.0), (1.0, 0.2, 1.0), (0.5, 0.9, 0.5)).barrier == 0.0
    assert connectivity_table({"naive": flat, "matched": tilted}).row_count == 2
    file = draw_connectivity({"naive": flat, "matched": tilted}, tmp_path / "plots" / "lmc.png", "digits")
    assert file.stat().st_size > 10_000


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x, y = torch.from_numpy(images).float().view(-1, 1, 8, 8) / 16, torch.from_numpy(labels)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    return x[order[:1347]], y[order[:1347]], x[order[1347:]], y[order[1347:]]


def trained(seed: int, x: Tensor, y: Tensor) -> nn.Module:
    torch.manual_seed(seed)
    model = build_mlp(hidden=[256, 256, 256], data_shape=GREY, data_classes=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(100 + seed)
    for _ in range(60):
        for rows in torch.randperm(len(y), generator=generator).split(128):
            optimizer.zero_grad()
            cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    return model


@pytest.mark.slow
def test_the_barrier_between_two_seeds_goes() -> None:
    """Reference §1.5 has 0.755 to 0.025, midpoint accuracy 84.8 % to 96.3 %, of another recipe."""
    torch.set_num_threads(1)
    x, y, test_x, test_y = digits()
    a, b = (trained(seed, x, y).state_dict() for seed in (0, 1))
    model = build_mlp(hidden=[256, 256, 256], data_shape=GREY, data_classes=10)

    def on(inputs: Tensor, labels: Tensor) -> Callable[[Any], tuple[float, float]]:
        def evaluate(weights: Any) -> tuple[float, float]:
            z = answers(model, dict(weights), inputs)
            return float(cross_entropy(z, labels)), float((z.argmax(1) == labels).float().mean())

        return evaluate

    method = WeightMatching()
    train, test = method.curves([a, b], on(x, y)), method.curves([a, b], on(test_x, test_y))
    naive, matched = train["naive"].barrier, train["matched"].barrier
    middle = {label: curve.record()["midpoint_accuracy"] for label, curve in test.items()}
    assert min(test["naive"].accuracy[0], test["naive"].accuracy[-1]) > 0.96
    assert naive > 0.5
    assert matched < 0.15
    assert middle["matched"] > 0.95
    assert middle["matched"] > middle["naive"] + 0.05
    # The leading singular directions of the hidden layers come closer, the singular values are what they were.
    assert method.network is not None
    turned = method.network.apply(b, method.matchings[0].permutations)

    def distance(other: State) -> float:
        return sum(float((a[name] - other[name]).square().sum()) for name in a) ** 0.5

    def alignment(other: State) -> float:
        (U, _, Vh), (X, _, Yh) = (torch.linalg.svd(found["3.weight"]) for found in (a, other))
        return float(((U.mT @ X).diag()[:16].abs() * (Vh @ Yh.mT).diag()[:16].abs()).mean())

    assert 0.5 < distance(turned) / distance(b) < 0.95
    assert alignment(turned) > 3 * alignment(b)
    for name in ("1.weight", "3.weight", "5.weight"):
        assert (torch.linalg.svdvals(b[name]) - torch.linalg.svdvals(turned[name])).abs().max() <= 1e-5


@pytest.mark.slow
def test_the_line_between_two_networks_is_in_the_results(tmp_path: Path) -> None:
    """Measured, seeds 0 to 2: barrier 1.23, 1.36, 1.30 to .08, .12, .14; midpoint 91, 74, 78 % to 96, 96, 95 %."""
    import contextlib
    import json

    from subspace_lab import cli

    place = tmp_path / "run"
    words = ["method=weight_matching", "seed=1", "trainer.progress=off", "trainer.checkpoint_every=0"]
    with contextlib.chdir(tmp_path):
        assert cli.main([*words, f"hydra.run.dir={place}", f"paths.output_root={tmp_path / 'out'}"]) == 0
    results = json.loads((place / "results.json").read_text())
    naive, matched = (results["merge"]["connectivity"][label] for label in ("naive", "matched"))
    assert len(naive["scales"]) == 25
    assert naive["barrier"] > 0.6
    assert matched["barrier"] < 0.3 * naive["barrier"]
    assert matched["midpoint_accuracy"] > naive["midpoint_accuracy"] + 0.05
    assert matched["midpoint_accuracy"] == pytest.approx(results["metrics"]["merged/accuracy"], abs=2e-3)
    assert results["metrics"]["experts/accuracy"] > 0.97
