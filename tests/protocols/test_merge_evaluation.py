"""Figures of a merge: heads from prototypes, the choice of λ, normalised accuracies, families that are kept apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from subspace_lab.data.digits_tasks import DigitsTasks
from subspace_lab.merging.workshop import TaskBench, Workshop
from subspace_lab.protocols.experts import prototype_head
from subspace_lab.protocols.merge_evaluation import (
    choose_scale,
    drawer,
    normalized,
    similarities,
    task_figures,
)
from subspace_lab.reporting import merge_report
from subspace_lab.reporting.grouping import group_of

CPU = torch.device("cpu")


def test_a_prototype_is_the_mean_direction_and_a_class_without_examples_is_never_preferred() -> None:
    features = torch.tensor([[2.0, 0.0], [9.0, 0.0], [0.0, 1.0]])
    head = prototype_head(features, torch.tensor([0, 0, 1]), 3, gamma=7.0)
    torch.testing.assert_close(head.weight.data, torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    logits = head(features)
    torch.testing.assert_close(logits[0], torch.tensor([7.0, 0.0, 0.0]))
    assert not any(p.requires_grad for p in head.parameters())


def test_figures_agree_with_a_plain_count() -> None:
    torch.manual_seed(0)
    data = DigitsTasks(["rot90"]).tasks()[0]
    data.setup()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12)).eval().requires_grad_(False)
    head = nn.Linear(12, 10).requires_grad_(False)
    task = TaskBench("rot90", head, drawer(data, 0, CPU), {"train": 1, "validation": 1, "test": 1})
    base = dict(model.state_dict())
    workshop = Workshop(model, base, [base], [task], 0, CPU, print)
    other = {name: tensor + 1.0 for name, tensor in base.items()}
    found = task_figures(workshop, other, 0, "test", data)
    test: Any = data.parts.test
    logits = head(torch.func.functional_call(model, other, (test.inputs,)))
    p = logits.softmax(1)
    assert found.accuracy == pytest.approx((logits.argmax(1) == test.labels).float().mean().item())
    assert found.loss == pytest.approx(nn.functional.cross_entropy(logits, test.labels).item(), rel=1e-5)
    assert found.entropy == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)
    assert found.marginals == pytest.approx((logits.argmax(1).bincount(minlength=10) / 717).tolist())
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in base.items())


def test_drawn_batches_follow_their_seed_and_cover_a_part_before_they_repeat() -> None:
    data = DigitsTasks(["rot90"]).tasks()[0]
    data.setup()
    draw = drawer(data, 3, CPU)
    first, again, other = (draw("validation", 60, seed) for seed in (1, 1, 2))
    batches = [next(first) for _ in range(3)]
    assert torch.equal(next(again)["inputs"], batches[0]["inputs"])
    assert not torch.equal(next(other)["inputs"], batches[0]["inputs"])
    assert len({image.numpy().tobytes() for batch in batches for image in batch["inputs"]}) == 180


def test_the_best_scale_is_chosen_and_of_equals_the_smallest() -> None:
    found = choose_scale([1.0, 0.5, 0.2], lambda s: {"w": torch.tensor(s)}, lambda w: -abs(float(w["w"]) - 0.5))
    assert found.value == 0.5 and found.chosen == "validation"
    assert [scale for scale, _ in found.curve] == [0.2, 0.5, 1.0]
    assert choose_scale([3.0, 2.0], lambda s: {}, lambda w: 1.0).value == 2.0


def test_normalised_accuracy_is_a_mean_of_ratios() -> None:
    assert normalized([0.5, 0.9], [1.0, 0.9]) == pytest.approx(0.75)
    assert normalized([0.0], [0.0]) == 0.0


def test_similarities_are_of_all_tensors_together() -> None:
    base = {"a": torch.zeros(2), "b": torch.zeros(1), "n": torch.tensor(3)}
    models = [
        {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([4.0]), "n": torch.tensor(3)},
        {"a": torch.tensor([0.0, 2.0]), "b": torch.tensor([0.0]), "n": torch.tensor(9)},
    ]
    found = similarities(base, models)
    assert found["norms"] == [5.0, 2.0] and found["cosines"] == [[1.0, 0.0], [0.0, 1.0]]


def test_families_of_checkpoints_are_not_compared() -> None:
    section = {"family": "mine"}
    assert merge_report.family_refusal(section, {"metrics": {}}) is None
    assert merge_report.family_refusal(section, {"metrics": {}, "family": "mine"}) is None
    refusal = merge_report.family_refusal(section, {"metrics": {}, "family": "theirs"})
    assert refusal is not None and "theirs" in refusal and "mine" in refusal
    theirs = merge_report.published_entry("merging/fusionbench_hf/clip_vit_b32_8/iso_c")
    assert merge_report.family_refusal(section, theirs) is not None
    assert merge_report.family_refusal({"family": "fusionbench_hf"}, theirs) is None
    runs = [{"method": "ties", "merge": {"family": family}} for family in ("mine", "theirs")]
    first, second = map(group_of, runs)
    assert first != second and first.task != second.task


def test_a_collapse_is_told() -> None:
    even = {"marginals": [0.25] * 4}
    section = {"tasks": ["a", "b"], "merged": {"a": {"marginals": [0.9, 0.1, 0, 0]}, "b": even}}
    section["experts"] = {"a": even, "b": even}
    (note,) = merge_report.notes(section)
    assert note.startswith("a has collapsed: 90 %")
