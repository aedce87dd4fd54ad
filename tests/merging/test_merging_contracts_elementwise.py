"""Average, task arithmetic, TIES, DARE and SLERP keep the rules of every merge."""

from __future__ import annotations

from contracts.merging import MergeContract
from typing_extensions import override

from subspace_lab.merging import Merge
from subspace_lab.merging.averaging import SimpleAverage, TaskArithmetic
from subspace_lab.merging.dare import DARE
from subspace_lab.merging.slerp import SLERP
from subspace_lab.merging.ties import TIES


class TestSimpleAverage(MergeContract):
    @override
    def build(self) -> Merge:
        return SimpleAverage()


class TestTaskArithmetic(MergeContract):
    @override
    def build(self) -> Merge:
        return TaskArithmetic(0.4)


class TestTies(MergeContract):
    discontinuous = 0.02  # a sum of opposite signs near 0 elects either by rounding

    @override
    def build(self) -> Merge:
        return TIES(density=0.4)


class TestTiesByTensorSummed(MergeContract):
    discontinuous = 0.02

    @override
    def build(self) -> Merge:
        return TIES(0.5, density=0.4, trim="tensor", combine="sum")


class TestDare(MergeContract):
    ordered = True  # which entries are dropped depends on the model's number
    collinear = False

    @override
    def build(self) -> Merge:
        return DARE(p=0.3)


class TestDareRescaledByLength(MergeContract):
    ordered = True
    collinear = False

    @override
    def build(self) -> Merge:
        return DARE(p=0.3, rescale="l1")


class TestSlerp(MergeContract):
    ordered = True

    @override
    def build(self) -> Merge:
        return SLERP(0.3)
