"""Grassmann class representation: every class is a subspace of the feature space, trained on the Grassmannian.

Wang, Li & Zhang, "Get the Best of Both Worlds: Improving Accuracy and Transferability by Grassmann Class
Representation", ICCV 2023; released code innerlee/GCR.

==========  ==============================================================================================
symbol      here
==========  ==============================================================================================
S_i, k      `GrassmannHead.basis(i)` (n, k), orthonormal basis of class i; ``method.k``, one for all or one for each
γ           ``method.gamma``
l_i         γ ‖S_iᵀ x / ‖x‖‖, logits for the ordinary softmax cross entropy; x the features before the head
D, m, η     gradient, momentum and learning rate of `optim.riemannian.RiemannianSGD`; ``method.head_lr``
==========  ==============================================================================================

``softmax`` and ``cosine_softmax`` are the heads it is compared with. The published table compares a linear head under
binary cross entropy with GCR under softmax in some rows; `cosine_softmax` separates what the loss does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.manifolds.base import Retraction
from subspace_lab.methods.base import Method
from subspace_lab.methods.manifold import ManifoldMethod
from subspace_lab.models.heads import CosineHead, GrassmannHead, find_head, replace_head
from subspace_lab.optim.riemannian import Momentum


class GCR(ManifoldMethod):
    """Class subspaces in place of a classifier's last layer.

    Args:
        k: dimension of every class's subspace, or one number for each class.
        gamma: the largest logit γ.
        update: geodesic (the paper), polar or qr: how a step returns to the manifold; all three agree to third order.
        variant: paper: tangent gradient into tangent momentum, both carried along; release: what innerlee/GCR does:
            ambient momentum, projected when used, and a plain QR decomposition every 5 steps (every step where the
            body's optimizer is not SGD), whose signs may flip.
        momentum: transported or ambient; null follows the variant.
        head_lr: learning rate of the subspaces; null is the body's with SGD, 0.1 with any other optimizer (as published
            for Swin-T; the LAMB recipes take 0.3).
        head: path of the layer to replace; null finds the classifier.
        grassmann, stiefel, sphere: further weights on manifolds, see `ManifoldMethod`.
    """

    name: ClassVar[str] = "gcr"

    def __init__(
        self,
        k: int | Sequence[int] = 8,
        gamma: float = 25.0,
        update: Retraction = "geodesic",
        variant: Literal["paper", "release"] = "paper",
        momentum: Momentum | None = None,
        head_lr: float | None = None,
        head: str | None = None,
        grassmann: Sequence[str] = (),
        stiefel: Sequence[str] = (),
        sphere: Sequence[str] = (),
    ) -> None:
        if head_lr is not None and head_lr < 0:
            raise UserError(f"method.head_lr={head_lr}: expected 0 or a positive number")
        default: Momentum = "ambient" if variant == "release" else "transported"
        super().__init__(grassmann, stiefel, sphere, update, momentum if momentum is not None else default, head_lr)
        self.k, self.gamma, self.variant, self.head = k, gamma, variant, head
        self._shape: dict[str, Tensor | float] = {}

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        """Put class subspaces, drawn uniformly, in the place of the last layer.

        Raises:
            UserError: no such layer, more dimensions than features, a list of k not as long as the classes are many.
        """
        path, features, classes = _linear(model, self.head)
        dims = [self.k] * classes if isinstance(self.k, int) else list(self.k)
        if len(dims) != classes:
            raise UserError(
                f"method.k lists {len(dims)} dimensions and the model has {classes} classes",
                hint="one number for all classes, or one for each",
            )
        model = replace_head(model, path, GrassmannHead(features, dims, self.gamma))
        self._shape = {"k": sum(dims) / len(dims), "n": float(features)}
        return super().prepare(model)

    @override
    def _reorthonormalize_every(self, body: Optimizer) -> int:
        if self.variant == "paper":
            return 0
        return 5 if isinstance(body, SGD) else 1

    @override
    def metrics(self) -> dict[str, Tensor | float]:
        """Return k (the mean over classes), n and the largest |SᵀS − I|."""
        return self._shape | super().metrics()


class Softmax(Method):
    """The model's own linear head: what the other heads are compared with.

    Args:
        head: path of the last layer; null finds it.
    """

    name: ClassVar[str] = "softmax"

    def __init__(self, head: str | None = None) -> None:
        self.head = head

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        """Return the model as it is; raises UserError where it has no linear head."""
        _linear(model, self.head)
        return model


class CosineSoftmax(Method):
    """Logits γ cos(w_i, x): the normalisation and the scale of GCR without its subspaces.

    Args:
        gamma: γ.
        head: path of the last layer; null finds it.
    """

    name: ClassVar[str] = "cosine_softmax"

    def __init__(self, gamma: float = 25.0, head: str | None = None) -> None:
        self.gamma, self.head = gamma, head

    @override
    def prepare(self, model: nn.Module) -> nn.Module:
        """Put normalised weights in the place of the last layer."""
        path, features, classes = _linear(model, self.head)
        return replace_head(model, path, CosineHead(features, classes, self.gamma))


def _linear(model: nn.Module, path: str | None) -> tuple[str, int, int]:
    """Path, n and C of a classifier's last linear layer."""
    path, layer = find_head(model, path)
    if not isinstance(layer, nn.Linear):
        raise UserError(f"the head {path} of this model is a {type(layer).__name__} already")
    return path, layer.in_features, layer.out_features
