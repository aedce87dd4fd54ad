"""What every subspace must do.  A new one inherits these tests by supplying `build`."""

from __future__ import annotations

import copy

import pytest
import torch

from subspace_lab.subspaces import Subspace

SHAPES = [(3, 20, 12), (2, 12, 12), (1, 9, 4), (4, 1, 7)]


class SubspaceContract:
    """Subclass, implement `build`, and set what does not apply to False."""

    orthonormal = True
    follows_gradient = True

    def build(self, rank: int) -> Subspace:
        raise NotImplementedError

    def fresh(self, shape: tuple[int, int, int], rank: int = 3) -> Subspace:
        names = [f"w{i}" for i in range(shape[0])]
        return self.build(rank).allocate(shape, names=names, device=torch.device("cpu"))

    @pytest.mark.parametrize("shape", SHAPES)
    def test_project_after_lift_is_the_identity_on_coordinates(self, shape: tuple[int, int, int]) -> None:
        sub = self.fresh(shape)
        A = torch.randn(shape)
        sub.refresh(A)
        Z = sub.project(A)
        assert Z.shape == sub.coordinates
        torch.testing.assert_close(sub.project(sub.lift(Z)), Z, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("shape", SHAPES)
    def test_lift_is_an_isometry_and_projection_never_lengthens(self, shape: tuple[int, int, int]) -> None:
        sub = self.fresh(shape)
        A = torch.randn(shape)
        sub.refresh(A)
        Z = sub.project(A)
        torch.testing.assert_close(sub.lift(Z).norm(), Z.norm(), atol=1e-5, rtol=1e-5)
        assert Z.norm() <= A.norm() * (1 + 1e-5)

    def test_orthonormal_basis_before_and_after_refreshes(self) -> None:
        if not self.orthonormal:
            return
        sub = self.fresh((3, 20, 12), 5)
        for _ in range(4):
            P = sub.state["basis"]
            assert (P.mT @ P - torch.eye(5)).abs().max() <= 1e-5
            sub.refresh(torch.randn(3, 20, 12))

    @pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
    def test_bad_gradient_leaves_its_own_directions_and_no_trace_elsewhere(self, bad: float) -> None:
        sub = self.fresh((3, 20, 12))
        good = torch.randn(3, 20, 12)
        sub.refresh(good)
        before = {k: v.clone() for k, v in sub.state.items()}
        broken = good.clone()
        broken[1] = bad
        sub.refresh(broken[[0, 1]], [0, 1])
        for v in sub.state.values():
            assert not v.is_floating_point() or torch.isfinite(v).all()
        if self.follows_gradient and "basis" in before:
            torch.testing.assert_close(sub.state["basis"][1], before["basis"][1], atol=0, rtol=0)

    def test_members_can_be_refreshed_alone(self) -> None:
        sub = self.fresh((4, 20, 12))
        A = torch.randn(4, 20, 12)
        sub.refresh(A)
        before = {k: v.clone() for k, v in sub.state.items()}
        B = torch.randn(4, 20, 12)
        sub.refresh(B[[1, 3]], [1, 3])
        for key, value in sub.state.items():
            torch.testing.assert_close(value[[0, 2]], before[key][[0, 2]], atol=0, rtol=0)

    def test_state_survives_a_round_trip_in_another_order(self) -> None:
        sub = self.fresh((3, 20, 12))
        A = torch.randn(3, 20, 12)
        for _ in range(2):
            sub.refresh(A)
        entries = [copy.deepcopy(sub.member_state(i)) for i in range(3)]
        other = self.build(3).allocate((3, 20, 12), names=["w2", "w0", "w1"], device=torch.device("cpu"))
        other.load_members([entries[2], entries[0], entries[1]])
        order = [2, 0, 1]
        torch.testing.assert_close(other.project(A[order]), sub.project(A)[order], atol=0, rtol=0)
        sub.refresh(A)
        other.refresh(A[order])
        torch.testing.assert_close(other.project(A[order]), sub.project(A)[order], atol=0, rtol=0)

    def test_wrong_rank_in_a_checkpoint_is_named(self) -> None:
        if not self.follows_gradient or not self.orthonormal:
            return
        entries = [self.fresh((2, 20, 12), 3).member_state(i) for i in range(2)]
        with pytest.raises(ValueError, match="another rank"):
            self.fresh((2, 20, 12), 4).load_members(entries)
