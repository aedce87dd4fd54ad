"""Partial eigenproblems against torch's full ones, also in several threads at once."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from subspace_lab.linalg import leading_eigh as module
from subspace_lab.linalg.leading_eigh import leading_eigh


def gram(s: Tensor, seed: int) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    g = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(len(s), len(s), generator=g, dtype=torch.float64)).Q
    return V * s @ V.mT


SPECTRA = {
    "decaying": torch.arange(1, 161).double().pow(-1.4),
    "flat": torch.ones(160).double(),
    "two levels": torch.cat([torch.full((25,), 4.0), torch.ones(135)]).double(),
    "low rank": torch.cat([torch.ones(5), torch.zeros(155)]).double(),
    "zero": torch.zeros(160).double(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_leading_eigenvectors(name: str, dtype: torch.dtype) -> None:
    G = torch.stack([3 * gram(SPECTRA[name], 0), gram(SPECTRA[name], 1)])
    given = G.to(dtype)
    before = given.clone()
    values, V = leading_eigh(given, 20)
    assert torch.equal(given, before)
    assert (values.shape, V.shape, V.dtype) == ((2, 20), (2, 160, 20), dtype)
    eps = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(values[0].double(), 3 * SPECTRA[name][:20], rtol=0, atol=eps)
    V = V.double()
    assert (V.mT @ V - torch.eye(20)).abs().max() < eps
    assert (G @ V - V * values[:, None].double()).abs().max() < eps


def test_the_partial_routine_is_used_and_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    G = gram(SPECTRA["decaying"], 0)
    assert module._syevr(torch.float64) is not None
    values, V = leading_eigh(G, 20)
    monkeypatch.setattr(module, "_syevr", lambda dtype: None)
    other, W = leading_eigh(G, 20)
    torch.testing.assert_close(values, other)
    torch.testing.assert_close((V * W).sum(dim=0).abs(), torch.ones(20).double())


def test_threads_do_not_disturb_each_other() -> None:
    matrices = [gram(SPECTRA["decaying"], seed) for seed in range(12)]
    alone = [leading_eigh(G, 20) for G in matrices]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda G: leading_eigh(G, 20), matrices))
    for (values, V), (others, W) in zip(alone, together, strict=True):
        assert torch.equal(values, others)
        assert torch.equal(V, W)
    assert module._inside == 0
