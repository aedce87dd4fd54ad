"""Who has which examples, and who takes part."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from subspace_lab.errors import UserError
from subspace_lab.federated.federation import Federation
from subspace_lab.federated.partition import Partition, divide

LABELS = np.random.default_rng(0).integers(0, 10, 1437)


@pytest.mark.parametrize("kind", ["iid", "shards", "dirichlet"])
@pytest.mark.parametrize("clients", [1, 7, 10, 100])
def test_every_example_belongs_to_one_client(kind: Partition, clients: int) -> None:
    shares = divide(kind, len(LABELS), LABELS, clients, seed=3)
    assert len(shares) == clients and min(map(len, shares)) > 0
    assert sorted(np.concatenate(shares).tolist()) == list(range(len(LABELS)))
    again = divide(kind, len(LABELS), LABELS, clients, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(shares, again, strict=True))
    other = divide(kind, len(LABELS), LABELS, clients, seed=4)
    assert clients == 1 or any(not np.array_equal(a, b) for a, b in zip(shares, other, strict=True))


def classes(shares: list[Any]) -> list[int]:
    return [len(np.unique(LABELS[share])) for share in shares]


def test_partitions_are_as_skewed_as_they_say() -> None:
    iid = divide("iid", len(LABELS), LABELS, 10, 0)
    assert min(classes(iid)) == 10 and {len(share) for share in iid} <= {143, 144}
    shards = divide("shards", len(LABELS), LABELS, 10, 0)
    assert max(classes(shards)) <= 4  # two pieces, each across at most one border
    assert max(classes(divide("shards", len(LABELS), LABELS, 10, 0, shards=1))) <= 2
    skewed, even = (divide("dirichlet", len(LABELS), LABELS, 10, 0, alpha=alpha) for alpha in (0.1, 100.0))
    assert np.std([len(s) for s in skewed]) > 4 * np.std([len(s) for s in even])
    assert np.mean(classes(skewed)) < 7 and min(classes(even)) == 10


def test_strong_skew_leaves_nobody_without_examples() -> None:
    shares = divide("dirichlet", len(LABELS), LABELS, 400, 0, alpha=0.01)
    assert min(map(len, shares)) == 1 and sum(map(len, shares)) == len(LABELS)


def test_what_cannot_be_shared_is_refused() -> None:
    with pytest.raises(UserError, match="2000 clients cannot share 1437 training examples"):
        divide("iid", len(LABELS), LABELS, 2000, 0)
    with pytest.raises(UserError, match="800 clients with 2 shards each cannot share"):
        divide("shards", len(LABELS), LABELS, 800, 0)
    with pytest.raises(UserError, match="partition=shards needs labels"):
        divide("shards", 100, None, 5, 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"clients": 0}, "federation.clients=0"),
        ({"participation": 0.0}, "federation.participation=0: expected a share"),
        ({"participation": 11}, "federation.participation=11: expected a share in .0, 1., or 2 to 10"),
        ({"participation": 2.5}, "federation.participation=2.5"),
        ({"alpha": 0.0}, "federation.alpha=0"),
        ({"rounds": []}, "federation.rounds"),
        ({"rounds": [3, 0]}, "federation.rounds"),
        ({"local_steps": 0}, "federation.local_steps=0"),
        ({"byzantine": 10}, "federation.byzantine=10: expected 0 to 9"),
        ({"secure_aggregation": True}, "engine=inprocess nothing is sent"),
        ({"secure_aggregation": True, "engine": "flower", "byzantine": 1}, "hides the updates"),
        ({"server_momentum": 1.0}, "federation.server_momentum=1: expected 0 or more, less than 1"),
        ({"seed": -1}, "federation.seed=-1"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        Federation(**arguments)


def test_participants_are_drawn_anew_each_round_and_the_same_each_time() -> None:
    federation = Federation(clients=125, participation=64)
    rounds = [federation.sample(k, seed=1) for k in range(40)]
    assert all(len(who) == 64 == len(set(who)) and who == sorted(who) for who in rounds)
    assert rounds[0] != rounds[1] and rounds == [federation.sample(k, seed=1) for k in range(40)]
    assert rounds != [federation.sample(k, seed=2) for k in range(40)]
    counts = np.bincount(np.concatenate(rounds), minlength=125)
    assert counts.min() > 8 and counts.max() < 32  # 20.5 of 40 on average, sd 3.2
    assert all(7 in federation.sample(k, seed=1, always=(7,)) for k in range(40))
    assert all(len(federation.sample(k, seed=1, always=(7,))) == 64 for k in range(5))
    assert Federation(clients=125, participation=0.512).participants == 64
    assert Federation(clients=10).sample(5, seed=0) == list(range(10))
    assert Federation(seed=5).sample(0, 0) == Federation(seed=5).sample(0, 1)


def test_rounds_of_each_task() -> None:
    assert Federation(rounds=3).rounds(4) == [3, 3, 3, 3]
    assert Federation(rounds=[1, 2]).rounds(2) == [1, 2]
    with pytest.raises(UserError, match="is of 2 tasks, and there are 3"):
        Federation(rounds=[1, 2]).rounds(3)
