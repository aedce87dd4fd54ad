"""Each family: the contract, its own exact properties, and its bytes."""

from __future__ import annotations

import pytest
import torch
from contracts.projections import ProjectionContract, column_error, digest

from subspace_lab.errors import UserError
from subspace_lab.projections import KINDS, PerLayer, Projection, base, create
from subspace_lab.projections.butterfly import hadamard

GOLDEN = {
    "orthoblock": "641a534bac4a3826396460a2f23e4072090a14007bd9eb4dc11ead642a679552",
    "fastfood": "f47de03e7441bd351c12a2c523e15f7f373a565752230c9fb96a017916b3f541",
    "fastfood_blocked": "5a967f191554b060c188b20f2f6c3ff426bffe405f92235ef1eb1e4d27c7be57",
    "dense": "8bb77a012029cf04fbe1d1d06b542dd1cc3dff153d170049f5f9c2c09fdf34dd",
    "gaussian": "b2b5d36250a8505072eb30fa3886605c15f1e3077b1b37b2c7fb2e9234f982e7",
    "sparse": "ca9034b68c4d759c9880bde3484a52cced62fe496a6d8a3a1e00ce98e9ad23a6",
    "one_hot": "53e7a5963cf884d7c723342615a142e608ebde0c91d61ccaed2a09d27a9c76bb",
    "kronecker": "f8a3723c3310c33d2d9d6a737e7e3090f95a639770218896f5a2e6e0f2408096",
}


class _Named(ProjectionContract):
    name: str

    def build(self, D: int, d: int, *, seed: int = 0, d_max: int | None = None) -> Projection:
        return create(self.name, D=D, d=d, seed=seed, d_max=d_max)


