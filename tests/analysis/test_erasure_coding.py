"""INLP: what is left is blind to the label. MCR²: values of a literal loop, and its inequality."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from subspace_lab.analysis.coding_rate import class_coding_rate, coding_rate, rate_reduction
from subspace_lab.analysis.erasure import inlp


def labelled(classes: int, seed: int = 0, rows: int = 1200, n: int = 12) -> tuple[Tensor, Tensor]:
    """Gaussian classes of unequal size whose means lie in a few turned directions of n."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes + 1, (rows,), generator=generator).clamp(max=classes - 1)
    centres = torch.randn(classes, n, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(rows, n, generator=generator, dtype=torch.float64), labels


@pytest.mark.parametrize("classifier", ["svm", "logistic"])
@pytest.mark.parametrize("classes", [2, 4])
def test_inlp_leaves_nothing_linear(classes: int, classifier: str) -> None:
    features, labels = labelled(classes)
    train, test = slice(0, 800), slice(800, None)
    found = inlp(features[train], labels[train], held_out=(features[test], labels[test]), classifier=classifier)  # type: ignore[arg-type]
    P, W = found.P, found.W
    identity = torch.eye(12, dtype=torch.float64)
    assert (P @ P - P).abs().max() < 1e-12 and torch.equal(P, P.T)
    assert (W @ P).abs().max() < 1e-6 * W.abs().max()
    assert round(P.trace().item()) == 12 - found.removed == torch.linalg.matrix_rank(P).item()
    # P = I − P_row(Σ P_row(W_i)), by pseudo-inverses, one classifier after the other.
    per = 1 if classes == 2 else classes
    total = sum((torch.linalg.pinv(w, rtol=1e-6) @ w for w in W.split(per)), torch.zeros(12, 12, dtype=torch.float64))
    literal = identity - torch.linalg.pinv(total, rtol=1e-6) @ total
    assert (P - literal).abs().max() < 1e-6
    majority = labels[test].bincount().max().item() / 400
    before = LogisticRegression().fit(features[train], labels[train]).score(features[test], labels[test])
    after = LogisticRegression().fit(features[train] @ P, labels[train]).score(features[test] @ P, labels[test])
    assert before > majority + 0.15
    assert after <= majority + 0.02
    assert len(W) == per * sum(accuracy >= majority + 0.01 for accuracy in found.accuracies)
    assert found.accuracies[-1] < majority + 0.01 or found.removed == 12
    assert found.removed < 12 or classes > 2, "two classes need few directions"


def test_inlp_keeps_what_has_nothing_to_do_with_the_label() -> None:
    """One direction carries the label, another one a second, independent label: only the first goes."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(2, (2, 2000), generator=generator)
    features = torch.randn(2000, 6, generator=generator, dtype=torch.float64)
    features[:, 0] += 4.0 * first
    features[:, 1] += 4.0 * second
    found = inlp(features[:1500], first[:1500], held_out=(features[1500:], first[1500:]))
    clean = features @ found.P
    score = LogisticRegression().fit(clean[:1500], second[:1500]).score(clean[1500:], second[1500:])
    assert score > 0.95
    assert found.P[0, 0] < 0.01


def test_inlp_on_digits_takes_parity_away() -> None:
    images, targets = load_digits(return_X_y=True)
    features, labels = torch.from_numpy(images / 16).float(), torch.from_numpy(targets % 2)
    features = features - features.mean(0)
    found = inlp(features[:1200], labels[:1200], held_out=(features[1200:], labels[1200:]), min_accuracy=0.55)
    assert found.accuracies[0] > 0.85 and found.accuracies[-1] < 0.55
    assert found.P.dtype == torch.float64
    clean = features.double() @ found.P
    assert LogisticRegression().fit(clean[:1200], labels[:1200]).score(clean[1200:], labels[1200:]) < 0.6


def test_inlp_ends() -> None:
    features, labels = labelled(2)
    nothing = inlp(features, labels, min_accuracy=1.01)
    assert torch.equal(nothing.P, torch.eye(12, dtype=torch.float64))
    assert nothing.W.shape == (0, 12) and nothing.removed == 0 and len(nothing.accuracies) == 1
    two = inlp(features, labels, iterations=2, min_accuracy=0.0)
    assert two.removed == 2 and len(two.accuracies) == 2
    everything = inlp(features, labels, min_accuracy=0.0)
    assert everything.removed == 12 == len(everything.accuracies)
    assert everything.P.abs().max() < 1e-12
    for bad in ((features, labels[:-1]), (features[0], labels)):
        with pytest.raises(ValueError, match="inlp got"):
            inlp(*bad)


def literal_rate(Z: Tensor, eps2: float) -> float:
    n, d = Z.shape
    total = np.zeros((d, d))
    for z in Z.double().numpy():
        total += np.outer(z, z)
    return 0.5 * sum(math.log(1 + d / (n * eps2) * x) for x in np.linalg.eigvalsh(total).clip(min=0))


def literal_class_rate(Z: Tensor, shares: Tensor, eps2: float) -> float:
    n, d = Z.shape
    found = 0.0
    for share in shares.double().T.tolist():
        trace = sum(share)
        if trace > 0:
            gram = sum(s * np.outer(z, z) for s, z in zip(share, Z.double().numpy(), strict=True))
            found += trace / (2 * n) * float(np.linalg.slogdet(np.eye(d) + d / (trace * eps2) * gram)[1])
    return found


@given(
    n=st.integers(2, 40),
    d=st.integers(1, 24),
    classes=st.integers(1, 6),
    eps2=st.sampled_from([0.01, 0.5, 2.0]),
    soft=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=60, deadline=None)
def test_coding_rates_are_their_sums_and_reduction_is_not_negative(
    n: int, d: int, classes: int, eps2: float, soft: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    Z = normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)
    labels = torch.randint(classes, (n,), generator=generator)  # with empty classes
    shares = torch.rand(n, classes, generator=generator, dtype=torch.float64)
    membership = shares / shares.sum(1, keepdim=True) if soft else labels
    expected = membership if soft else one_hot(labels)
    rate, within = coding_rate(Z, eps2=eps2), class_coding_rate(Z, membership, eps2=eps2)
    assert rate.item() == pytest.approx(literal_rate(Z, eps2), rel=1e-9, abs=1e-12)
    assert within.item() == pytest.approx(literal_class_rate(Z, expected, eps2), rel=1e-9, abs=1e-12)
    reduction = rate_reduction(Z, membership, eps2=eps2)
    assert reduction.item() == pytest.approx(rate.item() - within.item(), abs=1e-12)
    assert reduction.item() >= -1e-12
    single = rate_reduction(Z.float(), membership, eps2=eps2)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(reduction.item(), abs=1e-4)


def test_coding_rate_of_orthonormal_rows_and_batches() -> None:
    d = 8
    Z = torch.eye(d, dtype=torch.float64)
    assert coding_rate(Z).item() == pytest.approx(d / 2 * math.log(3))  # 1 + d / (d · 0.5)
    # Two orthogonal classes of one ray each: R = log 9, R_c = ½ log 17 for d = 8, ε² = ½.
    rays = Z[:2].repeat_interleave(5, dim=0)
    labels = torch.tensor([0] * 5 + [1] * 5)
    assert coding_rate(rays).item() == pytest.approx(math.log(1 + 8))
    assert class_coding_rate(rays, labels).item() == pytest.approx(0.5 * math.log(1 + 16))
    mixed = torch.tensor([0, 1] * 5)
    assert rate_reduction(rays, labels) > rate_reduction(rays, mixed) + 0.3
    batch = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(0))
    assert coding_rate(batch).shape == (2, 3)
    assert coding_rate(batch)[1, 2].item() == pytest.approx(coding_rate(batch[1, 2]).item(), rel=1e-6)
    with pytest.raises(ValueError, match="do not fit 10"):
        rate_reduction(rays, labels[:9])


def test_maximising_the_reduction_parts_the_classes() -> None:
    """Also that an empty class gives a finite gradient."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 1] * 20)
    raw = torch.randn(40, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    membership = one_hot(labels, 3).double()
    for _ in range(60):
        (slope,) = torch.autograd.grad(rate_reduction(normalize(raw, dim=-1), membership), raw)
        assert torch.isfinite(slope).all()
        raw.data += 10 * slope
    Z = normalize(raw, dim=-1).detach()
    between = (Z[labels == 0] @ Z[labels == 1].T).abs().mean()
    assert between < 0.05, "classes end in orthogonal subspaces"
    half = Z.to(torch.bfloat16)
    assert coding_rate(half).dtype == torch.float32
