"""Iso-C, Iso-CTS, TSV-M, OPCM and KnOTS: equality with the papers' equations, and what must hold besides."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from contracts.merging import MergeContract
from reference import merging_spectral_literal as literal
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.linalg.thin_svd import thin_svd
from subspace_lab.merging import Merge, Stack, merge_state_dicts
from subspace_lab.merging.base import Kind
from subspace_lab.merging.iso import IsoC, IsoCTS
from subspace_lab.merging.knots import KnOTS, largest
from subspace_lab.merging.opcm import OPCM, directions
from subspace_lab.merging.tsv import TSVMerge


class TestIsoCContract(MergeContract):
    @override
    def build(self) -> Merge:
        return IsoC()


class TestIsoCTSContract(MergeContract):
    collinear = False

    @override
    def build(self) -> Merge:
        return IsoCTS(0.6)


class TestTSVContract(MergeContract):
    collinear = False

    @override
    def build(self) -> Merge:
        return TSVMerge()


class TestTSVGramContract(TestTSVContract):
    @override
    def build(self) -> Merge:
        return TSVMerge("gram")


class TestOPCMContract(MergeContract):
    ordered = True

    @override
    def build(self) -> Merge:
        return OPCM(order="given")


class TestKnOTSContract(MergeContract):
    collinear = False
    discontinuous = 0.05

    @override
    def build(self) -> Merge:
        return KnOTS()


class TestKnOTSSumContract(MergeContract):
    @override
    def build(self) -> Merge:
        return KnOTS("sum", scale=1.0)


class Deltas(Stack):
    """Task vectors with a base of zeros."""

    kind: Kind = "matrix"

    def __init__(self, D: Sequence[Tensor]) -> None:
        self._D = [X if X.dim() == 3 else X[None] for X in D]
        self.names = [f"w{i}" for i in range(len(self._D[0]))]
        self.models, self.shape = len(D), tuple(self._D[0].shape[1:])

    @override
    def base(self) -> Tensor:
        return torch.zeros_like(self._D[0])

    @override
    def tuned(self, t: int) -> Tensor:
        return self._D[t].clone()


def random_deltas(m: int, n: int, T: int, seed: int = 0, decay: float = 0.7) -> list[Tensor]:
    """T matrices with singular values 1, 2^−decay, 3^−decay, …, partly in common directions; float64."""
    g = torch.Generator().manual_seed(seed)
    r = min(m, n)

    def basis(rows: int) -> Tensor:
        return torch.linalg.qr(torch.randn(rows, r, generator=g, dtype=torch.float64)).Q

    s = torch.arange(1, r + 1, dtype=torch.float64).pow(-decay)
    shared = basis(m) * s @ basis(n).mT
    return [0.6 * shared + basis(m) * s @ basis(n).mT for _ in range(T)]


def merged(method: Merge, D: Sequence[Tensor]) -> Tensor:
    return method.update(Deltas(D))[0]


def error(a: Tensor, b: Any) -> float:
    b = torch.as_tensor(b, dtype=torch.float64)
    return float((a.double() - b).norm() / b.norm())


METHODS: dict[str, tuple[Callable[[], Merge], Callable[[list[Any]], Any]]] = {
    "iso_c": (IsoC, literal.iso_c),
    "iso_cts": (IsoCTS, lambda D: literal.iso_cts(D, 0.8)),
    "iso_cts_half": (lambda: IsoCTS(0.5), lambda D: literal.iso_cts(D, 0.5)),
    "iso_cts_tasks": (lambda: IsoCTS(0.0), lambda D: literal.iso_cts(D, 0.0)),
    "tsv_merge": (TSVMerge, literal.tsv_merge),
    "knots": (KnOTS, lambda D: literal.knots(D, 0.2)),
    "knots_sum": (lambda: KnOTS("sum"), lambda D: literal.knots(D, None)),
}


@pytest.mark.parametrize("shape", [(40, 40), (90, 40), (40, 90), (41, 32)], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_equals_the_papers_equations(name: str, shape: tuple[int, int]) -> None:
    build, equations = METHODS[name]
    D = random_deltas(*shape, T=4)
    expected = equations([X.numpy() for X in D])
    assert error(merged(build(), D), expected) < 1e-10
    # TIES may keep another of two nearly equal coordinates.
    assert error(merged(build(), [X.float() for X in D]), expected) < (2e-2 if name == "knots" else 2e-5)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("zero_diagonal", [True, False])
def test_opcm_equals_the_papers_recursion(alpha: float, zero_diagonal: bool) -> None:
    shapes = {"square.weight": (30, 30), "tall.weight": (70, 24), "wide.weight": (24, 70)}
    all_D: list[dict[str, Tensor]] = [{} for _ in range(5)]
    for i, (name, shape) in enumerate(shapes.items()):
        for found, X in zip(all_D, random_deltas(*shape, T=5, seed=i), strict=True):
            found[name] = (2.0**i) * X
    g = torch.Generator().manual_seed(9)
    for found in all_D:
        found["bias"] = torch.randn(30, generator=g, dtype=torch.float64)
        found["embeddings.class_embedding"] = torch.randn(1, 2, 8, generator=g, dtype=torch.float64)
    expected = literal.opcm([{n: X.numpy() for n, X in D.items()} for D in all_D], alpha, zero_diagonal)
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-4)):
        base = {n: torch.zeros_like(X, dtype=dtype) for n, X in all_D[0].items()}
        method = OPCM(alpha, zero_diagonal, "given")
        found = merge_state_dicts(method, base, [{n: X.to(dtype) for n, X in D.items()} for D in all_D])
        for name, X in expected.items():
            assert error(found[name], X) < tolerance, name
        lengths = [torch.cat([X.flatten() for X in D.values()]).norm().item() for D in all_D]
        total = torch.cat([X.flatten().double() for X in found.values()]).norm().item()
        assert total == pytest.approx(np.mean(lengths), rel=1e-6)
        assert method.metrics()["task_norm_2"] == pytest.approx(lengths[1], rel=1e-6)


def waves(m: int, n: int) -> list[Tensor]:
    """Three matrices that any program can write down: sin(i (j + 2)(t + 1) / 7 + i² j / 5) / (t + 1), i, j from 1."""
    i, j = (torch.arange(1, size + 1, dtype=torch.float64) for size in (m, n))
    i, j = i[:, None], j[None]
    return [torch.sin(i * (j + 2) * (t + 1) / 7 + i * i * j / 5) / (1 + t) for t in range(3)]


# fusion_bench 0.2.33 from PyPI, its own functions on `waves` in float64: ‖X‖, X[0, 0], X[1, 2], X[-1, -1]
FUSION_BENCH = {
    ("iso_c", 16, 16): (12.210584174, 0.898344533, -1.295249500, 0.665711679),
    ("iso_cts", 16, 16): (13.383996979, 0.456572515, -0.777210501, -0.415431401),
    ("tsv_merge", 16, 16): (10.777890445, -0.901150451, -0.579972104, -0.225576081),
    ("iso_c", 24, 10): (12.534092506, 1.396993654, -1.243062638, -0.469956757),
    ("iso_cts", 24, 10): (12.360346284, 0.936687764, 0.144997465, -0.202287304),
    ("tsv_merge", 24, 10): (9.169126657, 0.759875849, 0.073309223, 0.117079561),
    ("iso_c", 10, 24): (12.183841131, 1.349413407, -0.696364942, 1.466083871),
    ("iso_cts", 10, 24): (11.862809889, 1.622636715, -0.726350959, 1.975568472),
    ("tsv_merge", 10, 24): (8.703325911, 0.025322938, -0.442822525, 1.049119109),
}


# OPCMForCLIP of the same, on two linear layers without pretrained weights: ‖X‖, first and last entry
FUSION_BENCH_OPCM = {
    0.5: {
        "a.weight": (6.782713638, 0.740012832, -0.268735831),
        "a.bias": (2.242829995, 0.712588642, -0.083780903),
        "b.weight": (6.722234596, 0.720687533, 0.859599829),
        "b.bias": (1.198416429, 0.712588642, -0.297078379),
    },
    0.3: {
        "a.weight": (6.783721862, 0.727157361, -0.266649815),
        "a.bias": (2.238044979, 0.711068354, -0.083602159),
        "b.weight": (6.723267261, 0.708874245, 0.923514456),
        "b.bias": (1.195859641, 0.711068354, -0.296444571),
    },
}


@pytest.mark.parametrize(("name", "m", "n"), FUSION_BENCH)
def test_results_of_fusion_bench(name: str, m: int, n: int) -> None:
    method = {"iso_c": IsoC(), "iso_cts": IsoCTS(0.6), "tsv_merge": TSVMerge()}[name]
    X = merged(method, waves(m, n))
    found = (X.norm().item(), X[0, 0].item(), X[1, 2].item(), X[-1, -1].item())
    assert found == pytest.approx(FUSION_BENCH[name, m, n], abs=2e-9)


@pytest.mark.parametrize("alpha", FUSION_BENCH_OPCM)
def test_results_of_fusion_bench_opcm(alpha: float) -> None:
    A, B = waves(24, 10), waves(10, 24)
    models = [{"a.weight": A[t], "a.bias": A[t][:, 0], "b.weight": B[t], "b.bias": B[t][:, 0]} for t in range(3)]
    base = {name: torch.zeros_like(X) for name, X in models[0].items()}
    found = merge_state_dicts(OPCM(alpha, order="given"), base, models)
    for name, figures in FUSION_BENCH_OPCM[alpha].items():
        X = found[name].flatten()
        assert (X.norm().item(), X[0].item(), X[-1].item()) == pytest.approx(figures, abs=2e-9)


@pytest.mark.parametrize("shape", [(24, 24), (50, 24), (24, 50)], ids=str)
def test_iso_c_is_flat_keeps_the_nuclear_norm_and_turns_with_its_input(shape: tuple[int, int]) -> None:
    D = [X.float() for X in random_deltas(*shape, T=3)]
    U = merged(IsoC(), D)
    s = torch.linalg.svdvals(U.double())
    assert s[0] / s[-1] - 1 < 2e-6
    assert s.sum().item() == pytest.approx(torch.linalg.svdvals(sum(D).double()).sum().item(), rel=1e-6)  # type: ignore[union-attr]
    assert error(merged(IsoC(), [3 * X for X in D]), 3 * U.double()) < 2e-5
    g = torch.Generator().manual_seed(1)
    Q, R = (torch.linalg.qr(torch.randn(n, n, generator=g)).Q for n in shape)
    assert error(merged(IsoC(), [Q @ X @ R for X in D]), (Q @ U @ R).double()) < 2e-5


@pytest.mark.parametrize("shape", [(48, 48), (90, 48), (48, 90)], ids=str)
def test_iso_cts_is_flat_and_iso_c_without_task_directions(shape: tuple[int, int]) -> None:
    D = [X.float() for X in random_deltas(*shape, T=4)]
    s = torch.linalg.svdvals(merged(IsoCTS(0.8), D).double())
    assert s[0] / s[-1] - 1 < 5e-6
    assert error(merged(IsoCTS(1.0), D), merged(IsoC(), D).double()) < 3e-7
    assert IsoCTS(0.8).split(768, 8) == (616, 19)
    assert IsoCTS(0.0).split(5, 9) == (5, 0)  # fewer directions than tasks


def test_low_rank_updates_leave_null_directions_alone() -> None:
    """LoRA experts: the release fills the rest with vectors of LAPACK's choice."""
    g = torch.Generator().manual_seed(0)
    for shape in ((30, 30), (80, 30), (30, 80)):
        m, n = shape
        D = [torch.randn(m, 2, generator=g) @ torch.randn(2, n, generator=g) for _ in range(3)]
        total = sum(D)
        assert isinstance(total, Tensor)
        left, S, right = (x[..., :6] for x in thin_svd(total))
        expected = (left * (S.sum() / 30)) @ right.mT
        for method in (IsoC(), IsoCTS(0.8)):
            assert error(merged(method, D), expected.double()) < 1e-4
        for method in (TSVMerge(), TSVMerge("gram")):
            U = merged(method, D)
            assert torch.linalg.matrix_rank(U, rtol=1e-4) == 6
            assert (
                error(torch.linalg.svdvals(U)[:6], torch.cat([thin_svd(X, 2)[1] for X in D]).sort(descending=True)[0])
                < 1e-5
            )


