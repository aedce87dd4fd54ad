from __future__ import annotations

from contracts.methods import MethodContract, Tower
from torch import nn

from subspace_lab.methods.base import Method
from subspace_lab.methods.full import Full
from subspace_lab.methods.galore import GaLore
from subspace_lab.methods.gcr import GCR, CosineSoftmax, Softmax
from subspace_lab.methods.intrinsic import IntrinsicDimension
from subspace_lab.methods.manifold import ManifoldMethod
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


class OtherHead(MethodContract):
    survives_bad_gradients = False  # subspaces do, the body's AdamW does not

    def plain(self) -> nn.Module:
        return self.build().prepare(Tower())


class TestGCR(OtherHead):
    def build(self) -> Method:
        return GCR(k=4)


class TestGCRRelease(OtherHead):
    def build(self) -> Method:
        return GCR(k=[1 + i % 3 for i in range(32)], variant="release")


class TestCosineSoftmax(OtherHead):
    def build(self) -> Method:
        return CosineSoftmax()


class TestSoftmax(MethodContract):
    survives_bad_gradients = False

    def build(self) -> Method:
        return Softmax()


class TestManifold(MethodContract):
    survives_bad_gradients = False

    def build(self) -> Method:
        return ManifoldMethod(stiefel=["mlp"], sphere=["attn"], grassmann=["lm_head"])
