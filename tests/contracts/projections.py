"""What every projection must do.  A new one inherits these tests by supplying `build`.

The measures at the top are also turned on deliberately broken projections (test_broken_projections.py).
"""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from subspace_lab.errors import UserError
from subspace_lab.projections import Projection, apply

SIZES = [(777, 24, 40), (1000, 300, 300), (4096, 64, 64), (64, 64, 64), (2500, 1, 3), (5, 1, 2), (1, 1, 1)]
Linear = Callable[[Tensor], Tensor]


def adjoint_error(lift: Linear, project: Linear, D: int, d: int, dtype: torch.dtype) -> float:
    """Largest |⟨Px, y⟩ - ⟨x, Pᵀy⟩| / ‖Px‖‖y‖ over a few pairs."""
    worst = 0.0
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x, y = (torch.randn(size, generator=generator, dtype=dtype) for size in (d, D))
        image = lift(x)
        difference = image.double() @ y.double() - x.double() @ project(y).double()
        worst = max(worst, float(difference.abs() / (image.double().norm() * y.double().norm())))
    return worst


def column_error(P: Tensor) -> float:
    """Largest | ‖column‖ - 1 |."""
    return float((P.norm(dim=0) - 1).abs().max())


def energy_ratios(P: Tensor, tensors: Sequence[int]) -> Tensor:
    """Mean energy of the rows of each tensor, relative to the mean over all rows."""
    energy = P.square().sum(dim=1)
    return torch.stack([part.mean() for part in energy.split(list(tensors))]) / energy.mean()


