"""A model whose weights are θ = θ0 + P z: the flat vector θ in one buffer, the parameters its views, z what is trained.

The wrapped module is not modified and does not know: its parameters lie in the buffer (so it can be used, saved and
exported as it is), and a forward pass that needs gradients calls it with tensors that autograd follows back to z.
Whatever works on ordinary parameters therefore works on z: any optimizer, clipping, accumulation, mixed precision,
closures, and DistributedDataParallel, which sends the d numbers of z's gradient and nothing else.

With one scale per layer (SAID, Aghajanyan et al. 2021, arXiv 2012.13255): θ_i = θ0_i + λ_i (P z)_i, λ = 1 at the start.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.subspaces.layout import FlatLayout

if TYPE_CHECKING:
    from subspace_lab.projections import Projection

_HASH = "theta0_sha256"


class FlatModel(nn.Module):
    """Any module, moving in the d-dimensional affine subspace θ0 + range(P).

    Args:
        inner: the module; its selected parameters become views of the flat buffer, all others are frozen as they are.
        layout: which parameters, in which order.
        projection: P, D × d.
        scales: one trainable scale per layer (SAID); their number counts towards the intrinsic dimension.

    Attributes:
        z: the coordinates, float32 (float64 for float64 models), (d,), zero at the start.
        lambdas: the layers' scales, (m,), or None.
    """

    def __init__(self, inner: nn.Module, layout: FlatLayout, projection: Projection, *, scales: bool = False) -> None:
        super().__init__()
        _refuse_checkpointing(inner)
        self.inner = inner
        self.layout = layout
        self.projection = projection
        parameters = dict(inner.named_parameters(remove_duplicate=False))
        first = parameters[layout.names[0]]
        dtype = torch.float64 if torch.float64 in layout.dtypes else torch.float32
        with torch.no_grad():
            flat = torch.cat([parameters[name].detach().reshape(-1).to(first.device, dtype) for name in layout.names])
        self._theta0 = flat
        self._theta = flat.clone()
        self._lifted: Tensor | None = None  # P z, kept only where the layers' scales need it
        self.z = nn.Parameter(torch.zeros(projection.d, dtype=dtype, device=first.device))
        self.lambdas: nn.Parameter | None = None
        if scales:
            self.lambdas = nn.Parameter(torch.ones(len(layout.layer_names), dtype=dtype, device=first.device))
        for parameter in inner.parameters():
            parameter.requires_grad_(False)
        self._theta0_hash: bytes | None = None
        self._sizes = torch.tensor(layout.layer_sizes, device=first.device)
        self._connect()
        self._watched = False
        self._mark(self._stamp())
        self._may_be_zero = True
        self.register_state_dict_post_hook(_drop_weights)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_post_hook(_forgive_weights)  # type: ignore[no-untyped-call]

    # -- the weights -----------------------------------------------------------------------------------------------

    def theta0(self) -> Tensor:
        """Return the frozen initial vector, (D,)."""
        return self._theta0

    def theta(self) -> Tensor:
        """Return θ for the current z, (D,): the buffer itself, in which the model's parameters lie."""
        self.sync()
        return self._theta

    def theta_exact(self) -> Tensor:
        """Return θ in the bits that every device, thread count and chunking gives, (D,): what is saved and rebuilt.

        For projections whose products are sums in a fixed order this is what training uses; for the others it differs
        from it by rounding.
        """
        return self._combine(exact=True)

    def settle(self) -> None:
        """Put the exact θ into the parameters."""
        with torch.no_grad():
            self._theta.copy_(self.theta_exact())
            self._write_casts()
            self._mark(self._stamp())

    def sync(self) -> None:
        """Bring the parameters up to date with z."""
        stamp = self._stamp()
        if self._seen != stamp or self._moved():
            with torch.no_grad():
                self._may_be_zero = self._may_be_zero and not bool(self.z.any())  # reads the device at one step only
                if self._may_be_zero:
                    self._theta.copy_(self._theta0)
                else:
                    self._combine(exact=False, out=self._theta)
                self._write_casts()
                self._mark(stamp)

    def watch(self, optimizer: Optimizer) -> None:
        """Let steps of `optimizer` say that z has changed, which saves comparing z on a GPU at every forward pass."""
        self._watched = True
        optimizer.register_step_post_hook(lambda *_: self._forget())

    def _moved(self) -> bool:
        """Fused optimizers write z without counting up its version: only its contents tell."""
        if self._watched and self.z.device.type != "cpu":
            return False
        return any(not torch.equal(p, seen) for p, seen in zip(self._held(), self._seen_values, strict=True))

    def _mark(self, stamp: tuple[int, ...]) -> None:
        self._seen = stamp
        self._seen_values = [p.detach().clone() for p in self._held()]

    def _forget(self) -> None:
        self._seen = (-1,)

    def _held(self) -> tuple[nn.Parameter, ...]:
        return (self.z,) if self.lambdas is None else (self.z, self.lambdas)

    def theta0_sha256(self) -> str:
        """Return the SHA-256 of θ0's bytes (little endian), hexadecimal."""
        if self._theta0_hash is None:  # once a run, when the first checkpoint is written or read: not on the step path
            self._theta0_hash = hashlib.sha256(self._theta0.detach().cpu().numpy().tobytes()).digest()
        return self._theta0_hash.hex()

    def _combine(self, *, exact: bool, out: Tensor | None = None) -> Tensor:
        """Return θ0 + λ · P z; where z may be 0, the very bits of θ0 (adding +0 would turn a −0 into +0)."""
        z = self.z.detach()
        lift: Callable[..., Tensor] = self.projection.lift
        if exact:
            lift = getattr(self.projection, "lift_exact", lift)
            if not bool(z.any()):
                return self._theta0.clone()
        if self.lambdas is None:
            return lift(z, base=self._theta0, out=out)
        self._lifted = lift(z, out=self._lifted if not exact else None)
        scaled = self._per_entry(self.lambdas.detach()) * self._lifted
        return torch.add(self._theta0, scaled, out=out) if out is not None else self._theta0 + scaled

    def _per_entry(self, lambdas: Tensor) -> Tensor:
        return torch.repeat_interleave(lambdas, self._sizes, output_size=self.layout.D)

    def _stamp(self) -> tuple[int, ...]:
        return tuple(number for p in self._held() for number in (p._version, p.data_ptr()))

    def _connect(self) -> None:
        """Make the selected parameters views of the buffer (casts of it where their dtype differs)."""
        self._casts: list[tuple[nn.Parameter, Tensor]] = []
        for parameter, part in zip(self._selected(), self.layout.split(self._theta), strict=True):
            if parameter.dtype == part.dtype or parameter.dtype in (torch.float32, torch.float64):
                parameter.data = part
            else:
                self._casts.append((parameter, part))

    def _write_casts(self) -> None:
        for parameter, part in self._casts:
            parameter.copy_(part)

    # -- the module's interface ------------------------------------------------------------------------------------

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the wrapped module returns, differentiable with respect to z (and λ)."""
        self.sync()
        if not torch.is_grad_enabled() or not self.z.requires_grad:
            return self.inner(*args, **kwargs)
        tensors = _Weights.apply(self, *self._held())
        named = {
            name: tensor if tensor.dtype == p.dtype else tensor.to(p.dtype)
            for name, tensor, p in zip(self.layout.names, tensors, self._selected(), strict=True)
        }
        return functional_call(self.inner, named, args, kwargs, tie_weights=True)

    def _selected(self) -> list[nn.Parameter]:
        parameters = dict(self.inner.named_parameters(remove_duplicate=False))
        return [parameters[name] for name in self.layout.names]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "_seen_values" not in self.__dict__:  # private, or not built yet
                raise
        self.sync()  # `generate`, `save_pretrained` and the like read the weights
        return getattr(self._modules["inner"], name)

    @override
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FlatModel:
        self.sync()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = fn(self._theta0)
        # Half-precision training keeps the subspace itself in float32: an update of z is far below bf16's resolution.
        dtype = moved.dtype if moved.dtype in (torch.float32, torch.float64) else torch.float32
        for parameter in (self.z, self.lambdas):
            if parameter is not None and parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
        self._theta0 = moved if moved.dtype == dtype else self._theta0.to(moved.device, dtype)
        self._theta = self._theta.to(self._theta0.device, dtype)
        self._sizes = self._sizes.to(self._theta0.device)
        self._reconnect()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # a copy's parameters have memory of their own
        self._watched = False
        self._reconnect()

    def _reconnect(self) -> None:
        self._lifted = None
        self._connect()
        self._forget()  # the weights are computed anew when next needed
        self._may_be_zero = True

    def set_extra_state(self, state: Any) -> None:
        """Check that a checkpoint was made from the same initial weights.

        Raises:
            UserError: it was not.
        """
        # 32 bytes to the host, once, when a checkpoint is read.
        if state is not None and bytes(state[_HASH].tolist()).hex() != self.theta0_sha256():
            raise UserError(
                "the checkpoint was trained from other initial weights than this run starts from",
                hint="resume with the seed and the model that the run was started with",
            )

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return what identifies θ0."""
        return {_HASH: torch.tensor(list(bytes.fromhex(self.theta0_sha256())), dtype=torch.uint8)}


