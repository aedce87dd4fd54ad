"""Riemannian SGD with momentum for weights that live on a Grassmannian, a Stiefel manifold or spheres.

What moves is declared by parameter groups, in plain values that survive copies, checkpoints and sharding:

    {"params": [("fc.bases.k8", S)], "manifold": "grassmann", "blocks": True}

``blocks``: the parameter is (B, k, n), a batch of points whose k rows are the orthonormal vectors. Without it the
parameter is one weight, (out, …) as a matrix: orthonormal along its shorter side, or, on the sphere, unit rows.

Bonnabel, "Stochastic gradient descent on Riemannian manifolds", IEEE TAC 2013; with the momentum of Wang, Li & Zhang
(GCR), ICCV 2023.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.linalg.precision import full_precision, matmul
from subspace_lab.manifolds.base import Retraction, check_method
from subspace_lab.manifolds.gram import Grams, Kind, step, transport
from subspace_lab.optim.shards import local
from subspace_lab.optim.stack import as_matrix

Momentum = Literal["transported", "ambient"]

# Entries of a weight that are worked on at once. On a CPU they stay in its cache between the three passes; a GPU takes
# everything in one batch, up to what its memory can hold beside double precision copies.
_CHUNK_ENTRIES = {"cpu": 1 << 20, "cuda": 1 << 26}


class RiemannianSGD(Optimizer):
    """SGD whose steps follow the manifold; see the module's docstring for the parameter groups.

    With the Euclidean gradient D at S, learning rate η and tangent projection Π_S, a step is

        transported   m <- Π_S(μ m + D),   S <- R_S(−η m),   m <- Π_S(m) at the new S
        ambient       m <- μ m + D,        S <- R_S(−η Π_S m)          (the released optimizer's order)

    All points of one shape are stepped together by batched products with k x k factors (`manifolds.gram`); nothing
    reads a value back to the host. There is no weight decay: of a subspace it would change nothing. A point whose
    gradient is not finite takes a zero gradient for that step.

    Args:
        params: parameter groups as above.
        lr: learning rate η.
        momentum: μ; 0 keeps no buffer.
        update: the retraction R.
        transport: where the momentum lives.
        reorthonormalize_every: steps between plain QR decompositions of all points, as the released optimizer makes
            them (LAPACK's signs, so a basis vector may flip while its momentum does not); 0 makes none.

    Raises:
        ValueError: an unknown manifold or option, a shape that cannot be a point.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        momentum: float = 0.9,
        update: Retraction = "geodesic",
        transport: Momentum = "transported",
        reorthonormalize_every: int = 0,
    ) -> None:
        check_method(update)
        if transport not in ("transported", "ambient"):
            raise ValueError(f"transport must be transported or ambient, not {transport!r}")
        if lr < 0 or not 0 <= momentum < 1:
            raise ValueError(f"expected lr ≥ 0 and momentum in [0, 1), not {lr} and {momentum}")
        if reorthonormalize_every < 0:
            raise ValueError(f"reorthonormalize_every must be 0 (never) or positive, not {reorthonormalize_every}")
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "update": update,
            "transport": transport,
            "reorthonormalize_every": reorthonormalize_every,
            "manifold": "grassmann",
            "blocks": False,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for p in group["params"]:
                _check(p, group)

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets: dict[Any, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if not state:
                        state["step"] = 0
                        if group["momentum"]:
                            state["momentum_buffer"] = torch.zeros_like(p)
                    state["step"] += 1
                    rows = points(local(p), group["manifold"], group["blocks"])
                    buckets[rows.shape[1:], p.dtype, p.device, state["step"]].append(p)
            for (_, _, _, t), members in buckets.items():
                self._step_bucket(members, group, t)
        return loss

    def _step_bucket(self, members: list[Tensor], group: dict[str, Any], t: int) -> None:
        """Step weights whose points have one shape: a single one where it lies, several through a common stack."""

        def rows(tensors: list[Tensor]) -> list[Tensor]:
            return [points(local(x), group["manifold"], group["blocks"]) for x in tensors]

        S = rows(members)
        D = rows([p.grad for p in members if p.grad is not None])
        m = rows([self.state[p]["momentum_buffer"] for p in members]) if group["momentum"] else None
        reset = group["reorthonormalize_every"]
        advance = _Advance(group, plain_qr=bool(reset) and t % reset == 0)
        if len(members) == 1:
            advance(S[0], D[0], None if m is None else m[0])
        else:
            joined = torch.cat(S), None if m is None else torch.cat(m)
            advance(joined[0], torch.cat(D), joined[1])
            sizes = [len(x) for x in S]
            torch._foreach_copy_(S, list(joined[0].split_with_sizes(sizes)))
            if m is not None and joined[1] is not None:
                torch._foreach_copy_(m, list(joined[1].split_with_sizes(sizes)))
        if group["blocks"]:
            return
        tensors = [local(p) for p in members]
        tensors += [local(self.state[p]["momentum_buffer"]) for p in members] if m is not None else []
        for target, source in zip(tensors, S + (m or []), strict=True):
            if not target.is_contiguous():  # its rows may be a copy
                _write_back(target, source)


class _Advance:
    """One step of a batch of points, in place."""

    def __init__(self, group: dict[str, Any], *, plain_qr: bool) -> None:
        self.kind: Kind = group["manifold"]
        self.lr, self.momentum = float(group["lr"]), float(group["momentum"])
        self.update: Retraction = group["update"]
        self.transported = group["transport"] == "transported" and self.momentum > 0
        self.plain_qr = plain_qr

    @full_precision
    def __call__(self, S: Tensor, D: Tensor, m: Tensor | None) -> None:
        """S, D and m: (B, k, n) with S's rows orthonormal; S and m are overwritten."""
        size = max(1, _CHUNK_ENTRIES.get(S.device.type, 1 << 26) // max(1, S[0].numel() if len(S) else 1))
        for start in range(0, len(S), size):
            c = slice(start, start + size)
            self._chunk(S[c], D[c], None if m is None else m[c])

    def _chunk(self, S: Tensor, D: Tensor, m: Tensor | None) -> None:
        D = _finite(D)
        m = D if m is None else m.mul_(self.momentum).add_(D)
        # Rows are vectors here, columns in the formulas: S below is the formulas' Sᵀ.
        Sm, mm = matmul(S, m.mT).double(), matmul(m, m.mT).double()
        identity = torch.eye(S.shape[1], dtype=Sm.dtype, device=S.device).expand_as(Sm)
        grams = Grams(identity, Sm, mm)
        P, Q = step(self.kind, grams, self.lr, self.update)
        new = _combine(P, S, Q, m)
        # One Newton-Schulz step squares what float32 left of an error, so none is carried from step to step.
        new = matmul((1.5 * identity - 0.5 * matmul(new, new.mT).double()).to(S.dtype), new)
        if self.transported:
            P, Q = transport(self.kind, grams, P, Q)
            m.copy_(_combine(P, S, Q, m))
        if self.lr:  # a step of length 0 changes no bit (torch makes one to restore a sharded optimizer)
            S.copy_(torch.linalg.qr(new.mT)[0].mT if self.plain_qr else new)


def _combine(P: Tensor, S: Tensor, Q: Tensor, m: Tensor) -> Tensor:
    """Rows of S P + m Q, from rows."""
    if S.is_cuda or S.dtype == torch.float64:
        return matmul(P.mT.to(S.dtype), S) + matmul(Q.mT.to(S.dtype), m)
    return torch.baddbmm(matmul(P.mT.to(S.dtype), S), Q.mT.to(S.dtype), m)


def _finite(D: Tensor) -> Tensor:
    """D with zeros for every point whose gradient is not finite."""
    sums = D.sum(dim=(1, 2), keepdim=True)
    # On the CPU the answer costs nothing and saves a copy (fake tensors, which only have shapes, have no answer).
    if type(D) in (Tensor, nn.Parameter) and D.device.type == "cpu" and bool(torch.isfinite(sums).all()):
        return D
    return torch.where(torch.isfinite(sums), D, 0)


def points(weight: Tensor, manifold: Kind, blocks: bool) -> Tensor:
    """A weight as points (B, k, n) with orthonormal rows; a view where the memory layout allows one.

    Args:
        weight: (B, k, n) with `blocks`; else (out, …), read as the matrix out x rest.
        manifold: of which kind: ``sphere`` gives (out, 1, rest), the others (1, k, n) with k the shorter side.
        blocks: see above.
    """
    if blocks:
        return weight
    matrix = as_matrix(weight)
    if manifold == "sphere":
        return matrix.unsqueeze(1)
    return (matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT).unsqueeze(0)


def _write_back(weight: Tensor, rows: Tensor) -> None:
    matrix = rows[:, 0] if rows.shape[1] == 1 else rows[0]
    weight.copy_((matrix if matrix.shape == as_matrix(weight).shape else matrix.mT).reshape(weight.shape))


def _check(p: Tensor, group: dict[str, Any]) -> None:
    kind, blocks = group["manifold"], group["blocks"]
    if kind not in ("grassmann", "stiefel", "sphere"):
        raise ValueError(f"unknown manifold {kind!r}, expected grassmann, stiefel or sphere")
    if p.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"a weight on a manifold needs float32 or float64, not {p.dtype}: its basis would round off it"
        )
    if blocks and (p.ndim != 3 or p.shape[1] > p.shape[2]):
        raise ValueError(f"blocks must be (B, k, n) with k ≤ n, not {tuple(p.shape)}")
    if hasattr(p, "to_local") and not blocks and kind != "sphere":
        raise ValueError("one matrix on a manifold cannot be sharded; batches of points and spheres can")
