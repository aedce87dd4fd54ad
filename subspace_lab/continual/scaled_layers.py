"""Linear and convolution layers whose weight is scaled inside chosen subspaces of its input space.

    W_eff = W + Σ_k W S_k (Q_k − I) S_kᵀ

with S_k (d, r_k) orthonormal and Q_k (r_k, r_k) trainable, the identity at first (Lin, Yang, Fan & Zhang, "TRGP", ICLR
2022, eq. 5; Yang et al., "ROGO", 2023, eq. 6). d is in_features, or in·kh·kw of a convolution. A weight whose updates
avoid a span that contains all S_k keeps W S_k for ever, so Q_k can be stored and put back later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override


class Scaled:
    """Mixin of a layer with `weight`; without regions the layer is the plain one.

    Parameters of the plain layer keep their names; Q_k is ``scales.<k>``, S_k the buffer ``basis<k>``, which is not
    part of the layer's state (the method knows it).

    Attributes:
        dormant: all S are zero so far, and the forward pass leaves them out.
    """

    weight: Tensor
    scales: nn.ParameterList
    dormant: bool = False

    def regions(self) -> list[tuple[Tensor, nn.Parameter]]:
        """Pairs (S, Q)."""
        return [(getattr(self, f"basis{k}"), Q) for k, Q in enumerate(self.scales)]

    def set_regions(self, bases: Sequence[Tensor], scales: Sequence[Tensor] | None = None) -> None:
        """Scale inside the spans of `bases` and nowhere else.

        Args:
            bases: S_k (d, r_k); columns of zeros do nothing. Regions that are there already keep their Q.
            scales: Q_k (r_k, r_k); default: the identity.
        """
        assert isinstance(self, nn.Module) and isinstance(self, Scaled)
        now = self.regions()
        same = len(now) == len(bases) and all(
            S.shape == new.shape and torch.equal(S, new.to(S)) for (S, _), new in zip(now, bases, strict=True)
        )
        if same and scales is None:
            return
        for k in range(len(now)):
            delattr(self, f"basis{k}")
        W = self.weight
        values = [torch.eye(S.shape[1]) for S in bases] if scales is None else scales
        self.scales = nn.ParameterList(nn.Parameter(Q.to(W, copy=True)) for Q in values)
        for k, S in enumerate(bases):
            self.register_buffer(f"basis{k}", S.to(W, copy=True), persistent=False)

    @contextmanager
    def scaled_as(self, bases: Sequence[Tensor], scales: Sequence[Tensor]) -> Iterator[None]:
        """Other regions inside the context; afterwards those of before, the very same parameters."""
        assert isinstance(self, nn.Module) and isinstance(self, Scaled)
        own, dormant, self.scales, self.dormant = self.scales, self.dormant, nn.ParameterList(), False
        kept = {k: self._buffers.pop(k) for k in [k for k in self._buffers if k.startswith("basis")]}
        try:
            self.set_regions(bases, scales)
            yield
        finally:
            self.set_regions(())
            self.scales, self.dormant = own, dormant
            for k, S in kept.items():
                self.register_buffer(k, S, persistent=False)

    def effective_weight(self) -> Tensor:
        """W_eff in the shape of the weight."""
        W = self.weight.flatten(1)
        change = sum((W @ S @ _less_identity(Q) @ S.mT for S, Q in self.regions()), start=torch.zeros_like(W))
        return (W + change).view_as(self.weight)

    def fold(self) -> None:
        """W <- W_eff, and no regions any more: the outputs stay what they are."""
        with torch.no_grad():
            self.weight.copy_(self.effective_weight())
        self.set_regions(())


def _less_identity(Q: Tensor) -> Tensor:
    return Q - torch.eye(Q.shape[0], dtype=Q.dtype, device=Q.device)


class ScaledLinear(Scaled, nn.Linear):
    """A linear layer with scaled subspaces; input and output as `nn.Linear`."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Scale the inputs if they have fewer rows than the weight, else the weight."""
        if self.dormant or not len(self.scales):
            return F.linear(input, self.weight, self.bias)
        if input.numel() // input.shape[-1] > self.weight.shape[0]:
            return F.linear(input, self.effective_weight(), self.bias)
        scaled = [input @ S @ _less_identity(Q).mT @ S.mT for S, Q in self.regions()]
        return F.linear(torch.stack([input, *scaled]).sum(dim=0), self.weight, self.bias)


class ScaledConv2d(Scaled, nn.Conv2d):
    """A convolution with scaled subspaces of its patches; input and output as `nn.Conv2d`."""

    @override
    def forward(self, input: Tensor) -> Tensor:
        """Convolve with the scaled weight."""
        weight = self.weight if self.dormant or not len(self.scales) else self.effective_weight()
        y: Tensor = self._conv_forward(input, weight, self.bias)
        return y


SCALABLE: dict[type, type] = {nn.Linear: ScaledLinear, nn.Conv2d: ScaledConv2d}


def make_scalable(layer: nn.Module) -> None:
    """Turn a plain layer into a scalable one, in place: parameters, hooks and whoever refers to it stay.

    Raises:
        TypeError: neither `nn.Linear` nor `nn.Conv2d` itself.
    """
    if isinstance(layer, Scaled):
        return
    if type(layer) not in SCALABLE:
        raise TypeError(f"{type(layer).__name__} cannot be scaled: expected Linear or Conv2d")
    layer.__class__ = SCALABLE[type(layer)]
    layer.scales = nn.ParameterList()
