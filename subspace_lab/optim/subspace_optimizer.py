"""Any torch optimizer, acting on coordinates in a subspace.

One step, for every stack of same-shape weights:

    A = gradients (B, p, q)         refresh the bases that are due,  Z = project(A)
    ΔZ = one step of the inner optimizer on coordinates that start at zero with gradient Z
    W <- W + scale · lift(ΔZ)       (or a retraction), with decoupled weight decay on W

so moments live in the subspace and the *update*, not only the gradient, stays inside it: Adam's division by √V is
lifted with the rest.  With `Identity` this is the inner optimizer itself; with `SVD` it is GaLore (arXiv 2403.03507,
algorithm 2); with `Complement`, gradient projection memory; with `Tangent`, Riemannian descent.

Of sharded weights (FSDP2) every process steps its own rows, (p, q) being cut along p: factors of the rank's width are
added up over processes when bases are refreshed, and a gradient is never put together.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from subspace_lab.optim.meter import Meter
from subspace_lab.optim.moments import Moments
from subspace_lab.optim.persistence import export_state, import_state
from subspace_lab.optim.refreshing import Peers
from subspace_lab.optim.shards import local
from subspace_lab.optim.stack import Stack, matrix_shape, orientation
from subspace_lab.optim.traits import OptimizerFactory, is_elementwise, is_linear
from subspace_lab.optim.unit import Rules, Unit
from subspace_lab.subspaces.base import Subspace

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class SubspaceOptimizer(Optimizer):
    """See the module's docstring.

    Args:
        params: parameter groups; a group with a ``subspace`` (a `Subspace`) is projected, one without is left to
            the inner optimizer.  ``flat: True`` treats a group as one vector, ``scale`` overrides the default.
            Give (name, parameter) pairs: names key the checkpoint and the random choices.
        inner: makes the inner optimizer from parameter groups, e.g. ``partial(torch.optim.AdamW, lr=1e-3)``.
        refresh_every: steps between refreshes of a basis, the first at step 0; 0 means never again.
        moments: what a refresh does to moments, see `subspace_lab.optim.moments.carry_over`.
        scale: factor α on lifted updates (GaLore's scale).
        stagger: spread the refreshes of different matrices over the interval so that no step stalls.
        decay: ``full`` shrinks the whole weight, ``inside`` only its part in the subspace; default: inside where
            leaving the subspace breaks a promise (complements, tangent spaces), else full.
        eps_before_correction: put Adam's ε beside √V *before* bias correction, as galore-torch and old
            transformers do (ε' = ε/√(1−β2ᵗ) in torch's form).
        decay_after: shrink after the step instead of before it (galore-torch).
        per_layer: step each weight as soon as its gradient is complete and free the gradient.  Not compatible
            with gradient accumulation, clipping or gradient synchronisation after the backward pass.

    Gradients: a weight whose gradient is None is skipped and keeps its own step count; a matrix whose gradient is
    zero or not finite keeps its basis, and one that is not finite takes a zero gradient for that step (except under a
    complement with SGD: there the inner optimizer steps the weights themselves, and takes gradients as they are).

    Raises:
        ValueError: on options that contradict each other.
    """

    def __init__(
        self,
        params: Iterable[Any],
        inner: OptimizerFactory,
        *,
        refresh_every: int = 200,
        moments: Moments = "keep",
        scale: float = 1.0,
        stagger: bool = False,
        decay: Literal["full", "inside"] | None = None,
        eps_before_correction: bool = False,
        decay_after: bool = False,
        per_layer: bool = False,
    ) -> None:
        if refresh_every < 0:
            raise ValueError(f"refresh_every must be 0 (never again) or positive, not {refresh_every}")
        if moments not in ("keep", "rotate", "reset"):
            raise ValueError(f"moments must be keep, rotate or reset, not {moments!r}")
        self.factory = inner
        self.rules = Rules(refresh_every, moments, stagger, decay, eps_before_correction, decay_after)
        self.per_layer = per_layer
        self.meter = Meter()
        self.peers: Peers | None = None
        self.units: list[Unit] = []
        probe = inner([{"params": [nn.Parameter(torch.zeros(1, 1))], "kind": "matrix"}])
        # Some libraries keep the learning rate as a tensor; here it is a number, and theirs is filled from it.
        defaults = {k: float(v) if isinstance(v, Tensor) else v for k, v in probe.defaults.items()}
        super().__init__(params, {**defaults, "scale": scale, "subspace": None, "flat": False, "kind": "other"})
        self._check_groups()
        self._build({})
        if per_layer:
            self._hook_gradients()

    # -- construction ----------------------------------------------------------------------------------------

    def _check_groups(self) -> None:
        for g, group in enumerate(self.param_groups):
            group.setdefault("param_names", [f"group{g}.{i}" for i in range(len(group["params"]))])
            subspace = group["subspace"]
            if subspace is not None and not isinstance(subspace, Subspace):
                raise ValueError(f"subspace of parameter group {g} is a {type(subspace).__name__}, not a Subspace")

    def _offsets(self) -> dict[str, int]:
        """Each projected weight's shift inside the refresh interval; independent of parameter order."""
        keys = sorted(
            key
            for g, group in enumerate(self.param_groups)
            if group["subspace"] is not None
            for key in ([f"flat.{g}"] if group["flat"] else group["param_names"])
        )
        every = self.rules.refresh_every if self.rules.stagger else 0
        return {key: i * every // len(keys) for i, key in enumerate(keys)}

    def _build(self, steps: dict[str, int]) -> None:
        """(Re)build stacks and inner optimizers; weights share a stack when shape, group and step count agree."""
        offsets = self._offsets()
        stacked = is_elementwise(self.factory) and not (self.rules.stagger and self.rules.moments == "reset")
        stacks: list[Stack] = []
        plain: list[tuple[int, list[nn.Parameter]]] = []
        for g, group in enumerate(self.param_groups):
            if group["subspace"] is None:
                plain.append((g, list(group["params"])))
                continue
            buckets: dict[Any, list[tuple[str, nn.Parameter]]] = defaultdict(list)
            for name, p in zip(group["param_names"], group["params"], strict=True):
                buckets[self._bucket(g, name, p, steps)].append((name, p))
            for key, members in buckets.items():
                stacks.append(
                    Stack(
                        members,
                        group["subspace"],
                        group=g,
                        flat=group["flat"],
                        stacked=stacked,
                        offsets=offsets,
                        tracks_change=self.rules.moments == "rotate",
                        direct=self._is_direct(group, members[0][1]),
                        t=key[-1],
                    )
                )
        parts: list[tuple[list[Stack], list[tuple[int, list[nn.Parameter]]]]] = [(stacks, plain)]
        if self.per_layer:
            parts = [([s], []) for s in stacks]
            parts += [([], [(g, [p])]) for g, ps in plain for p in ps]
        self.units = [self._unit(s, p, steps) for s, p in parts]

    def _is_direct(self, group: dict[str, Any], weight: nn.Parameter) -> bool:
        """Whether one projection of the gradient does: nothing that the inner optimizer makes of it can leave."""
        whole = group["subspace"].linear_in_place and not group["flat"] and float(group["scale"]) == 1
        return bool(whole and weight.dtype == torch.float32 and is_linear(self.factory))

    def _unit(self, stacks: list[Stack], plain: list[tuple[int, list[nn.Parameter]]], steps: dict[str, int]) -> Unit:
        t = max((steps.get(n, 0) for g, _ in plain for n in self.param_groups[g]["param_names"]), default=0)
        return Unit(stacks, plain, self.param_groups, self.factory, self.rules, self.meter, t, self.peers)

    def _bucket(self, g: int, name: str, p: nn.Parameter, steps: dict[str, int]) -> tuple[Any, ...]:
        group = self.param_groups[g]
        if group["flat"]:
            return (steps.get(f"flat.{g}", 0),)
        m, n = matrix_shape(p)
        shape = (n, m) if orientation(p, group["subspace"].side) else (m, n)
        return (shape, p.dtype, p.device, name if self.per_layer else None, steps.get(name, 0))

    def share_refreshes(self, group: ProcessGroup | None = None) -> None:
        """Divide the choosing of bases among processes that have the same weights and gradients (data parallelism).

        Each chooses its share and sends it to the others; without this, each chooses all.

        Args:
            group: the processes; None for all.
        """
        self.peers = Peers(group)
        for unit in self.units:
            unit.peers = self.peers

    def _hook_gradients(self) -> None:
        for u, unit in enumerate(self.units):
            weights = unit.weights()
            if len(weights) > 1:
                raise ValueError("per_layer cannot step a flat group: its gradient is complete only at the end")
            weights[0].register_post_accumulate_grad_hook(lambda p, u=u: self._step_layer(u, p))  # type: ignore[no-untyped-call]

    def _step_layer(self, u: int, p: Tensor) -> None:
        with torch.no_grad():
            self.units[u].step()
        p.grad = None

    # -- the step --------------------------------------------------------------------------------------------

    @torch.no_grad()
    @override
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.per_layer:  # else the backward pass has done it
            self._split_where_gradients_are_missing()
            for unit in self.units:
                unit.step()
        return loss

    def _split_where_gradients_are_missing(self) -> None:
        """A weight without a gradient is skipped, so from now on it counts its own steps."""
        missing: set[str] = set()
        for s in (s for unit in self.units for s in unit.stacks):
            absent = [n for n, p in zip(s.names, s.owners, strict=True) if p.grad is None]
            if not absent or len(absent) == len(s.names):
                continue
            if s.flat:
                raise ValueError(f"flat group: no gradient for {absent[0]}; leave out parameters the loss does not use")
            missing.update(absent)
        if missing:
            steps, saved = self._steps(), export_state(self)
            # A negative step count is a bucket key only: it parts the absent from the present.
            self._build({k: -t - 1 if k in missing else t for k, t in steps.items()})
            for unit in self.units:
                for s in unit.stacks:
                    s.t = steps[s.keys[0]]
            import_state(self, saved)

    def _steps(self) -> dict[str, int]:
        """Steps taken, by parameter name (or flat group)."""
        steps = {k: s.t for unit in self.units for s in unit.stacks for k in s.keys}
        for unit in self.units:
            steps |= {n: unit.t for g, _ in unit.plain for n in self.param_groups[g]["param_names"]}
        return steps

    # -- state and figures -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values, keyed by parameter name: loads with weights_only=True in any parameter order."""
        ours = ("params", "param_names", "subspace")
        groups = [
            {**{k: v for k, v in g.items() if k not in ours}, "params": list(g["param_names"])}
            for g in self.param_groups
        ]
        return {"state": export_state(self), "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a `state_dict`.

        Raises:
            ValueError: parameters are missing or unknown, or a basis has another shape.
        """
        saved = state_dict["state"]
        have = {n for g in state_dict["param_groups"] for n in g["params"]}
        want = {n for g in self.param_groups for n in g["param_names"]}
        if have != want:
            raise ValueError(
                f"optimizer state is for other parameters: missing {sorted(want - have)[:3]}, "
                f"unknown {sorted(have - want)[:3]}"
            )
        by_names = {frozenset(g["params"]): g for g in state_dict["param_groups"]}
        for group in self.param_groups:
            options = by_names.get(frozenset(group["param_names"]), {})
            group.update({k: v for k, v in options.items() if k != "params"})
        self._build({k: int(v["t"]) for k, v in saved.items()})
        import_state(self, saved)

    def directions(self, name: str) -> dict[str, Tensor]:
        """The subspace of one weight (or ``flat.<group>``) as tensors, e.g. ``{"basis": P (q, r), …}``; views.

        Raises:
            KeyError: the name is not projected.
        """
        for s in (s for unit in self.units for s in unit.stacks):
            if name in s.keys:
                return s.subspace.directions(s.keys.index(name))
        raise KeyError(f"no projected parameter '{name}'")

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this process keeps between steps: moments, counters and bases."""
        total = sum(s.subspace.state_bytes() for unit in self.units for s in unit.stacks)
        for unit in self.units:
            for state in unit.inner.state.values():
                tensors = [local(v) for v in state.values() if isinstance(v, Tensor)]
                total += sum(v.numel() * v.element_size() for v in tensors)
        return total

    @property
    def measure(self) -> bool:
        """Whether steps sum up gradient energy for `metrics`; costs one pass over the gradients."""
        return self.meter.measure

    @measure.setter
    def measure(self, on: bool) -> None:
        self.meter.measure = on

    @property
    def refresh_count(self) -> int:
        """Bases chosen so far."""
        return self.meter.refreshes

    @property
    def refresh_seconds(self) -> float:
        """Time spent choosing bases, in seconds."""
        return self.meter.watch.total()

    def metrics(self) -> dict[str, Tensor | float]:
        """``refreshes`` and, of the steps that ran with `measure` on, ``captured_energy``; no host sync."""
        return self.meter.figures()
