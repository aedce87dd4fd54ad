from __future__ import annotations

from contracts.methods import MethodContract

from subspace_lab.methods.base import Method
from subspace_lab.methods.full import Full
from subspace_lab.methods.galore import GaLore
from subspace_lab.methods.intrinsic import IntrinsicDimension
from subspace_lab.subspaces import SVD, Random, Randomized


class TestFull(MethodContract):
    survives_bad_gradients = False  # torch's AdamW does not

    def build(self) -> Method:
        return Full()


class TestGaLore(MethodContract):
    def build(self) -> Method:
        return GaLore(SVD(6), rank=6, refresh_every=5)


class TestGaLoreRelease(MethodContract):
    def build(self) -> Method:
        return GaLore(SVD(6), rank=6, refresh_every=5, variant="release")


class TestGaLoreRandomizedStaggeredRotating(MethodContract):
    def build(self) -> Method:
        return GaLore(Randomized(6), rank=6, refresh_every=5, stagger=True, moments="rotate")


class TestGaLoreRandomResetting(MethodContract):
    def build(self) -> Method:
        return GaLore(Random(6), rank=6, refresh_every=5, moments="reset")


class TestIntrinsicDimension(MethodContract):
    survives_bad_gradients = False  # the weights have no gradients of their own

    def build(self) -> Method:
        return IntrinsicDimension(d=1000)


class TestStructureAwareIntrinsicDimension(MethodContract):
    survives_bad_gradients = False

    def build(self) -> Method:
        return IntrinsicDimension(d=1000, variant="said", projection="fastfood")


class TestPerLayerIntrinsicDimension(MethodContract):
    survives_bad_gradients = False

    def build(self) -> Method:
        return IntrinsicDimension(d=1000, scope="per_layer")