def test_identical_tasks_are_scaled_up_and_a_single_one_is_itself() -> None:
    D = [X.float() for X in random_deltas(30, 50, T=1)]
    for method in (TSVMerge(), KnOTS("sum"), OPCM()):
        assert error(merged(method, D), D[0].double()) < 2e-6
    assert error(merged(IsoC(), 4 * D), 4 * merged(IsoC(), D).double()) < 2e-6
    base = {"a.weight": torch.zeros(30, 50), "b": torch.zeros(3)}
    tuned = {"a.weight": D[0], "b": torch.ones(3)}
    once = merge_state_dicts(OPCM(), base, [tuned])
    assert all(torch.equal(once[name], tuned[name]) for name in base)


@pytest.mark.parametrize("solver", ["exact", "gram"])
def test_tsv_of_orthogonal_tasks_is_their_sum(solver: Any) -> None:
    g = torch.Generator().manual_seed(0)
    U, V = (torch.linalg.qr(torch.randn(n, 32, generator=g)).Q for n in (64, 32))
    S = torch.linspace(2, 1, 32)
    D = [(U[:, i::4] * S[i::4]) @ V[:, i::4].mT for i in range(4)]
    total = sum(D)
    assert isinstance(total, Tensor)
    assert error(merged(TSVMerge(solver), D), total.double()) < 2e-6


