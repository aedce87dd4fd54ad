"""Energy rules, frequent directions and the memory that bases grow in, against full SVDs in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from subspace_lab.continual.memory import BasisMemory
from subspace_lab.continual.thresholds import Thresholds
from subspace_lab.errors import UserError
from subspace_lab.linalg.energy import energy_directions, row_directions
from subspace_lab.linalg.frequent_directions import FrequentDirections
from subspace_lab.linalg.removal import Removal, complement_basis


def inputs(n: int = 80, d: int = 30, seed: int = 0) -> Tensor:
    """Rows (n, d) of decaying singular values."""
    generator = torch.Generator().manual_seed(seed)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))[0]
    return X * torch.arange(1, d + 1).double() ** -0.7 @ turn


def basis(d: int, k: int, seed: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(d, k, generator=generator))[0]


def captured(X: Tensor, M: Tensor) -> float:
    return ((X @ M.double()).square().sum() / X.square().sum()).item()


@pytest.mark.parametrize("exact", [1024, 0])
@pytest.mark.parametrize("threshold", [0.5, 0.9, 0.99])
def test_first_rule_stays_below_and_the_next_direction_would_reach(threshold: float, exact: int) -> None:
    X = inputs(400, 200)
    U = energy_directions(X.T @ X, None, threshold, exact=exact)
    s = torch.linalg.svdvals(X).square()
    k = int((s.cumsum(0) / s.sum() < threshold).sum())
    assert captured(X, U) < threshold
    assert k <= U.shape[1] <= k + 1
    assert (U.T @ U - torch.eye(U.shape[1])).abs().max() < 1e-6


@pytest.mark.parametrize("exact", [1024, 0])
@pytest.mark.parametrize("threshold", [0.6, 0.9, 0.99])
def test_later_rule_reaches_with_the_fewest(threshold: float, exact: int) -> None:
    X, M = inputs(400, 200), basis(200, 15)
    U = energy_directions(X.T @ X, M, threshold, exact=exact)
    assert captured(X, torch.cat([M, U], 1)) >= threshold
    assert captured(X, torch.cat([M, U[:, :-1]], 1)) < threshold
    residual = torch.linalg.svdvals(X - X @ M.double() @ M.T.double()).square()
    start = captured(X, M)
    fewest = int((start + (residual.cumsum(0) - residual) / X.square().sum() < threshold).sum())
    assert fewest <= U.shape[1] <= fewest + 1
    assert (M.T @ U).abs().max() < 1e-6


def test_rules_at_their_ends() -> None:
    X = inputs()
    G = X.T @ X
    assert energy_directions(G, None, 0.0).shape == (30, 0)
    assert energy_directions(G, torch.zeros(30, 0), 0.0).shape == (30, 0)
    assert energy_directions(G, torch.zeros(30, 0), 1.0).shape == (30, 30)
    assert energy_directions(G, basis(30, 30), 1.0).shape == (30, 0)
    assert energy_directions(torch.zeros(30, 30), None, 0.9).shape == (30, 0)
    assert energy_directions(torch.zeros(30, 30), basis(30, 3), 0.9).shape == (30, 0)
    line = torch.ones(1, 30, dtype=torch.float64)
    assert energy_directions(line.T @ line, torch.zeros(30, 0), 1.0).shape == (30, 1)  # no direction without energy
    full = energy_directions(G, basis(30, 28), 1.0)
    assert full.shape == (30, 2) and (basis(30, 28).T @ full).abs().max() < 1e-6
    with pytest.raises(ValueError, match="threshold"):
        energy_directions(G, None, 1.5)


@pytest.mark.parametrize("old", [None, 6])
def test_rows_give_the_same_directions_as_their_gram_matrix(old: int | None) -> None:
    X = inputs(25, 60)
    M = None if old is None else basis(60, old)
    U, V = energy_directions(X.T @ X, M, 0.9), row_directions(X, M, 0.9)
    torch.testing.assert_close(U @ U.T, V @ V.T, atol=1e-5, rtol=0)


def test_ten_appends_stay_orthonormal() -> None:
    memory = BasisMemory()
    for i in range(10):
        X = inputs(300, 96, seed=i)
        memory.extend("layer", energy_directions(X.T @ X, memory.get("layer"), 0.8 + 0.018 * i))
    M = memory["layer"]
    assert M.shape[1] > 40 and M.dtype == torch.float32
    assert (M.T @ M - torch.eye(M.shape[1])).abs().max() < 1e-6
    memory.extend("layer", torch.randn(96, 96))
    assert memory.ranks() == {"layer": 96} and memory.bytes() == 96 * 96 * 4
    assert (memory["layer"].T @ memory["layer"] - torch.eye(96)).abs().max() < 1e-6
    again = BasisMemory()
    again.load_state_dict(memory.state_dict())
    assert torch.equal(again["layer"], memory["layer"])


@pytest.mark.parametrize("k", [0, 5, 29, 30])
def test_removal_takes_the_cheaper_way_to_the_same_place(k: int) -> None:
    torch.manual_seed(k)
    M, A = basis(30, k) if k else torch.zeros(30, 0), torch.randn(4, 30)
    R = Removal.of(M)
    assert R.factors.shape[1] <= 15 and R.onto is (k > 15)
    torch.testing.assert_close(R(A), A - A @ M @ M.T, atol=5e-6, rtol=0)
    N = complement_basis(M)
    assert N.shape == (30, 30 - k) and (N.T @ N - torch.eye(30 - k)).abs().sum() < 1e-4
    weights = torch.rand(k)
    torch.testing.assert_close(Removal.of(M, weights)(A), A - A @ (M * weights) @ M.T, atol=5e-6, rtol=0)


def test_full_precision_inside_autocast() -> None:
    M, A = basis(64, 20), torch.randn(8, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rest = Removal.of(M)(A)
    assert (rest @ M).norm() < 1e-5 * rest.norm()


# -- frequent directions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shrink", ["plain", "double"])
def test_sketch_is_below_and_within_its_bound(shrink: str) -> None:
    sketch = FrequentDirections(12, shrink)  # type: ignore[arg-type]
    parts = torch.stack([inputs(300, 40), inputs(300, 40, seed=1)]).split(50, dim=1)
    cut = torch.zeros(2, dtype=torch.float64)
    for part in parts:
        sketch.update(part)
        cut += torch.linalg.svdvals(part)[:, 12].square()
    A = torch.cat(parts, 1)
    assert sketch.sketch is not None and sketch.sketch.shape == (2, 12, 40)
    gap = torch.linalg.eigvalsh(A.mT @ A - sketch.sketch.mT @ sketch.sketch)
    s = torch.linalg.svdvals(A).square()
    tails = torch.stack([s[:, k:].sum(1) / (12 - k) for k in range(12)]).amin(0)
    bound = tails + cut if shrink == "double" else tails
    assert (gap.amin(1) >= -1e-9 * s[:, 0]).all()
    assert (gap.amax(1) <= bound).all() and (gap.amax(1) <= sketch.lost * (1 + 1e-9)).all()
    assert (gap.amax(1) > 1e-3 * bound).all()  # something was lost: the bound is no empty promise
    torch.testing.assert_close(sketch.total, A.square().sum((1, 2)))
    V, _ = sketch.basis
    top = torch.linalg.svd(A, full_matrices=False).Vh[:, :2].mT
    assert torch.linalg.svdvals(V[:, :, :2].mT @ top).amin() > 0.99


def test_short_streams_lose_nothing_and_sketches_continue() -> None:
    X = inputs(10, 40)
    sketch = FrequentDirections(12)
    sketch.update(X)
    assert sketch.sketch is not None
    torch.testing.assert_close(sketch.sketch[0].T @ sketch.sketch[0], X.T @ X)
    assert sketch.lost.item() == 0
    again = FrequentDirections(12)
    again.load_state_dict(sketch.state_dict())
    for s in (sketch, again):
        s.update(inputs(90, 40, seed=3))
    assert again.sketch is not None and torch.equal(sketch.sketch, again.sketch)
    assert sketch.lost.item() > 0


def test_directions_of_a_sketch_hold_the_energy_asked_for() -> None:
    X = inputs(600, 120)
    sketch = FrequentDirections(60)
    for part in X.split(70):
        sketch.update(part)
    assert sketch.sketch is not None
    U = row_directions(sketch.sketch[0], torch.zeros(120, 0), 0.8, total=float(sketch.total))
    exact = energy_directions(X.T @ X, torch.zeros(120, 0), 0.8)
    assert captured(X, U) >= 0.8 and exact.shape[1] <= U.shape[1] <= 60


# -- thresholds ------------------------------------------------------------------------------------------------------


def test_thresholds_by_layer_and_task() -> None:
    one = Thresholds(0.97)
    assert one.at("features.0", 7) == 0.97
    rising = Thresholds([0.97, 0.003])
    assert rising.at("a", 0) == 0.97 and rising.at("a", 9) == pytest.approx(0.997) and rising.at("a", 99) == 1.0
    table = Thresholds({r"^1$": 0.95, r"conv": [0.9, 0.01], ".": 0.99})
    assert [table.at(p, 2) for p in ("1", "conv1", "5")] == [0.95, pytest.approx(0.92), 0.99]
    with pytest.raises(UserError, match=r"says nothing of layer fc"):
        Thresholds({"conv": 0.9}).at("fc", 0)
    for bad in (1.5, -0.1, [0.9, 0.1, 0.2], [], {"(": 0.9}, ["a"]):
        with pytest.raises(UserError, match=r"method\.threshold"):
            Thresholds(bad)  # type: ignore[arg-type]
