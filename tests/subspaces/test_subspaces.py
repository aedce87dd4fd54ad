from __future__ import annotations

import pytest
import torch
from contracts.subspaces import SubspaceContract

from subspace_lab import linalg
from subspace_lab.manifolds import Grassmann
from subspace_lab.subspaces import SVD, Complement, Identity, Random, Randomized, Subspace, Tangent

CPU = torch.device("cpu")


class TestSVD(SubspaceContract):
    def build(self, rank: int) -> Subspace:
        return SVD(rank)


class TestGram(SubspaceContract):
    def build(self, rank: int) -> Subspace:
        return SVD(rank, solver="gram")


class TestNative(SubspaceContract):
    def build(self, rank: int) -> Subspace:
        return SVD(rank, native_orientation=True, align_signs=False)


class TestRandomized(SubspaceContract):
    def build(self, rank: int) -> Subspace:
        return Randomized(rank)


class TestRandom(SubspaceContract):
    follows_gradient = False

    def build(self, rank: int) -> Subspace:
        return Random(rank)


class TestIdentity(SubspaceContract):
    orthonormal = False

    def build(self, rank: int) -> Subspace:
        return Identity()


class TestComplement(SubspaceContract):
    orthonormal = False

    def build(self, rank: int) -> Subspace:
        return _Everywhere()


class _Everywhere(Complement):
    """Protects two random directions of every weight, whatever its size."""

    def setup(self, device: torch.device) -> None:
        q = self.shape[2]
        M = [
            torch.linalg.qr(torch.randn(q, 2, generator=torch.Generator().manual_seed(ord(n[-1]))))[0]
            for n in self.names
        ]
        self.protected = dict(zip(self.names, M, strict=True))
        super().setup(device)


class TestSVDInsideComplement(SubspaceContract):
    def build(self, rank: int) -> Subspace:
        return SVD(rank, within=_Everywhere())

    def test_basis_avoids_the_protected_space(self) -> None:
        sub = self.fresh((3, 20, 12), 4)
        assert isinstance(sub, SVD) and sub.within is not None
        sub.refresh(torch.randn(3, 20, 12))
        assert (sub.within.state["protected"].mT @ sub.basis).abs().max() < 1e-5
        # of rank 2: the remaining directions are a completion, and must avoid it as well
        sub.refresh(torch.randn(3, 20, 2) @ torch.randn(3, 2, 12))
        assert (sub.within.state["protected"].mT @ sub.basis).abs().max() < 1e-5


@pytest.mark.parametrize("make", [lambda: SVD(5), lambda: SVD(5, solver="gram")])
def test_svd_captures_the_most_energy(make) -> None:
    A = torch.randn(3, 30, 20) * torch.logspace(0, -2, 20)
    best = make().allocate((3, 30, 20), names="abc", device=CPU)
    best.refresh(A)
    s = torch.linalg.svdvals(A.double())
    optimum = (s[:, :5] ** 2).sum(1) / (s**2).sum(1)
    torch.testing.assert_close(linalg.captured_energy(A, best.basis).double(), optimum, atol=1e-6, rtol=0)


def test_randomized_is_close_and_warm_start_closer() -> None:
    A = torch.randn(2, 60, 40) * torch.logspace(0, -2, 40)
    sub = Randomized(8).allocate((2, 60, 40), names="ab", device=CPU)
    s = torch.linalg.svdvals(A)
    optimum = (s[:, :8] ** 2).sum(1) / (s**2).sum(1)
    sub.refresh(A)
    first = linalg.captured_energy(A, sub.basis) / optimum
    sub.refresh(A)
    second = linalg.captured_energy(A, sub.basis) / optimum
    assert (first > 0.99).all() and (second > 0.999).all() and (second >= first - 1e-6).all()


def test_randomized_mimics_the_order_of_an_svd() -> None:
    A = torch.randn(1, 60, 40) * torch.logspace(0, -3, 40)
    sub = Randomized(4, power_iterations=3).allocate((1, 60, 40), names="a", device=CPU)
    for _ in range(3):
        sub.refresh(A)
    V = torch.linalg.svd(A).Vh.mT[..., :4]
    assert (V.mT @ sub.basis).diagonal(dim1=1, dim2=2).abs().min() > 0.999


def test_random_does_not_depend_on_parameter_order_and_changes_with_the_seed() -> None:
    a = Random(3).allocate((2, 9, 8), names=["x", "y"], device=CPU)
    b = Random(3).allocate((2, 9, 8), names=["y", "x"], device=CPU)
    torch.testing.assert_close(a.basis, b.basis.flip(0), atol=0, rtol=0)
    c = Random(3, seed=1).allocate((2, 9, 8), names=["x", "y"], device=CPU)
    assert (a.basis - c.basis).abs().max() > 0.1
    old = a.basis.clone()
    a.refresh(torch.zeros(2, 9, 8))
    assert (a.basis - old).abs().max() > 0.1


def test_signs_are_aligned_across_refreshes() -> None:
    A = torch.randn(1, 30, 20)
    sub = SVD(6).allocate((1, 30, 20), names="a", device=CPU)
    sub.refresh(A)
    old = sub.basis.clone()
    sub.refresh(-A + 0.01 * torch.randn_like(A))
    assert (old * sub.basis).sum(dim=1).min() > 0


def test_rank_is_clamped_with_a_note_and_fractions_are_taken_of_the_side() -> None:
    with pytest.warns(UserWarning, match="rank 50 is more than the 8 directions of a: clamped to 8"):
        assert SVD(50).allocate((1, 9, 8), names="a", device=CPU).coordinates == (1, 9, 8)
    assert SVD(0.25).allocate((1, 9, 8), names="a", device=CPU).coordinates == (1, 9, 2)
    with pytest.raises(ValueError, match="rank must be positive"):
        SVD(0)


def test_more_directions_than_the_gradient_has() -> None:
    sub = SVD(6).allocate((2, 2, 8), names="ab", device=CPU)  # p < r
    A = torch.randn(2, 2, 8)
    sub.refresh(A)
    torch.testing.assert_close(sub.lift(sub.project(A)), A, atol=1e-5, rtol=1e-4)


def test_zero_first_gradient_is_not_ready_and_a_real_one_is() -> None:
    sub = SVD(2).allocate((2, 9, 8), names="ab", device=CPU)
    A = torch.randn(2, 9, 8)
    A[1] = 0
    sub.refresh(A)
    assert sub.ready().tolist() == [True, False]
    sub.refresh(torch.randn(1, 9, 8), [1])
    assert sub.ready().all()


def test_tangent_projects_horizontally_and_retracts_onto_the_manifold() -> None:
    S = torch.linalg.qr(torch.randn(2, 12, 3))[0]
    sub = Tangent(Grassmann()).allocate((2, 12, 3), names="ab", device=CPU)
    G = torch.randn(2, 12, 3)
    sub.refresh(G, weight=S)
    Z = sub.project(G)
    assert (S.mT @ Z).abs().max() < 1e-5
    new = sub.retract(S, -0.1 * sub.lift(Z))
    assert (new.mT @ new - torch.eye(3)).abs().max() < 2e-6


def test_complement_of_a_wrong_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"protected basis of 'a' has shape \(7, 2\), expected \(8"):
        Complement({"a": torch.zeros(7, 2)}).allocate((1, 9, 8), names="a", device=CPU)