@pytest.mark.parametrize("shape", [(128, 128), (256, 96)], ids=str)
def test_the_approximate_tsv_is_within_a_thousandth(shape: tuple[int, int]) -> None:
    for decay in (0.3, 0.7):
        D = [X.float() for X in random_deltas(*shape, T=8, decay=decay)]
        assert error(merged(TSVMerge("gram"), D), merged(TSVMerge("exact"), D).double()) < 1e-3


def test_tsv_of_more_tasks_than_directions_is_not_zero() -> None:
    D = [X.float() for X in random_deltas(4, 9, T=6)]
    s = torch.linalg.svdvals(merged(TSVMerge(), D))
    assert 0.1 < s[0] < 10


def test_opcm_adds_nothing_along_what_is_there() -> None:
    for shape in ((40, 40), (90, 40), (40, 90)):
        N, D = (X.float()[None] for X in random_deltas(*shape, T=2))
        known = directions(N)
        C = OPCM().outside(N, D.clone(), known)
        assert abs(float((C * N).double().sum() / C.norm() / N.norm())) < 2e-7
        assert (
            1e-4
            < abs(float((OPCM(zero_diagonal=False).outside(N, D.clone(), known) * N).sum() / C.norm() / N.norm()))
            < 0.3
        )
        lengths = [float(OPCM(alpha).outside(N, D.clone(), known).norm()) for alpha in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)]
        assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(lengths))
        assert lengths[-1] < 0.98 * lengths[-2]  # α = 1 is the strongest
        assert torch.equal(OPCM().outside(0 * N, D.clone(), directions(0 * N)), D)  # a layer that was frozen until now


