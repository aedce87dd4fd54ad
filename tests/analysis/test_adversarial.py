"""FGSM and PGD: the ball, the range, the optimum of a linear model, determinism, and what they leave untouched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from subspace_lab.analysis.adversarial import fgsm, pgd


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 3)
    )


def _losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    model.eval()
    with torch.no_grad():
        return nn.functional.cross_entropy(model(x), y, reduction="none")


def test_every_loss_rises_inside_the_ball_and_the_range() -> None:
    net = _net().train()
    x, y = torch.rand(64, 1, 4, 4), torch.randint(0, 3, (64,))
    state = {k: v.clone() for k, v in net.state_dict().items()}
    one = fgsm(net, x, y, 0.1, bounds=(0.0, 1.0))
    many = pgd(net, x, y, 0.1, steps=20, step_size=0.02, seed=0, bounds=(0.0, 1.0))
    assert all(m.training for m in net.modules())  # as it was
    for moved in (one, many):
        assert (moved - x).abs().max() <= 0.1 + 1e-6
        assert (moved - x).abs().max() >= 0.0999
        assert moved.min() >= 0 and moved.max() <= 1
        assert not moved.requires_grad
    for name, value in net.state_dict().items():  # BatchNorm's statistics too
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)
    assert all(p.grad is None for p in net.parameters())
    clean, weak, strong = (_losses(net, z, y) for z in (x, one, many))
    assert (weak > clean).float().mean() > 0.95
    assert (strong > clean).all()
    assert strong.mean() >= weak.mean()


def test_linear_model_reaches_its_optimum() -> None:
    """Two classes: the loss is monotone in (w_other − w_true)·x, so the worst point is a corner of ball and range."""
    torch.manual_seed(1)
    model = nn.Linear(10, 2)
    x, y = torch.rand(8, 10), torch.randint(0, 2, (8,))
    W = model.weight.detach()
    direction = (W[1 - y] - W[y]).sign()
    best = (x + 0.07 * direction).clamp(0.2, 0.9)
    torch.testing.assert_close(fgsm(model, x, y, 0.07, bounds=(0.2, 0.9)), best)
    torch.testing.assert_close(pgd(model, x, y, 0.07, steps=30, step_size=0.01, seed=3, bounds=(0.2, 0.9)), best)


def test_seed_decides_the_start_and_examples_do_not_see_each_other() -> None:
    net = _net()
    x, y = torch.rand(12, 1, 4, 4), torch.randint(0, 3, (12,))
    torch.manual_seed(5)
    first = pgd(net, x, y, 0.1, steps=2, step_size=0.01, seed=7)
    torch.manual_seed(6)  # the global generator has no part in it
    torch.testing.assert_close(pgd(net, x, y, 0.1, steps=2, step_size=0.01, seed=7), first, rtol=0, atol=0)
    assert (pgd(net, x, y, 0.1, steps=2, step_size=0.01, seed=8) - first).abs().max() > 0.01
    alone = torch.cat([fgsm(net, x[i : i + 1], y[i : i + 1], 0.05) for i in range(12)])
    torch.testing.assert_close(fgsm(net, x, y, 0.05), alone)


def test_radius_per_channel_plain_functions_and_inference_mode() -> None:
    net = _net().eval()
    x, y = torch.rand(4, 2, 4, 2), torch.randint(0, 3, (4,))
    radius = torch.tensor([0.05, 0.2]).view(1, 2, 1, 1)
    with torch.inference_mode():
        inputs, labels = x + 0.0, y + 0  # inference tensors, as a validation loop gives
        moved = pgd(lambda z: net(z), inputs, labels, radius, steps=3, step_size=radius / 2, seed=0)
    far = (moved - x).abs().amax(dim=(0, 2, 3))
    torch.testing.assert_close(far, torch.tensor([0.05, 0.2]))
    torch.testing.assert_close(fgsm(net, x, y, 0.0), x)


@pytest.mark.parametrize(
    "change",
    [{"epsilon": -0.1}, {"steps": 0}, {"bounds": (1.0, 0.0)}, {"labels": torch.zeros(3, dtype=torch.int64)}],
)
def test_values_out_of_range_are_refused(change: dict[str, object]) -> None:
    arguments: dict[str, object] = {
        "inputs": torch.rand(2, 1, 4, 4),
        "labels": torch.zeros(2, dtype=torch.int64),
        "epsilon": 0.1,
        "steps": 1,
        "step_size": 0.1,
        "seed": 0,
    }
    with pytest.raises(ValueError):
        pgd(_net(), **(arguments | change))  # type: ignore[arg-type]
