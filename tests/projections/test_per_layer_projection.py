"""A subspace for each layer."""

from __future__ import annotations

import pytest
import torch

from subspace_lab.errors import UserError
from subspace_lab.projections import KINDS, PerLayer, create


@pytest.mark.parametrize("kind", KINDS)
def test_columns_stay_in_their_layer_with_length_one(kind: str) -> None:
    sizes = (2000, 30, 700, 1)
    projection = PerLayer(sizes, 25, 40, seed=2, kind=kind)
    P = projection.matrix()
    lengths = torch.stack([block.norm(dim=0) for block in P.split(list(sizes))])
    assert ((lengths > 0).sum(dim=0) == 1).all()
    assert [int(i) for i in lengths.argmax(dim=0)] == projection.layers[:25]
    assert (lengths.amax(dim=0) - 1).abs().max() <= (0.1 if "food" in kind else 0.03)
    x, y = torch.randn(25, dtype=torch.float64), torch.randn(2731, dtype=torch.float64)
    torch.testing.assert_close(projection.lift(x), P @ x)
    torch.testing.assert_close(projection.lift_exact(x), P @ x)
    torch.testing.assert_close(projection.project(y), P.T @ y)
    assert torch.equal(projection.lift(x, rows=(1990, 2500)), projection.lift(x)[1990:2500])


def test_shares_follow_the_sizes_and_never_exceed_them() -> None:
    layers = PerLayer((8000, 1500, 500, 2), 100, seed=0).layers
    assert layers[:4] == [0, 1, 2, 3]
    assert [layers.count(i) for i in range(4)] == pytest.approx([79, 15, 5, 1], abs=1)
    full = PerLayer((20, 3, 1), 24, seed=0, kind="one_hot")
    assert [full.layers.count(i) for i in range(3)] == [20, 3, 1]
    y = torch.randn(24, dtype=torch.float64)
    torch.testing.assert_close(full.lift(full.project(y)), y)


def test_too_few_columns() -> None:
    with pytest.raises(UserError, match="at least the 3 layers, got 2"):
        PerLayer((10, 10, 10), 2, seed=0)
    with pytest.raises(UserError, match="without parameters"):
        PerLayer((10, 0), 2, seed=0)


def test_fingerprint_tells_layers_and_kinds_apart() -> None:
    made = [PerLayer(s, 4, seed=0, kind=k) for s in ((10, 20), (20, 10)) for k in ("orthoblock", "dense")]
    assert len({p.fingerprint() for p in made} | {create("orthoblock", D=30, d=4, seed=0).fingerprint()}) == 5
    assert PerLayer((10, 20), 3, 4, seed=0).fingerprint() == made[0].fingerprint()