def test_opcm_order() -> None:
    assert OPCM(order="given").turns(5) == [0, 1, 2, 3, 4]
    first = OPCM(seed=1).turns(8)
    assert sorted(first) == list(range(8))
    assert first == OPCM(seed=1).turns(8) != OPCM(seed=2).turns(8)
    D = [X.float() for X in random_deltas(20, 30, T=3)]
    method = OPCM(seed=1)
    order = method.turns(3)
    assert order != [0, 1, 2]
    assert torch.equal(merged(method, D), merged(OPCM(order="given"), [D[t] for t in order]))


def test_knots_of_tasks_that_share_no_direction_is_their_sum() -> None:
    """Every coordinate belongs to one task, so that no sign is disputed and nothing is averaged."""
    g = torch.Generator().manual_seed(0)
    D = [torch.zeros(6, 40) for _ in range(3)]
    for t in range(3):
        D[t][2 * t : 2 * t + 2] = (3 + t) * torch.linalg.qr(torch.randn(40, 2, generator=g)).Q.mT
    assert error(merged(KnOTS(density=1.0), D), sum(D).double()) < 2e-6  # type: ignore[union-attr]


def test_density_counts_the_directions_that_there_are() -> None:
    """Rank-2 updates of 30 rows: a fifth of 6 · 50 coordinates, not a fifth of 30 · 50, which would be all."""
    g = torch.Generator().manual_seed(0)
    D = [torch.randn(30, 2, generator=g) @ torch.randn(2, 50, generator=g) for _ in range(3)]
    expected = literal.knots([X.double().numpy() for X in D], 0.2)
    assert error(merged(KnOTS(), D), expected) < 1e-3
    assert error(merged(KnOTS(density=1.0), D), expected) > 0.1


def test_largest_entries() -> None:
    Z = torch.randn(3, 7, 11, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float64):
        found = largest(Z.to(dtype), torch.tensor([1, 20, 77]))
        assert (found != 0).sum(dim=(1, 2)).tolist() == [1, 20, 77]
        assert found[1].abs()[found[1] != 0].min() > Z[1].abs()[found[1] == 0].max()
    assert torch.equal(largest(torch.zeros(1, 2, 2), torch.tensor([2])), torch.zeros(1, 2, 2))


@pytest.mark.parametrize("build", [lambda: OPCM(1.5), lambda: IsoCTS(-0.1), lambda: KnOTS(density=0.0)])
def test_options_out_of_range(build: Callable[[], Merge]) -> None:
    with pytest.raises(UserError, match=r"^method\.\w+ must be"):
        build()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_iso_c_on_cuda_is_matrix_products_and_never_synchronises() -> None:
    D = [torch.stack([X.float(), 2 * X.float()]) for X in random_deltas(60, 40, T=3)]
    stack, method = Deltas([X.cuda() for X in D]), IsoC()
    method.update(stack)  # libraries may synchronise when they load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        U = method.update(stack)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert error(U.cpu(), method.update(Deltas(D)).double()) < 1e-5
