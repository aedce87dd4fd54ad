"""The published recipes of continual learning on images: what they say, and which figure they name."""

from __future__ import annotations

from typing import Any

import pytest

from subspace_lab import catalog
from subspace_lab.app import compose_config
from subspace_lab.reporting.published import lookup
from subspace_lab.schema import validate

FAMILIES = ("gpm_", "coso_", "inflora_", "hlop_", "bfp_", "nmc_")
ALL = [name for name in catalog.options("experiment") if name.startswith(FAMILIES)]

# tasks, head, passes over a task, images per step, learning rate, what the model's weights start from
RECIPES: dict[str, tuple[Any, ...]] = {
    "gpm_permuted_mnist": (10, "single", 5, 10, 0.01, None),
    "gpm_split_cifar100": (10, "task", 200, 64, 0.01, None),
    "gpm_split_cifar100_superclass": (20, "task", 50, 64, 0.01, None),
    "gpm_five_datasets": (None, "task", 100, 64, 0.1, None),
    "coso_split_cifar100": (10, "class", 20, 128, 3e-4, "in1k"),
    "coso_imagenet_r_5": (5, "class", 40, 128, 4e-4, "in1k"),
    "coso_imagenet_r_10": (10, "class", 40, 128, 4e-4, "in1k"),
    "coso_imagenet_r_20": (20, "class", 40, 128, 4e-4, "in1k"),
    "coso_domainnet": (5, "class", 5, 128, 1e-4, "in1k"),
    "inflora_split_cifar100": (10, "class", 20, 128, 5e-4, "in21k"),
    "inflora_imagenet_r_10": (10, "class", 50, 128, 5e-4, "in21k"),
    "hlop_permuted_mnist": (10, "single", 1, 64, 0.1, None),
    "bfp_split_cifar10": (5, "class", 50, 32, 0.03, None),
    "bfp_split_cifar100": (10, "class", 50, 32, 0.03, None),
    "nmc_split_cifar100": (10, "class", 1, None, None, "in21k"),
}


def composed(*overrides: str) -> Any:
    cfg = compose_config(list(overrides))
    validate(cfg)
    return cfg


def test_no_experiment_is_forgotten() -> None:
    assert set(ALL) == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_are_the_published_ones(name: str) -> None:
    tasks, head, epochs, batch, lr, weights = RECIPES[name]
    cfg = composed(f"experiment={name}")
    assert cfg.name == name and cfg.protocol._target_.endswith("Continual")
    assert (cfg.scenario.tasks, cfg.scenario.head, cfg.trainer.max_epochs) == (tasks, head, epochs)
    assert batch is None or (cfg.data.batch_size, cfg.optimizer.lr) == (batch, lr)
    if weights is not None:
        assert cfg.model.pretrained is True and cfg.model.architecture.endswith(weights)
        looks = cfg.data.each if "each" in cfg.data else cfg.data
        assert (looks.image_size, list(looks.mean), list(looks.std)) == (224, [0.0] * 3, [1.0] * 3)
        assert looks.augment == ("none" if name.startswith("nmc") else "random_resized_crop")
        assert looks.val_size == 0
    family = name.split("_")[0]
    if family == "bfp":
        assert cfg.published is None and cfg.scenario.loss_over == "seen" and cfg.data.augment == "crop_flip"
        return
    assert cfg.published == f"continual/{family}/{name.removeprefix(family + '_')}"
    metrics = lookup(cfg.published)["metrics"]
    assert 0.5 < metrics["final_accuracy"] < 0.96 and metrics.get("backward_transfer", 0.0) <= 0
    known = {"final_accuracy", "average_incremental_accuracy", "backward_transfer", "forgetting"}
    assert set(metrics) <= known


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("gpm_")])
@pytest.mark.parametrize("method", ["naive", "sgp", "trgp", "rogo"])
def test_others_run_by_gpms_recipe_without_its_figure(name: str, method: str) -> None:
    ours, gpm = composed(f"experiment={name}", f"method={method}"), composed(f"experiment={name}")
    assert ours.published is None and ours.method.name == method
    for group in ("data", "model", "trainer", "optimizer", "callbacks", "scenario"):
        if group != "model":
            assert ours[group] == gpm[group], group
    if method != "naive":
        assert (ours.method.threshold, ours.method.samples) == (gpm.method.threshold, gpm.method.samples)


def test_thresholds_and_schedules() -> None:
    assert dict(composed("experiment=gpm_permuted_mnist").method.threshold) == {"^1$": 0.95, "^[35]$": 0.99}
    assert list(composed("experiment=gpm_split_cifar100").method.threshold) == [0.97, 0.003]
    assert list(composed("experiment=gpm_split_cifar100_superclass").method.threshold) == [0.98, 0.001]
    five = composed("experiment=gpm_five_datasets")
    assert (five.method.threshold, five.callbacks.plateau.patience, five.callbacks.plateau.factor) == (0.965, 5, 3.0)
    assert composed("experiment=gpm_split_cifar100", "method=sgp").method.alpha == 10.0
    assert composed("experiment=gpm_split_cifar100_superclass", "method=sgp").method.alpha == 3.0
    coso = {
        name: composed(f"experiment=coso_{name}").method for name in ("split_cifar100", "imagenet_r_5", "domainnet")
    }
    found = {name: (m.r1, m.r2, m.every, m.threshold, m.head_lr) for name, m in coso.items()}
    assert found == {
        "split_cifar100": (15, 100, 1, 0.98, 5e-4),
        "imagenet_r_5": (50, 120, 1, 0.98, 4e-4),
        "domainnet": (70, 160, 20, 0.98, 5e-4),
    }


def test_class_orders_have_every_class_once() -> None:
    for name in ("gpm_split_cifar100_superclass", "nmc_split_cifar100"):
        classes = list(composed(f"experiment={name}").data.classes)
        assert sorted(classes) == list(range(100)) and classes != sorted(classes)