class _Weights(torch.autograd.Function):
    """(z[, λ]) -> the weight tensors; backward is the adjoint: ∇z = Pᵀ(λ·∇θ), ∇λ_i = ⟨∇θ_i, (P z)_i⟩."""

    @staticmethod
    def forward(ctx: Any, model: FlatModel, *held: Tensor) -> tuple[Tensor, ...]:
        ctx.model = model
        if len(held) > 1:
            ctx.save_for_backward(held[1])
        return tuple(part.detach() for part in model.layout.split(model._theta))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        model: FlatModel = ctx.model
        layout, theta = model.layout, model._theta
        parts = [
            torch.zeros(size, dtype=theta.dtype, device=theta.device) if g is None else g.reshape(-1)
            for g, size in zip(grads, layout.sizes, strict=True)
        ]
        g = torch.cat(parts)
        if model.lambdas is None:
            return None, model.projection.project(g)
        (lambdas,) = ctx.saved_tensors
        lifted = model._lifted if model._lifted is not None else torch.zeros_like(g)
        inner = (g * lifted).split_with_sizes(list(layout.layer_sizes))
        return (
            None,
            model.projection.project(g * model._per_entry(lambdas)),
            torch.stack([part.sum() for part in inner]),
        )


def _refuse_checkpointing(inner: nn.Module) -> None:
    if any(getattr(module, "gradient_checkpointing", False) for module in inner.modules()):
        raise UserError(
            "gradient checkpointing recomputes the model without the subspace's tensors",
            hint="set model.gradient_checkpointing=false",
        )


def _drop_weights(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    assert isinstance(module, FlatModel)
    for name, _ in module.inner.named_parameters(remove_duplicate=False):
        state.pop(f"{prefix}inner.{name}", None)


def _forgive_weights(module: nn.Module, keys: Any) -> None:
    assert isinstance(module, FlatModel)
    weights = {f"inner.{name}" for name, _ in module.inner.named_parameters(remove_duplicate=False)}
    keys.missing_keys[:] = [k for k in keys.missing_keys if not any(k == w or k.endswith(f".{w}") for w in weights)]
    module._forget()
    module._may_be_zero = True
