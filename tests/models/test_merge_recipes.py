"""The published merges: task lists, checkpoints by name, options, and which figure each names."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from omegaconf import OmegaConf

from subspace_lab import catalog
from subspace_lab.app import compose_config
from subspace_lab.data.clip_catalog import SETS
from subspace_lab.data.glue_tasks import TASKS
from subspace_lab.errors import UserError
from subspace_lab.reporting.published import lookup
from subspace_lab.schema import validate

HUB = {"b32": "base-patch32", "b16": "base-patch16", "l14": "large-patch14"}
CLIP = [f"merge_clip_vit_{size}_{count}" for size in HUB for count in (8, 14, 20)]
METHODS = ["simple_average", "task_arithmetic", "ties", "fisher", "regmean", "adamerging", "concrete", "tsv_merge"]
METHODS += ["iso_c", "iso_cts", "opcm"]


@functools.cache
def composed(*overrides: str) -> Any:
    cfg = compose_config(list(overrides))
    validate(cfg)
    return cfg


@pytest.mark.parametrize("name", CLIP)
def test_towers_and_tasks_are_the_lists_of_the_papers(name: str) -> None:
    size, count = name.split("_")[-2:]
    cfg = composed(f"experiment={name}")
    assert list(cfg.data.tasks) == list(SETS)[: int(count)]
    assert cfg.model.path == cfg.merge.base == f"openai/clip-vit-{HUB[size]}"
    expected = {task: f"tanganke/clip-vit-{HUB[size]}_{task}" for task in cfg.data.tasks}
    assert OmegaConf.to_container(cfg.merge.models) == expected
    assert (cfg.merge.family, cfg.merge.split_fused_qkv, cfg.data.side) == ("fusionbench_hf", False, 224)
    assert (cfg.method.name, cfg.name) == ("iso_c", f"merge_iso_c_{name.removeprefix('merge_')}")


def test_task_lists() -> None:
    assert list(SETS)[:8] == ["sun397", "stanford-cars", "resisc45", "eurosat", "svhn", "gtsrb", "mnist", "dtd"]
    assert list(SETS)[8:14] == ["oxford_flowers102", "pcam", "fer2013", "oxford-iiit-pet", "stl10", "cifar100"]
    assert list(SETS)[14:] == ["cifar10", "food101", "fashion_mnist", "emnist_letters", "kmnist", "rendered-sst2"]
    sizes = [len(SETS[task].classes(task)) for task in SETS]
    assert sizes == [397, 196, 45, 10, 10, 43, 10, 47, 102, 2, 7, 37, 10, 100, 10, 101, 10, 26, 10, 2]
    assert [len(SETS[task].prompts) for task in list(SETS)[:8]] == [2, 8, 18, 3, 1, 3, 1, 8]
    assert len(SETS["cifar100"].prompts) == 18
    for task, known in SETS.items():
        assert all(prompt.count("{}") == 1 and "<>" not in prompt for prompt in known.prompts), task
        assert len(set(known.classes(task))) == len(known.classes(task)), task


@pytest.mark.parametrize(
    "method", [name if name in ("fisher", "opcm") else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_any_method_goes_with_any_of_them(method: str) -> None:
    cfg = composed("experiment=merge_clip_vit_b32_8", f"method={method}")
    assert cfg.data.tasks[0] == "sun397"
    assert cfg.model.path == "openai/clip-vit-base-patch32"
    found = lookup(cfg.published)
    assert found["seen"] in ("release", "memory", "issue")
    assert "fusionbench_hf" in cfg.published
    assert 0.5 < found["metrics"]["merged/accuracy"] < 1


def test_variants_have_figures_of_their_own() -> None:
    def figure(*overrides: str) -> float:
        found = lookup(composed("experiment=merge_clip_vit_b32_8", *overrides).published)
        return float(found["metrics"]["merged/accuracy"])

    assert figure("method=concrete") == 0.776
    assert figure("method=concrete", "method.inner=first_order") == 0.844
    assert figure("method=adamerging") == 0.826
    assert figure("method=adamerging", "method.wise=task") == 0.687


@pytest.mark.parametrize("name", CLIP)
def test_every_named_figure_exists(name: str) -> None:
    cfg = composed(f"experiment={name}")
    named = OmegaConf.to_container(cfg.model.recipe.published, resolve=True)
    assert isinstance(named, dict)
    for method, entry in named.items():
        assert name.removeprefix("merge_") in entry, method
        assert lookup(entry)["metrics"].keys() == {"merged/accuracy"}
    if not name.endswith("_8"):
        assert set(named) == {"opcm"}


def test_defaults_are_the_papers_where_the_data_have_no_shorter_ones() -> None:
    ada = composed("experiment=merge_clip_vit_b32_8", "method=adamerging").method
    assert (ada.steps, ada.batches, ada.batch_size, ada.clamp, ada.initial, ada.lr) == (500, 2, 16, True, 0.3, 1e-3)
    concrete = composed("experiment=merge_clip_vit_b32_8", "method=concrete").method
    assert (concrete.steps, concrete.adapt_steps, concrete.temperature, concrete.inner_lr) == (2000, 1000, 0.5, 1.0)
    assert (concrete.scale, concrete.lr, concrete.batch_size, concrete.inner) == (0.3, 1e-3, 16, "none")
    assert composed("experiment=merge_clip_vit_l14_8", "method=concrete").method.batch_size == 4
    assert composed("experiment=merge_clip_vit_b32_8", "method=regmean").method.examples == 256
    assert composed("method=adamerging").method.steps < 500


def test_what_was_not_published_has_no_figure_beside_it() -> None:
    assert composed("experiment=merge_clip_vit_b16_14", "method=dare").published is None


def test_figures_of_two_families_are_apart() -> None:
    ours, theirs = (
        lookup(f"merging/{family}/clip_vit_b32_8/iso_c") for family in ("fusionbench_hf", "task_vectors_drive")
    )
    assert ours["metrics"] != theirs["metrics"]
    assert theirs["seen"] == "memory"
    with pytest.raises(UserError, match="no 'fusionbench'"):
        lookup("merging/fusionbench/clip_vit_b32_8/iso_c")


@pytest.mark.parametrize("inner", ["none", "first_order"])
def test_flan_t5_takes_the_released_steps_for_language_models(inner: str) -> None:
    cfg = composed("experiment=merge_concrete_flan_t5_glue", f"method.inner={inner}")
    method = cfg.method
    assert (method.lr, method.inner_lr, method.adapt_lr, method.batch_size) == (1e-4, 0.1, 1e-4, 8)
    assert (method.steps, method.adapt_steps, method.scale) == (2000, 1000, 0.3)
    expected = {task: f"tanganke/flan-t5-base_glue-{task}_lora-16" for task in TASKS}
    assert OmegaConf.to_container(cfg.merge.models) == expected
    assert list(cfg.data.tasks) == list(TASKS)
    assert cfg.model.path == cfg.merge.base == cfg.data.tokenizer == "google/flan-t5-base"
    assert (cfg.published, cfg.data.prompts) == (None, None)
    figures = lookup(f"merging/{cfg.merge.family}/flan_t5_base_glue/concrete_{inner}")["metrics"]
    assert figures.keys() == {"merged/accuracy", *(f"merged/{task}/accuracy" for task in TASKS)}
    each = [value for name, value in figures.items() if name != "merged/accuracy"]
    assert figures["merged/accuracy"] == pytest.approx(sum(each) / len(each), abs=1e-4)


def test_no_experiment_is_forgotten() -> None:
    found = [name for name in catalog.options("experiment") if name.startswith("merge_")]
    assert {*CLIP, "merge_concrete_flan_t5_glue"} <= set(found)