def isometry_error(lift: Linear, d: int, samples: int = 48) -> float:
    """| E ‖Px‖ / ‖x‖ - 1 | over Gaussian x."""
    x = torch.randn(samples, d, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return abs(sum(float(lift(row).norm() / row.norm()) for row in x) / samples - 1)


def gradient_error(lift: Linear, D: int, d: int, tensors: Sequence[int]) -> float:
    """Relative error of autograd against central differences, of a loss in which tensors of all sizes matter alike."""
    assert sum(tensors) == D
    target = torch.randn(D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(z: Tensor) -> Tensor:
        parts = zip(lift(z).split(list(tensors)), target.split(list(tensors)), strict=True)
        return torch.stack([torch.tanh(a + b).mean() * len(a) ** 0.5 for a, b in parts]).sum()

    z = torch.randn(d, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(z), z)
    steps = 1e-5 * torch.eye(d, dtype=torch.float64)
    with torch.no_grad():
        numeric = torch.stack([(loss(z + step) - loss(z - step)) / 2e-5 for step in steps])
    return float((gradient - numeric).norm() / numeric.norm())


def digest(P: Tensor) -> str:
    return hashlib.sha256(P.contiguous().numpy().tobytes()).hexdigest()


class ProjectionContract:
    """Subclass, implement `build`, and say what holds for the family."""

    column_tolerance = 1e-6
    row_spread = 2.0
    """Variance of one squared entry over its squared mean: what mean row energies may scatter by."""
    always_the_same_bits = False
    """Whether `lift`, not only `lift_exact`, gives the same bits for any number of threads."""

    def build(self, D: int, d: int, *, seed: int = 0, d_max: int | None = None) -> Projection:
        raise NotImplementedError

    @pytest.mark.parametrize(("D", "d", "d_max"), SIZES)
    def test_products_are_those_of_the_matrix(self, D: int, d: int, d_max: int) -> None:
        projection = self.build(D, d, d_max=d_max)
        P = projection.matrix()
        assert P.shape == (D, d)  # exactly D rows are used
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
            x, y, base = torch.randn(d, dtype=dtype), torch.randn(D, dtype=dtype), torch.randn(D, dtype=dtype)
            lifted = base.double() + P @ x.double()
            assert (projection.lift(x, base=base) - lifted).norm() <= tolerance * lifted.norm()
            assert (projection.lift_exact(x, base=base) - lifted).norm() <= tolerance * lifted.norm()
            projected = projection.project(y)
            assert projected.dtype == dtype
            assert (projected - P.T @ y.double()).norm() <= tolerance * y.norm()

    @pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
    def test_project_is_the_adjoint(self, dtype: torch.dtype, bound: float) -> None:
        projection = self.build(17_610, 200)
        assert adjoint_error(projection.lift, projection.project, 17_610, 200, dtype) <= bound

    def test_columns_have_length_one_and_lengths_are_kept(self) -> None:
        projection = self.build(17_610, 50)
        assert column_error(projection.matrix()) <= self.column_tolerance
        assert isometry_error(projection.lift, 50) <= 3 / (2 * 17_610) ** 0.5

    def test_no_tensor_is_favoured(self) -> None:
        tensors = (8000, 600, 100, 32, 4)
        P = self.build(sum(tensors), 48).matrix()
        scatter = torch.tensor([(self.row_spread / (48 * rows)) ** 0.5 for rows in tensors])
        assert ((energy_ratios(P, tensors) - 1).abs() <= 5 * scatter + 1e-6).all()

    @pytest.mark.parametrize(("D", "d", "d_max"), [(777, 24, 40), (4096, 64, 65), (50, 7, 50)])
    def test_nested(self, D: int, d: int, d_max: int) -> None:
        small, large = self.build(D, d, d_max=d_max), self.build(D, d_max)
        assert torch.equal(small.matrix(), large.matrix()[:, :d])
        assert small.fingerprint() == large.fingerprint()
        x = torch.randn(d)
        padded = torch.nn.functional.pad(x, (0, d_max - d))
        assert torch.equal(small.lift_exact(x), large.lift_exact(padded))

    def test_rows_alone_have_the_bits_of_the_whole(self) -> None:
        D, d = 3001, 70
        projection = self.build(D, d)
        P = projection.matrix()
        for dtype in (torch.float32, torch.float64):
            x, y, base = torch.randn(d, dtype=dtype), torch.randn(D, dtype=dtype), torch.randn(D, dtype=dtype)
            total = torch.zeros(d, dtype=dtype)
            whole, exact = projection.lift(x, base=base), projection.lift_exact(x, base=base)
            for start, stop in ((0, 1), (1, 130), (130, 1999), (1999, 1999), (1999, 3001)):
                rows = (start, stop)
                fresh = self.build(D, d)
                assert torch.equal(fresh.matrix(rows), P[start:stop])
                assert torch.equal(fresh.lift(x, base=base[start:stop], rows=rows), whole[start:stop])
                assert torch.equal(fresh.lift_exact(x, base=base[start:stop], rows=rows), exact[start:stop])
                total += fresh.project(y[start:stop], rows=rows)
            torch.testing.assert_close(total, projection.project(y), rtol=1e-4, atol=1e-5)

    def test_one_or_two_threads(self) -> None:
        D, d = 70_000, 20
        x, y = torch.randn(d), torch.randn(D)
        before = torch.get_num_threads()
        results = []
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                projection = self.build(D, d)
                P = self.build(3000, d).matrix()
                results.append((P, projection.lift_exact(x), projection.lift(x)))
                assert torch.equal(projection.project(y), projection.project(y))
        finally:
            torch.set_num_threads(before)
        (P1, exact1, fast1), (P2, exact2, fast2) = results
        assert torch.equal(P1, P2) and torch.equal(exact1, exact2)
        torch.testing.assert_close(fast1, fast2)
        if self.always_the_same_bits:
            assert torch.equal(fast1, fast2) and torch.equal(fast1, exact1)

    def test_seed_decides(self) -> None:
        assert digest(self.build(300, 20, seed=1).matrix()) == digest(self.build(300, 20, seed=1).matrix())
        assert digest(self.build(300, 20, seed=1).matrix()) != digest(self.build(300, 20, seed=2).matrix())
        prints = {self.build(300, 20, seed=s, d_max=m).fingerprint() for s in (1, 2) for m in (20, 30)}
        assert len(prints) == 4 and all(len(p) == 64 for p in prints)

    def test_autograd(self) -> None:
        tensors = (300, 40, 3)
        projection = self.build(343, 9)
        assert gradient_error(lambda z: apply(projection, z), 343, 9, tensors) <= 1e-7
        projection = self.build(50, 9)
        z, base = (torch.randn(n, dtype=torch.float64).requires_grad_() for n in (9, 50))
        assert torch.autograd.gradcheck(lambda z, base: apply(projection, z, base), (z, base))
        assert torch.autograd.gradcheck(lambda z: apply(projection, z, rows=(20, 31)), (z,))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_short_types_are_computed_in_float32(self, dtype: torch.dtype) -> None:
        projection = self.build(500, 20)
        x, y, base = (torch.randn(n).to(dtype) for n in (20, 500, 500))
        assert torch.equal(projection.lift(x, base=base), projection.lift(x.float(), base=base.float()).to(dtype))
        assert torch.equal(projection.project(y), projection.project(y.float()).to(dtype))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(projection.lift(x.float()), projection.lift(x.float()))
            assert projection.project(y.float()).dtype == torch.float32

    def test_outputs_are_written_where_asked(self) -> None:
        projection = self.build(500, 20)
        x, y, base = torch.randn(20), torch.randn(500), torch.randn(500)
        expected = projection.lift(x, base=base)
        out, strided = torch.empty(500), torch.empty(500, 2)[:, 0]
        assert projection.lift(x, base=base, out=out) is out and torch.equal(out, expected)
        assert projection.lift(x, base=base, out=strided) is strided and torch.equal(strided, expected)
        assert torch.equal(projection.lift(x), projection.lift(x, base=torch.zeros(500)))
        projection.lift(x, base=base, out=base)
        assert torch.equal(base, expected)
        g = torch.empty(20)
        assert projection.project(y, out=g) is g and torch.equal(g, projection.project(y))

    def test_every_coordinate_moves_something(self) -> None:
        assert bool((self.build(3000, 40, d_max=60).matrix() != 0).any(dim=0).all())

    def test_what_is_not_finite_shows(self) -> None:
        projection = self.build(400, 8)
        for bad in (float("nan"), float("inf")):
            x, y = torch.randn(8), torch.randn(400)
            x[3] = bad
            y[:] = bad
            for result in (projection.lift(x), projection.lift_exact(x), projection.project(y)):
                assert not torch.isfinite(result).all()
        assert torch.equal(projection.lift_exact(torch.zeros(8)), torch.zeros(400))

    def test_tiny_and_huge_coordinates(self) -> None:
        projection = self.build(400, 8)
        x = torch.randn(8)
        exact = projection.lift_exact(x)
        for scale in (2.0**-100, 2.0**90):
            assert torch.equal(projection.lift_exact(x * scale), exact * scale)

    def test_copies_are_equal_and_do_not_carry_the_cache(self) -> None:
        projection = self.build(400, 8)
        x = torch.randn(8)
        expected = projection.lift(x)
        for twin in (copy.deepcopy(projection), pickle.loads(pickle.dumps(projection))):
            assert twin.state_bytes() == 0
            assert torch.equal(twin.lift(x), expected)

    def test_wrong_shapes_and_sizes(self) -> None:
        projection = self.build(400, 8)
        for call in (
            lambda: projection.lift(torch.zeros(9)),
            lambda: projection.lift(torch.zeros(8, dtype=torch.int64)),
            lambda: projection.lift(torch.zeros(8), base=torch.zeros(399)),
            lambda: projection.lift(torch.zeros(8), base=torch.zeros(400, dtype=torch.float64)),
            lambda: projection.lift(torch.zeros(8), rows=(3, 401)),
            lambda: projection.project(torch.zeros(8)),
            lambda: projection.project(torch.zeros(400), out=torch.zeros(9)),
        ):
            with pytest.raises(ValueError):
                call()
        for D, d, d_max in ((400, 0, 8), (400, 9, 8), (7, 8, 8)):
            with pytest.raises(UserError, match="1 <= d <= d_max <= D"):
                self.build(D, d, d_max=d_max)

    @pytest.mark.cuda
    def test_the_same_bits_on_the_gpu(self) -> None:
        D, d = 40_000, 75
        projection = self.build(D, d)
        x, y, base = torch.randn(d), torch.randn(D), torch.randn(D)
        assert torch.equal(projection.matrix((0, 3000), device="cuda").cpu(), projection.matrix((0, 3000)))
        for dtype in (torch.float32, torch.float64):
            here = projection.lift_exact(x.to(dtype), base=base.to(dtype))
            there = projection.lift_exact(x.to("cuda", dtype), base=base.to("cuda", dtype))
            assert torch.equal(here, there.cpu())
        if self.always_the_same_bits:
            assert torch.equal(projection.lift(x), projection.lift(x.cuda()).cpu())
        once, again = projection.project(y.cuda()), projection.project(y.cuda())
        assert torch.equal(once, again)
        torch.testing.assert_close(once.cpu(), projection.project(y), rtol=1e-4, atol=1e-4)


COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "all_to_all_single"),
    *(
        "barrier",
        "batch_isend_irecv",
        "broadcast",
        "broadcast_object_list",
        "gather",
        "gather_object",
        "irecv",
        "isend",
    ),
    *("recv", "reduce", "reduce_scatter", "reduce_scatter_tensor", "scatter", "scatter_object_list", "send"),
)


