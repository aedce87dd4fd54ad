"""The linear probe of features, against scikit-learn called by hand; what the collector gives it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from subspace_lab.analysis import probe
from subspace_lab.analysis.collecting import Collector
from subspace_lab.data.splits import stratified


def digits() -> tuple[Any, Any, Any, Any]:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = pixels.astype(np.float32)
    return pixels[:1000], labels[:1000].astype(np.int64), pixels[1000:], labels[1000:].astype(np.int64)


def test_digits_as_by_hand() -> None:
    from sklearn.linear_model import LogisticRegression

    train, labels, test, test_labels = digits()
    found = probe.linear_probe(train, labels, test, test_labels, grid=(1e-3, 1e-1, 10.0))
    assert found.accuracy > 0.85 and found.converged
    assert (found.train_examples, found.test_examples) == (1000, 797)

    def by_hand(x: Any, y: Any, c: float) -> Any:
        mean, sd = x.mean(0), x.std(0)
        sd[sd == 0] = 1
        model = LogisticRegression(C=c, max_iter=1000).fit((x - mean) / sd, y)
        return lambda x, y: float((model.predict((x - mean) / sd) == y).mean())

    held_out = stratified(labels, 200, "probe")
    assert np.bincount(labels[held_out]).min() >= 19
    scores = [
        by_hand(train[~held_out], labels[~held_out], c)(train[held_out], labels[held_out]) for c in (1e-3, 0.1, 10)
    ]
    chosen = (1e-3, 0.1, 10)[int(np.argmax(scores))]
    assert found.c == chosen and found.held_out_accuracy == pytest.approx(max(scores), abs=0.006)
    assert found.accuracy == pytest.approx(by_hand(train, labels, chosen)(test, test_labels), abs=0.004)
    assert probe.linear_probe(train, labels, test, test_labels, grid=(1e-3, 1e-1, 10.0)) == found


def test_scale_of_a_feature_does_not_matter() -> None:
    train, labels, test, test_labels = digits()
    scales = np.logspace(-3, 3, 64).astype(np.float32)
    plain = probe.linear_probe(train, labels, test, test_labels, grid=(0.1,))
    scaled = probe.linear_probe(train * scales + 5, labels, test * scales + 5, test_labels, grid=(0.1,))
    assert scaled.accuracy == pytest.approx(plain.accuracy, abs=0.01)


def test_svm_and_what_has_not_converged(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels, test, test_labels = digits()
    svm = probe.linear_probe(train, labels, test, test_labels, classifier="svm", grid=(1e-3, 1e-2), name="x")
    assert svm.accuracy > 0.85 and svm.converged
    monkeypatch.setattr(probe, "MAX_ITERATIONS", 2)
    with pytest.warns(UserWarning, match="the probe stubborn has not converged in 2 iterations"):
        cut = probe.linear_probe(train, labels, test, test_labels, grid=(0.1,), name="stubborn")
    assert not cut.converged and np.isnan(cut.held_out_accuracy)


def test_one_class_and_few_examples() -> None:
    train, labels, test, test_labels = digits()
    alone = probe.linear_probe(train[labels == 3], labels[labels == 3], test, test_labels)
    assert alone.accuracy == pytest.approx((test_labels == 3).mean())
    few = probe.linear_probe(train[:4], labels[:4], test, test_labels)
    assert few.train_examples == 4 and few.c == probe.C_GRID[0]


class Images:
    """Twenty-three random images."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(23, 1, 3, 3, generator=generator)
        self.labels = torch.arange(23) % 4

    def __len__(self) -> int:
        return 23

    def batch(self, indices: Any) -> dict[str, torch.Tensor]:
        return {"inputs": self.images[indices], "labels": self.labels[indices]}


def test_features_are_what_the_head_gets() -> None:
    torch.manual_seed(0)
    trunk = nn.Sequential(nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
    model, images = nn.Sequential(trunk, nn.Linear(5, 4)).train(), Images()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with Collector(model, None, torch.device("cpu"), batch_size=8) as collector:
        found, labels = collector.features(images)
    assert model.training and trunk.training, "given back as it was"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()), "no statistics moved"
    expected = trunk.eval()(images.images)
    assert torch.allclose(found, expected, atol=1e-6) and torch.equal(labels, images.labels)
    assert found.dtype == torch.float32 and not found.requires_grad
    model(images.images)  # the hook is gone
    assert collector._seen is None


def test_low_precision_and_autocast() -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4)), Images()
    full = model[:3](images.images)
    with torch.autocast("cpu"), Collector(model, "3", torch.device("cpu"), batch_size=23) as collector:
        assert torch.allclose(collector.features(images)[0], full, atol=1e-6)
    model.bfloat16()
    with Collector(model, "3", torch.device("cpu"), batch_size=10) as collector:
        low = collector.features(images)[0]
    assert low.dtype == torch.float32 and torch.allclose(low, full, atol=0.05)


@pytest.mark.slow
def test_a_compiled_model_shows_its_features() -> None:
    torch.manual_seed(0)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(9, 6), nn.ReLU(), nn.Linear(6, 4)), Images()
    model.compile()
    with Collector(model, None, torch.device("cpu"), batch_size=10) as collector:
        assert torch.allclose(collector.features(images)[0], model[:3](images.images), atol=1e-6)
