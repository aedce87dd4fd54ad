"""The published recipes of federated learning: what they say, and which figure they name."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from subspace_lab import catalog
from subspace_lab.app import compose_config
from subspace_lab.reporting.published import lookup
from subspace_lab.schema import validate

ALL = [name for name in catalog.options("experiment") if name.startswith(("fot_", "flag_", "fedgp_"))]

# tasks, head, clients, in a round, rounds, images per step, ε, model
FOT: dict[str, tuple[Any, ...]] = {
    "fot_permuted_mnist": (10, "single", 125, 64, 200, 64, 0.94, "mlp"),
    "fot_split_cifar100": (10, "task", 50, 25, 1000, 16, [0.87, 0.001], "alexnet"),
    "fot_five_datasets": (None, "task", 150, 64, [1000, 100, 200, 100, 100], 16, [0.95, 0.001], "resnet18"),
    "fot_mini_imagenet": (20, "task", 50, 25, 250, 16, [0.90, 0.001], "resnet18"),
}
# Table 1: FedAvg's ACC and FGT, FOT's, in %: IID, then non-IID
TABLE = {
    "permuted_mnist": ((85.68, 8.29, 90.35, 1.75), (80.06, 9.21, 85.21, 1.97)),
    "split_cifar100": ((63.12, 13.57, 71.90, 0.87), (62.56, 10.49, 66.31, 0.60)),
    "five_datasets": ((77.95, 13.46, 85.21, 1.11), (67.71, 21.55, 79.23, 0.65)),
    "mini_imagenet": ((50.43, 33.08, 69.07, 0.19), (41.00, 32.92, 62.06, 0.17)),
}


@functools.cache
def composed(*overrides: str) -> Any:
    cfg = compose_config(list(overrides))
    validate(cfg)
    return cfg


def test_no_experiment_is_forgotten() -> None:
    assert set(ALL) == {*FOT, "flag_cifar10"}


@pytest.mark.parametrize("name", FOT)
def test_fots_recipes_are_the_released_ones(name: str) -> None:
    tasks, head, clients, participants, rounds, batch, threshold, model = FOT[name]
    cfg = composed(f"experiment={name}")
    assert cfg.name == name and cfg.protocol._target_.endswith("Federated") and cfg.method.name == "fot"
    assert (cfg.scenario.tasks, cfg.scenario.head, cfg.data.batch_size) == (tasks, head, batch)
    federation = cfg.federation
    assert (federation.clients, federation.participation, federation.rounds) == (clients, participants, rounds)
    assert (federation.partition, federation.shards, federation.local_epochs, federation.local_steps) == (
        "iid",
        2,
        1,
        None,
    )
    assert federation.weighting == "uniform" and cfg.method.threshold == threshold
    assert cfg.model._target_.endswith(f"build_fot_{model}") and cfg.scheduler._target_.endswith("constant")
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.01, 0.0, 1e-5)
    members = cfg.data.members.values() if "members" in cfg.data else [cfg.data]
    assert all(member.val_size == 0 and member.batch_size == batch for member in members)
    assert {member.augment for member in members} == {"crop_flip" if name == "fot_mini_imagenet" else "none"}


@pytest.mark.parametrize("name", FOT)
@pytest.mark.parametrize("partition", ["iid", "shards"])
@pytest.mark.parametrize("method", ["fedavg", "fot"])
def test_figures_beside_a_run_are_those_of_its_method_and_partition(name: str, partition: str, method: str) -> None:
    choice = f"federation.partition={partition}"
    ours, theirs = composed(f"experiment={name}", choice, f"method={method}"), composed(f"experiment={name}", choice)
    for group in ("data", "model", "optimizer", "federation", "scenario", "trainer"):
        assert ours[group] == theirs[group], group
    row = TABLE[name.removeprefix("fot_")][partition == "shards"]
    accuracy, forgotten = row[:2] if method == "fedavg" else row[2:]
    found = lookup(ours.published)
    assert found["seen"] == "release" and found["metrics"] == pytest.approx(
        {"final_accuracy": accuracy / 100, "forgetting_since_learned": forgotten / 100}
    )


@pytest.mark.parametrize("choice", ["method=median", "federation.partition=dirichlet"])
def test_what_was_not_published_has_no_figure_beside_it(choice: str) -> None:
    assert composed("experiment=fot_permuted_mnist", choice).published is None


def test_the_threshold_of_permuted_mnist_follows_the_partition() -> None:
    found = {
        partition: composed("experiment=fot_permuted_mnist", f"federation.partition={partition}").method.threshold
        for partition in ("iid", "shards", "dirichlet")
    }
    assert found == {"iid": 0.94, "shards": 0.96, "dirichlet": 0.96}
    cfg = composed("experiment=fot_permuted_mnist")
    assert cfg.scenario.first == "identity" and cfg.data.mean == [0.1307] and list(cfg.data.std) == [0.3081]
    assert composed("experiment=fot_permuted_mnist", "method.threshold=0.9").method.threshold == 0.9


@pytest.mark.parametrize("method", ["flag", "fedavg", "krum", "median", "trimmed_mean", "bulyan"])
def test_fifteen_workers_on_cifar10(method: str) -> None:
    cfg = composed("experiment=flag_cifar10", f"method={method}", "federation.byzantine=3")
    federation = cfg.federation
    assert (federation.clients, federation.participation, federation.local_steps) == (15, 1.0, 1)
    assert (federation.byzantine, federation.attack, federation.rounds) == (3, "random", 1050)
    assert cfg.published is None and cfg.method.name == method and cfg.get("scenario") is None
    assert (cfg.data.batch_size, cfg.data.augment, cfg.data.val_size) == (128, "crop_flip", 0)
    assert (cfg.optimizer.lr, cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.2, 0.0, 5e-4)
    places = [round(share * federation.rounds) for share in cfg.scheduler.milestones]
    assert places == [260, 520, 780, 1040] and cfg.scheduler.factor == 0.2
    assert cfg.model._target_.endswith("build_torchvision") and cfg.model.architecture == "resnet18"


def test_federations_differ_in_numbers_alone() -> None:
    names = [name for name in catalog.options("federation") if name != "clients_10"]
    assert set(names) == {"clients_50", "clients_125", "clients_150", "workers_15"}
    small = composed("method=fedavg").federation
    for name in names:
        cfg = composed("method=fedavg", f"federation={name}").federation
        assert set(cfg) == set(small)
        different = {key for key in small if small[key] != cfg[key]}
        assert different <= {"clients", "participation", "local_steps", "attack"}, name
        assert f"{cfg.clients}" in name
