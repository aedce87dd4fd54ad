"""The published recipes of Grassmann class representation: what they say, and in what their rows differ."""

from __future__ import annotations

from typing import Any

import pytest

from subspace_lab import catalog
from subspace_lab.app import compose_config
from subspace_lab.reporting.published import lookup
from subspace_lab.schema import to_plain, validate

ALL = [name for name in catalog.options("experiment") if name.startswith("gcr_")]
SMALL = ["gcr_digits", "gcr_fashion_mnist", "gcr_cifar10", "gcr_cifar100"]
# Rows whose two heads have one file; the others have <name> and <name>_softmax.
TOGETHER = ["gcr_resnet50d", "gcr_resnet101d", "gcr_resnet152d", "gcr_swin_t"]
APART = ["gcr_vgg13_bn", "gcr_deit3_s", "gcr_rsb_a1", "gcr_rsb_a2", "gcr_rsb_a3"]
IMAGES = 1_281_167

# epochs, images per step, learning rate, weight decay, epochs of warm-up, last learning rate, the subspaces' own
RECIPES = {
    "gcr_resnet50d": (100, 256, 0.1, 1e-4, 0, 0, None),
    "gcr_vgg13_bn": (100, 256, 0.1, 1e-4, 0, 0, None),
    "gcr_swin_t": (300, 1024, 1e-3, 0.05, 20, 1e-5, None),
    "gcr_deit3_s": (800, 2048, 4e-3, 0.05, 5, 0, 0.3),
    "gcr_rsb_a1": (600, 2048, 5e-3, 0.01, 5, 1e-6, 0.3),
    "gcr_rsb_a2": (300, 2048, 5e-3, 0.02, 5, 1e-6, 0.3),
    "gcr_rsb_a3": (100, 2048, 8e-3, 0.02, 5, 1e-6, 0.3),
}


def composed(*overrides: str) -> Any:
    cfg = compose_config(list(overrides))
    validate(cfg)
    return cfg


def leaves(cfg: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{path}.{key}" if path else key)
        else:
            found[path] = node

    walk({key: value for key, value in to_plain(cfg).items() if key not in ("paths", "hydra")}, "")
    return found


@pytest.mark.parametrize("name", list(RECIPES))
def test_recipes_are_the_published_ones(name: str) -> None:
    epochs, batch, lr, decay, warmup, last, head_lr = RECIPES[name]
    cfg = composed(f"experiment={name}")
    assert (cfg.trainer.max_epochs, cfg.data.global_batch_size) == (epochs, batch)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.method.head_lr) == (lr, decay, head_lr)
    steps = epochs * IMAGES / batch
    if name == "gcr_vgg13_bn":
        assert (list(cfg.scheduler.milestones), cfg.scheduler.factor) == ([0.3, 0.6, 0.9], 0.1)
    else:
        assert cfg.scheduler.warmup_ratio * steps == pytest.approx(warmup * IMAGES / batch, abs=1)
        assert cfg.scheduler.min_ratio * lr == pytest.approx(last)
    assert cfg.data.val_size == 0 and cfg.protocol._target_.endswith("Fit")


@pytest.mark.parametrize("name", TOGETHER)
def test_one_file_for_both_heads_finds_each_ones_figure(name: str) -> None:
    row = name.removeprefix("gcr_")
    for overrides, entry in (([], "gcr8"), (["method=softmax"], "softmax"), (["method=cosine_softmax"], None)):
        published = composed(f"experiment={name}", *overrides).published
        assert published == (entry and f"gcr/{row}/{entry}")
        assert published is None or 0.7 < lookup(published)["metrics"]["test/accuracy"] < 0.85
    assert composed(f"experiment={name}", "method.k=[1, 2]").published is None


def test_every_published_dimension_is_found() -> None:
    for k in (1, 4, 8, 16, 32):
        assert composed("experiment=gcr_resnet50d", f"method.k={k}").published == f"gcr/resnet50d/gcr{k}"
    assert composed("experiment=gcr_resnet50d", "method.k=2").published is None
    assert composed("experiment=gcr_resnet101d", "method.k=16").published is None


@pytest.mark.parametrize("name", APART)
def test_published_rows_differ_in_what_they_say_they_differ_in(name: str) -> None:
    """The confounds of the published table, and nothing else by mistake."""
    ours, vector = leaves(composed(f"experiment={name}")), leaves(composed(f"experiment={name}_softmax"))
    differing = {key for key in ours.keys() | vector.keys() if ours.get(key) != vector.get(key)}
    differing = {key for key in differing if not key.startswith(("method.", "model.recipe.")) and key != "published"}
    assert differing == ({"model.feature_dropout"} if name == "gcr_vgg13_bn" else {"data.loss"})
    if name != "gcr_vgg13_bn":
        assert (vector["data.loss"], ours["data.loss"]) == ("bce", "cross_entropy")
    for leaf, entry in ((ours, "gcr8"), (vector, "softmax")):
        assert leaf["published"] == f"gcr/{name.removeprefix('gcr_')}/{entry}"
        lookup(leaf["published"])


@pytest.mark.parametrize("name", ["gcr_rsb_a1_fixres", "gcr_rsb_a2_fixres", "gcr_rsb_a3_fixres"])
def test_fixres_trains_smaller_than_it_tests(name: str) -> None:
    cfg = composed(f"experiment={name}")
    assert (cfg.data.image_size, cfg.data.eval_size, int(224 / cfg.data.crop_ratio)) == (176, 224, 232)
    assert lookup(cfg.published)["metrics"]["test/accuracy"] > 0.8
    assert int(224 / composed(f"experiment={name.removesuffix('_fixres')}").data.crop_ratio) == 236


@pytest.mark.parametrize("name", SMALL)
def test_small_experiments_take_each_head(name: str) -> None:
    for overrides in ([], ["method.k=[" + ",".join("2" * 5) + "]"], ["method=softmax"], ["method=cosine_softmax"]):
        cfg = composed(f"experiment={name}", *overrides)
        assert (cfg.optimizer.lr, cfg.optimizer.weight_decay, cfg.scheduler.min_ratio) == (0.1, 1e-4, 0.0)
        assert cfg.protocol._target_.endswith("Transfer") and cfg.protocol.probes
    assert not set(composed("experiment=gcr_digits").data.classes) & set(
        composed("experiment=gcr_digits").protocol.probes.other_digits.classes
    )


def test_no_experiment_is_forgotten() -> None:
    fixres = {f"gcr_rsb_a{n}_fixres" for n in (1, 2, 3)}
    others = {"gcr_resnet50d_transfer", *fixres}
    assert set(ALL) == {*SMALL, *TOGETHER, *APART, *(f"{name}_softmax" for name in APART), *others}


def test_transfer_has_a_published_row_of_every_head() -> None:
    for overrides, entry in (([], "gcr8"), (["method.k=32"], "gcr32"), (["method=cosine_softmax"], "cosine_softmax")):
        cfg = composed("experiment=gcr_resnet50d_transfer", *overrides)
        assert cfg.published == f"gcr/transfer/resnet50d/{entry}" and cfg.protocol.classifier == "svm"
        assert 50 < lookup(cfg.published)["metrics"]["features/intra_class_angle"] < 70


def test_the_sweep_over_k() -> None:
    cfg = composed("experiment=gcr_digits", "hparams_search=gcr_k")
    assert cfg.method.k == 8  # a sweep's values come from the sweeper