def sharded_rank(rank: int, world: int, store: str, folder: str, names: Sequence[str]) -> None:
    """One process of the test of shared rows (spawned, hence importable): writes what it made and what it sent."""
    import torch.distributed as dist

    from subspace_lab.projections import create
    from subspace_lab.projections.distributed import shard, sharded_lift, sharded_project

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    traffic: list[tuple[str, int]] = []

    def counted(name: str, collective: Callable[..., object]) -> Callable[..., object]:
        def call(tensor: Tensor, *args: object, **kwargs: object) -> object:
            traffic.append((name, tensor.numel() * tensor.element_size()))
            return collective(tensor, *args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, counted(name, getattr(dist, name)))
    report: dict[str, object] = {}
    generator = torch.Generator().manual_seed(0)
    D, d = 3001, 60
    x, y, base = (torch.randn(n, generator=generator) for n in (d, D, D))
    rows = shard(D, rank, world)
    for name in names:
        projection = create(name, D=D, d=d, seed=4)
        traffic.clear()
        lifted = sharded_lift(projection, x, rows, base=base[slice(*rows)])
        gradient = sharded_project(projection, y[slice(*rows)], rows)
        report[name] = (projection.matrix(rows), lifted, gradient, list(traffic))
    torch.save(report, f"{folder}/{rank}.pt")
    dist.destroy_process_group()
