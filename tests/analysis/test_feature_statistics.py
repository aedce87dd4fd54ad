"""Statistics of features against literal double loops over pairs in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from subspace_lab.analysis import features as analysis


def example(n: int = 7, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Features and labels: classes of 9, 1 (no pair), 14 and 2 examples, label 3 absent, in mixed order."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0] * 9 + [1] + [2] * 14 + [4] * 2)[torch.randperm(26, generator=generator)]
    centres = torch.randn(5, n, generator=generator, dtype=torch.float64)
    found = centres[labels] + torch.randn(26, n, generator=generator, dtype=torch.float64)
    return found.clamp(min=-0.5).to(dtype), labels


def cosine(x: Tensor, y: Tensor) -> float:
    return float(sum(a * b for a, b in zip(x.tolist(), y.tolist(), strict=True)) / (x.norm() * y.norm()))


def literal_angle(found: Tensor, labels: Tensor) -> float:
    means = []
    for label in sorted(set(labels.tolist())):
        rows = [x for x, own in zip(found, labels, strict=True) if own == label]
        angles = [
            math.degrees(math.acos(min(1.0, cosine(rows[i], rows[j]))))
            for i in range(len(rows))
            for j in range(len(rows))
            if i != j
        ]
        means += [sum(angles) / len(angles)] if angles else []
    return sum(means) / len(means)


def literal_separation(found: Tensor, labels: Tensor) -> float:
    """Kornblith et al. 2021: sums over all pairs, each pair of classes weighted by the product of their sizes."""
    classes = sorted(set(labels.tolist()))
    rows = {c: [x for x, own in zip(found, labels, strict=True) if own == c] for c in classes}
    within = sum(
        (1 - cosine(x, y)) / (len(classes) * len(rows[c]) ** 2) for c in classes for x in rows[c] for y in rows[c]
    )
    total = sum(
        (1 - cosine(x, y)) / (len(classes) ** 2 * len(rows[c]) * len(rows[d]))
        for c in classes
        for d in classes
        for x in rows[c]
        for y in rows[d]
    )
    return 1 - within / total


@pytest.mark.parametrize("block", [1, 5, 2048])
def test_angle_equals_a_loop_over_all_pairs(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found, labels = example()
    monkeypatch.setattr(analysis, "_BLOCK", block)
    assert analysis.intra_class_angle(found, labels) == pytest.approx(literal_angle(found, labels), abs=1e-9)
    values = torch.linalg.svdvals(found)
    assert torch.allclose(analysis.singular_values(found), values, rtol=1e-7, atol=1e-7)


def test_class_separation_equals_the_sums_of_the_paper() -> None:
    found, labels = example()
    ours = analysis.class_separation(found, labels)
    assert ours == pytest.approx(literal_separation(found, labels), abs=1e-12)
    twice = torch.cat([found, found[labels == 0]])  # a class counts the same, however large
    assert analysis.class_separation(twice, torch.cat([labels, labels[labels == 0]])) == pytest.approx(ours, abs=1e-12)


def test_angles_of_identical_opposite_and_orthogonal_features() -> None:
    labels = torch.tensor([0, 0, 1, 1])
    same = torch.tensor([[1.0, 2, 3], [1, 2, 3], [0, 0, 1], [0, 0, 5]])
    assert analysis.intra_class_angle(same, labels) == pytest.approx(0, abs=1e-5)
    assert analysis.class_separation(same, labels) == pytest.approx(1, abs=1e-12)
    assert analysis.intra_class_angle(torch.eye(4), labels) == pytest.approx(90)
    # Cosine distance 1 between any two, 0 to itself: 1/2 within, 3/4 overall.
    assert analysis.class_separation(torch.eye(4), labels) == pytest.approx(1 - 0.5 / 0.75)
    mixed = torch.tensor([[1.0, 0], [-1, 0], [1, 1], [1, 0]])
    assert analysis.intra_class_angle(mixed, labels) == pytest.approx((180 + 45) / 2)
    tiny = torch.tensor([[1.0, 0], [1, 1e-4], [1, 0], [1, 0]])
    assert analysis.intra_class_angle(tiny, labels) == pytest.approx(math.degrees(1e-4) / 2, rel=1e-4)


@pytest.mark.parametrize("name", ["intra_class_angle", "class_separation"])
def test_invariance_under_rotation_and_scaling(name: str) -> None:
    found, labels = example()
    figure: Any = getattr(analysis, name)
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    scales = torch.rand(len(found), 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) + 0.1
    assert figure(scales * found @ rotation, labels) == pytest.approx(figure(found, labels), abs=1e-9)
    order = torch.randperm(len(found), generator=torch.Generator().manual_seed(3))
    assert figure(found[order], labels[order]) == pytest.approx(figure(found, labels), abs=1e-9)
    shifted = figure(found + 3, labels)
    assert abs(shifted - figure(found, labels)) > 1e-3, "both depend on where the origin is"
    single = figure(found.float(), labels)
    assert single == pytest.approx(figure(found, labels), rel=1e-5)


def test_zero_features_have_no_direction() -> None:
    found, labels = example()
    padded, more = torch.cat([found, torch.zeros(2, 7).double()]), torch.cat([labels, torch.tensor([0, 6])])
    for name in ("intra_class_angle", "class_separation"):
        figure: Any = getattr(analysis, name)
        assert figure(padded, more) == pytest.approx(figure(found, labels), abs=1e-12)
        assert math.isnan(figure(torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])))
    assert math.isnan(analysis.intra_class_angle(torch.eye(3), torch.arange(3)))
    assert math.isnan(analysis.class_separation(torch.ones(4, 3), torch.tensor([0, 0, 1, 1])))


def test_ranks() -> None:
    rows = torch.linalg.qr(torch.randn(40, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    for orthonormal in (rows, rows.T, 3 * rows):
        assert analysis.rankme(orthonormal) == pytest.approx(6, abs=1e-4)
        assert analysis.stable_rank(orthonormal) == pytest.approx(6)
    values = torch.tensor([4.0, 2, 1, 1], dtype=torch.float64)
    found = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    p = values / 8
    assert analysis.rankme(found * values) == pytest.approx(math.exp(-(p * p.log()).sum()), abs=1e-4)
    assert analysis.stable_rank(found * values) == pytest.approx(22 / 16)
    one = torch.outer(torch.arange(1, 9.0), torch.arange(1, 5.0))
    assert analysis.rankme(one) == pytest.approx(1, abs=1e-3)


def test_sparsity_counts_exact_zeros_and_all_figures_come_together() -> None:
    found, labels = example(dtype=torch.float32)
    relu = found.clamp(min=0)
    share = sum(value == 0 for row in relu.tolist() for value in row) / relu.numel()
    assert analysis.sparsity(relu) == pytest.approx(share) and 0.1 < share < 0.9
    assert analysis.sparsity(found) == 0
    figures = analysis.statistics(relu, labels)
    assert list(figures) == ["intra_class_angle", "class_separation", "sparsity", "rankme", "stable_rank"]
    assert all(figures[name] == getattr(analysis, name)(relu) for name in ("sparsity", "rankme", "stable_rank"))
    assert figures["intra_class_angle"] == analysis.intra_class_angle(relu, labels)


@pytest.mark.cuda
def test_the_same_on_a_gpu() -> None:
    found, labels = example(dtype=torch.float32)
    here, there = analysis.statistics(found, labels), analysis.statistics(found.cuda(), labels.cuda())
    assert there == pytest.approx(here, rel=1e-9)
