"""What attackers send, and what becomes of the mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subspace_lab.federated.byzantine import Attack, attack


def updates(p: int = 8, n: int = 1000) -> Tensor:
    return torch.randn(p, n, generator=torch.Generator().manual_seed(0)) + 1


HONEST = torch.tensor([False, False, True, True, True, True, True, True])


@pytest.mark.parametrize("kind", ["sign_flip", "random", "omniscient"])
def test_only_attackers_rows_change_and_every_time_alike(kind: Attack) -> None:
    x = updates()
    first = attack(kind, x.clone(), HONEST, 5, 0.1)
    assert torch.equal(first[2:], x[2:])
    assert not torch.isclose(first[:2], x[:2]).all(dim=1).any()
    assert torch.equal(first, attack(kind, x.clone(), HONEST, 5, 0.1))
    everybody = torch.ones(8, dtype=torch.bool)
    assert torch.equal(attack(kind, x.clone(), everybody, 5), x)


def test_sign_flip_is_ten_times_the_opposite() -> None:
    x = updates()
    torch.testing.assert_close(attack("sign_flip", x.clone(), HONEST, 0)[:2], -10 * x[:2])


def test_random_is_a_step_along_a_uniform_gradient() -> None:
    x = updates(8, 200_000)
    sent = attack("random", x.clone(), HONEST, 3, 0.5)[:2]
    assert sent.max() <= 0 and sent.min() > -0.5
    assert abs(sent.mean() + 0.25) < 1e-3 and abs(sent.std() - 0.5 / 12**0.5) < 1e-3
    correlation = torch.corrcoef(sent)[0, 1]
    assert abs(correlation) < 0.02  # each attacker draws its own
    assert not torch.equal(sent, attack("random", x.clone(), HONEST, 4, 0.5)[:2])
    # A part of the row holds the same numbers: blocks leave no trace.
    assert torch.equal(attack("random", x[:, :70].clone(), HONEST, 3, 0.5)[:2], sent[:, :70])


@pytest.mark.parametrize("f", [1, 2, 5])
def test_omniscient_attackers_turn_the_mean_into_its_opposite(f: int) -> None:
    x, honest = updates(), torch.arange(8) >= f
    centre = x[f:].mean(dim=0)
    torch.testing.assert_close(attack("omniscient", x, honest, 0).mean(dim=0), -centre, rtol=1e-4, atol=1e-4)


def test_nobody_knows_an_honest_update_where_all_attack() -> None:
    x = updates()
    assert torch.equal(attack("omniscient", x.clone(), torch.zeros(8, dtype=torch.bool), 0), x)