class TestOrthoblock(_Named):
    name = "orthoblock"
    column_tolerance = 0.01
    always_the_same_bits = True

    def test_singular_values_are_close_to_one(self) -> None:
        P = self.build(17_610, 200).matrix()  # 68 whole blocks of 256 and one of 202
        values = torch.linalg.eigvalsh(P.T @ P).sqrt()
        assert values.min() >= 0.99 and values.max() <= 1.01

    @pytest.mark.parametrize(("D", "d"), [(4096, 100), (64, 64), (4000, 25)])
    def test_whole_blocks_are_orthogonal(self, D: int, d: int) -> None:
        P = self.build(D, d).matrix()[: D // 32 * 32]
        scale = len(P) / D
        assert (P.T @ P - scale * torch.eye(d, dtype=torch.float64)).abs().max() <= 1e-12


class TestFastfood(_Named):
    name = "fastfood"
    column_tolerance = 0.01
    always_the_same_bits = True
    row_spread = 4.0


class TestFastfoodBlocked(TestFastfood):
    name = "fastfood_blocked"


class TestDense(_Named):
    name = "dense"


class TestGaussian(_Named):
    name = "gaussian"


class TestSparse(_Named):
    name = "sparse"
    row_spread = 2 * 17_610**0.5

    def test_density_is_global_and_cells_are_distinct(self) -> None:
        P = self.build(17_610, 50).matrix()
        assert ((P != 0).sum(dim=0) == 133).all()  # round(sqrt(17610)) in every column
        assert ((P[-10:] != 0).double().mean()) < 0.1  # not 1 / sqrt(10) in a bias of ten
        assert P.abs().unique().numel() == 2

    def test_every_row_can_be_hit(self) -> None:
        assert bool((self.build(101, 90).matrix() != 0).any(dim=1).all())


class TestOneHot(_Named):
    name = "one_hot"
    always_the_same_bits = True
    row_spread = 1.0

    def test_exactly_isometric_and_balanced(self) -> None:
        P = self.build(17_611, 200).matrix()
        assert (P.T @ P - torch.eye(200, dtype=torch.float64)).abs().max() <= 1e-12
        assert ((P != 0).sum(dim=1) == 1).all()
        assert set((P != 0).sum(dim=0).tolist()) == {88, 89}

    def test_rows_of_later_columns_do_not_move(self) -> None:
        moving = (self.build(1000, 25, d_max=100).matrix() != 0).any(dim=1)
        assert int(moving.sum()) == 250


class TestKronecker(_Named):
    name = "kronecker"

    def test_columns_are_nearly_orthogonal(self) -> None:
        P = self.build(17_610, 200).matrix()
        assert (P.T @ P - torch.eye(200, dtype=torch.float64)).abs().max() <= 6 * (
            (1 - 17_610 / 32_768) / 17_610
        ) ** 0.5


class TestPerLayer(ProjectionContract):
    column_tolerance = 0.02
    always_the_same_bits = True

    def build(self, D: int, d: int, *, seed: int = 0, d_max: int | None = None) -> Projection:
        sizes = [D] if d < 4 or D < 8 else [D - D // 4 - 3, D // 4 + 1, 2]
        return PerLayer(sizes, d, d_max, seed=seed)

    def test_no_tensor_is_favoured(self) -> None:
        pytest.skip("a layer's share of the columns is rounded to whole ones: see test_per_layer_projection.py")


@pytest.mark.parametrize("name", KINDS)
def test_bytes_are_frozen(name: str) -> None:
    """A change here silently changes every solution ever saved as (name, seed, z): it needs a new version."""
    whole = create(name, D=1000, d=12, d_max=20, seed=7).matrix()
    parts = [create(name, D=1000, d=12, d_max=20, seed=7).matrix(rows) for rows in ((0, 37), (37, 900), (900, 1000))]
    assert digest(whole) == digest(torch.cat(parts)) == GOLDEN[name]


@pytest.mark.parametrize(("name", "D"), [("orthoblock", 128), ("one_hot", 100), ("kronecker", 128), ("kronecker", 256)])
def test_as_many_columns_as_rows_reproduce_the_full_space(name: str, D: int) -> None:
    """d = D and P orthogonal: gradient steps on z are gradient steps on θ."""
    projection = create(name, D=D, d=D, seed=3)
    y = torch.randn(D, dtype=torch.float64)
    torch.testing.assert_close(projection.lift(projection.project(y)), y, rtol=0, atol=1e-12)
    theta, z = y.clone(), torch.zeros(D, dtype=torch.float64)
    for _ in range(5):
        theta -= 0.1 * torch.sin(theta)
        z -= 0.1 * projection.project(torch.sin(projection.lift(z, base=y)))
    torch.testing.assert_close(projection.lift(z, base=y), theta, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["orthoblock", "one_hot"])
def test_lift_after_project_is_a_projector(name: str) -> None:
    projection = create(name, D=4096, d=200, seed=3)
    once = projection.lift(projection.project(torch.randn(4096, dtype=torch.float64)))
    torch.testing.assert_close(projection.lift(projection.project(once)), once, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", KINDS)
def test_small_chunks_and_no_cache_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    D, d = 3000, 40
    x, y = torch.randn(d), torch.randn(D)
    expected = create(name, D=D, d=d, seed=1)
    P, lifted, projected = expected.matrix(), expected.lift_exact(x), expected.project(y)
    for module in ("base", "blocked", "dense", "sparse", "one_hot", "kronecker"):
        monkeypatch.setattr(f"subspace_lab.projections.{module}.chunk_size", lambda device: 160)
    small = create(name, D=D, d=d, seed=1)
    small._cache = base.Cache(limit=0)
    assert torch.equal(small.matrix(), P) and torch.equal(small.lift_exact(x), lifted)
    torch.testing.assert_close(small.lift(x), lifted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(small.project(y), projected, rtol=1e-4, atol=1e-5)
    assert small.state_bytes() == 0


@pytest.mark.parametrize("name", KINDS)
def test_little_is_kept(name: str) -> None:
    projection = create(name, D=100_000, d=64, seed=0)
    projection.project(projection.lift(torch.randn(64)))
    bytes_per_row = projection.state_bytes() / 100_000
    allowed = {"dense": 4 * 64, "gaussian": 4 * 64 + 1, "sparse": 5 * 64 / 100_000**0.5 + 1, "fastfood": 6 * 1.32}
    assert bytes_per_row <= allowed.get(name, 7)


def test_large_dense_matrices_are_not_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subspace_lab.projections.seam.call", lambda *args, **kwargs: False)
    stored, x = create("dense", D=3000, d=40, seed=1), torch.randn(40)
    assert stored.lift(x).shape == (3000,) and stored.state_bytes() == 4 * 40 * 3000
    monkeypatch.setattr("subspace_lab.projections.dense.STORED_BYTES", 1000)
    made_again = create("dense", D=3000, d=40, seed=1)
    assert torch.equal(made_again.lift(x), stored.lift(x)) and made_again.state_bytes() == 0


def test_blocks_keep_each_columns_share_of_energy() -> None:
    P = create("fastfood_blocked", D=4096, d=64, seed=0).matrix()
    assert column_error(P) <= 1e-12
    shares = P.square().view(64, 64, 64).sum(dim=1)
    torch.testing.assert_close(shares, torch.full_like(shares, 1 / 64))


def test_unknown_names_and_impossible_sizes() -> None:
    with pytest.raises(UserError, match=r"unknown projection 'fastfod'.*did you mean 'fastfood'"):
        create("fastfod", D=10, d=2, seed=0)
    with pytest.raises(UserError, match=r"at most 2\^31"):
        create("fastfood", D=2**31 + 1, d=2, seed=0)


@pytest.mark.parametrize("name", ["fastfood", "fastfood_blocked", "orthoblock"])
def test_a_compiled_transform_gives_the_same_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other layout of the work, with a stand-in for the kernel."""

    def kernel(name: str, x: torch.Tensor, *args: object, **kwargs: object) -> bool:
        if name == "fwht_":
            x.copy_(hadamard(x.T.contiguous()).T)
        return name == "fwht_"

    x, y, z0 = torch.randn(20), torch.randn(501), torch.randn(501)
    plain = create(name, D=501, d=20, seed=0)
    lifted, projected = plain.lift(x, base=z0), plain.project(y)
    monkeypatch.setattr("subspace_lab.projections.seam.transforms", lambda *_: True)
    monkeypatch.setattr("subspace_lab.projections.seam.call", kernel)
    fast = create(name, D=501, d=20, seed=0)
    assert torch.equal(fast.lift(x, base=z0), lifted)
    assert torch.equal(fast.lift(x, base=z0[100:400], rows=(100, 400)), lifted[100:400])
    torch.testing.assert_close(fast.project(y), projected)


def test_without_compiled_kernels_the_same_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that declines is a kernel that is not there."""
    asked = []

    def decline(name: str, *args: object, **kwargs: object) -> bool:
        asked.append(name)
        return False

    x = torch.randn(20)
    expected = {name: create(name, D=500, d=20, seed=0).lift(x) for name in ("orthoblock", "dense")}
    monkeypatch.setattr("subspace_lab.projections.seam.transforms", lambda *_: False)
    monkeypatch.setattr("subspace_lab.projections.seam.call", decline)
    for name, lifted in expected.items():
        torch.testing.assert_close(create(name, D=500, d=20, seed=0).lift(x), lifted)
    assert asked == ["orthoblock_lift", "sign_lift"]
