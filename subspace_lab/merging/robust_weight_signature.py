"""Robust weight signatures: what makes a network robust to a corruption, as a patch of its weights.

Cai, Zhang & Wang, ICML 2023, arXiv 2302.12480; released code VITA-Group/Robust_Weight_Signatures.  W_pre was fine-tuned
on clean data (W_clean) and on corrupted data (W_robust); tensor by tensor, as vectors,

    d = W_robust − W_pre,     a = W_clean − W_pre,     RWS = d − (⟨d, a⟩ / ⟨a, a⟩) a        so that ⟨RWS, a⟩ = 0
    patched = W_clean + Σ_i α_i RWS_i

for the first few layers, which is where clean and robust networks differ; batch normalisation and the shortcuts of
residual networks are the mean of the robust networks' (here W_clean + (1/n) Σ_i min(α_i, 1) (W_i − W_clean), which is
that mean for α = 1 and the clean network for α = 0), everything else is the clean network's.

The release multiplies by α before the projection and again in the sum, and divides α by the number n of corruptions:
``variant: release`` patches with Σ (α/n)² RWS_i, so that half a strength is a quarter of a patch, and takes the robust
networks' mean of normalisation whatever α.  It re-estimates a ResNet's batch statistics from corrupted training data;
here they are the networks' own.

A signature may be stored with 2^bits values: ``linear`` between its extremes, ``tanh`` the same of tanh RWS, ``log`` a
sign and 2^(bits − 1) values of log₂ |RWS|; zeros stay zeros in ``log``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging.architectures import layer_groups
from subspace_lab.merging.base import Merge, Stack
from subspace_lab.merging.sources import Sources, TensorInfo

Action = Literal["patch", "extract", "apply", "remove"]
Scheme = Literal["linear", "log", "tanh"]
Role = Literal["signature", "normalisation", "kept"]

_SHORTCUT = re.compile(r"(^|\.)(downsample|shortcut)\.")


def signature(d: Tensor, a: Tensor) -> Tensor:
    """RWS = d − (⟨d, a⟩ / ⟨a, a⟩) a of b tensors; d itself where a is 0.

    Args:
        d: W_robust − W_pre (b, …).
        a: W_clean − W_pre (b, …).
    """
    flat_d, flat_a = _rows(d), _rows(a)
    squared = (flat_a * flat_a).sum(1)
    share = (flat_d * flat_a).sum(1) / squared.where(squared > 0, 1)
    return d - (share[:, None] * flat_a).view_as(d)


def quantise(W: Tensor, bits: int, scheme: Scheme) -> Tensor:
    """W (b, …) with at most 2^bits values in each of the b tensors."""
    flat = _rows(W)
    if flat.shape[1] == 0:
        return W
    if scheme == "linear":
        return _levels(flat, 2**bits).view_as(W)
    if scheme == "tanh":
        below = 1 - torch.finfo(W.dtype).eps  # atanh 1 is infinite
        return _levels(flat.tanh().clamp(-below, below), 2**bits).clamp(-below, below).atanh().view_as(W)
    zero = flat == 0
    # Zeros have no logarithm: the smallest of the others stands for them until they are put back.
    smallest = flat.abs().where(~zero, torch.inf).amin(1, keepdim=True).nan_to_num(1, posinf=1)
    magnitude = _levels(flat.abs().where(~zero, smallest).log2(), 2 ** (bits - 1)).exp2()
    return (flat.sign() * magnitude).view_as(W)


def _rows(W: Tensor) -> Tensor:
    return W.reshape(len(W), math.prod(W.shape[1:]))


def _levels(x: Tensor, count: int) -> Tensor:
    """X (b, n) rounded to `count` evenly spaced values between the extremes of each row."""
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    step = (high - low) / max(1, count - 1)
    return low + ((x - low) / step.where(step > 0, 1)).round() * step


class RobustWeightSignature(Merge):
    """Patches a clean network with what its robust twins have that it has not.

    Args:
        action: ``patch`` and ``extract``: the base is W_pre, the models W_clean and one or more W_robust; the result is
            the patched network, or the signature alone (zeros in tensors that it leaves).  ``apply`` and ``remove``:
            the models are a network and one or more signatures, which are added to it or taken off.
        strength: α of every corruption, or one of each.
        keep_num: first layers that a signature is taken of: convolutions (linear layers if there are none), or the stem
            and residual or transformer blocks; null: all.
        targets: regular expressions on tensors' names instead of `keep_num`.
        normalization: batch normalisation and shortcuts are the mean of the robust networks' (the paper), or the clean
            network's.
        quantize: how a signature's values are rounded; null: not.
        bits: of a value.
        variant: ``paper``, or ``release``, whose patches have (α/n)² for α.

    Raises:
        UserError: an option out of range.
    """

    scalable: ClassVar[bool] = False
    least: ClassVar[int] = 2

    def __init__(
        self,
        action: Action = "patch",
        strength: float | Sequence[float] = 1.0,
        keep_num: int | None = 7,
        targets: Sequence[str] | None = None,
        normalization: Literal["robust", "clean"] = "robust",
        quantize: Scheme | None = None,
        bits: int = 8,
        variant: Literal["paper", "release"] = "paper",
    ) -> None:
        super().__init__()
        if keep_num is not None and keep_num < 1:
            raise UserError(f"method.keep_num={keep_num}: expected at least 1, or null for all layers")
        if not 2 <= bits <= 16:
            raise UserError(f"method.bits={bits}: expected 2 to 16")
        for pattern in targets or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"method.targets: {pattern!r} is no regular expression: {error}") from None
        self.action, self.strength, self.keep_num, self.targets = action, strength, keep_num, targets
        self.normalization, self.quantize, self.bits, self.variant = normalization, quantize, bits, variant
        # W_pre matters for what is extracted; a signature is added to whatever it is given.
        self.needs_base = action in ("patch", "extract")  # type: ignore[misc]
        self._roles: dict[str, Role] = {}
        self._strengths: list[float] = []
        self._squares: dict[str, tuple[float, float]] = {}

    @override
    def survey(self, sources: Sources) -> None:
        n = sources.models - 1
        given = [self.strength] * n if isinstance(self.strength, int | float) else list(self.strength)
        if len(given) != n:
            raise UserError(
                f"method.strength has {len(given)} numbers for {n} signatures",
                hint="the first model is the one that is patched: one number for each of the others",
            )
        self._strengths = [(s / n) ** 2 for s in given] if self.variant == "release" else given
        # A signature that was taken says itself which tensors it is of.
        targets = [""] if self.targets is None and self.action in ("apply", "remove") else self.targets
        self._roles = roles(sources.infos(), self.keep_num, targets, self.normalization)
        if "signature" not in self._roles.values():
            raise UserError(f"method.targets={list(self.targets or ())}: no tensor has such a name")
        self._squares = {}

    @override
    def update(self, stack: Stack) -> Tensor:
        W0, n = stack.base(), stack.models - 1
        role = [self._roles[name.partition("#")[0]] for name in stack.names]
        if self.action in ("apply", "remove"):
            patch = torch.zeros_like(W0)
            for i, s in enumerate(self._strengths, 1):
                patch += self._weights(role, s, n, W0) * stack.tuned(i)
            sign = 1 if self.action == "apply" else -1
            return stack.tuned(0).sub_(W0).add_(patch, alpha=sign)
        a = stack.tuned(0).sub_(W0)
        patch = torch.zeros_like(W0)
        is_norm = _column([r == "normalisation" for r in role], W0)
        for i, s in enumerate(self._strengths, 1):
            d = stack.tuned(i).sub_(W0)
            RWS = signature(d, a)
            if self.quantize is not None:
                RWS = quantise(RWS, self.bits, self.quantize)
            patch += self._weights(role, s, n, W0) * torch.where(is_norm, d - a, RWS)
        chosen = _column([r == "signature" for r in role], W0)
        # By stack, for workers take turns.
        self._squares[stack.names[0]] = (
            float((patch * chosen).square().sum()),
            float((a * chosen).square().sum()),
        )
        return patch.sub_(W0) if self.action == "extract" else patch.add_(a)

    def _weights(self, role: Sequence[Role], strength: float, n: int, W: Tensor) -> Tensor:
        """What the i-th signature of each of b tensors is multiplied by, to be broadcast over W (b, …)."""
        norm = 1 / n if self.variant == "release" else min(strength, 1.0) / n
        return _column([{"signature": strength, "normalisation": norm, "kept": 0.0}[r] for r in role], W)

    @override
    def metrics(self) -> dict[str, float]:
        of_patch, of_clean = (sum(pair[i] for _, pair in sorted(self._squares.items())) for i in (0, 1))
        if not of_clean:
            return {}
        return {
            "signature/tensors": float(sum(role == "signature" for role in self._roles.values())),
            "signature/relative_norm": (of_patch / of_clean) ** 0.5,
        }


def _column(values: Sequence[float] | Sequence[bool], W: Tensor) -> Tensor:
    dtype = torch.bool if values and isinstance(values[0], bool) else W.dtype
    return torch.tensor(values, dtype=dtype, device=W.device).view(-1, *[1] * (W.dim() - 1))


def roles(
    infos: Mapping[str, TensorInfo], keep_num: int | None, targets: Sequence[str] | None, normalization: str
) -> dict[str, Role]:
    """What becomes of each tensor."""
    if targets is None:
        chosen = {name for group in layer_groups(infos)[:keep_num] for name in group}
    else:
        chosen = {name for name in infos if any(re.search(pattern, name) for pattern in targets)}
    normalised = {name.rpartition(".")[0] for name in infos if name.endswith("running_mean")}
    found: dict[str, Role] = {}
    for name in infos:
        if name.rpartition(".")[0] in normalised or _SHORTCUT.search(name):
            found[name] = "normalisation" if normalization == "robust" else "kept"
        else:
            found[name] = "signature" if name in chosen else "kept"
    return found
