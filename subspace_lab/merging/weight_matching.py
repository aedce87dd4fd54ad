"""Weight matching: permute the hidden units of one network onto another's, then average.

Ainsworth, Hayase & Srinivasa, "Git Re-Basin", ICLR 2023, arXiv 2209.04836, algorithm 1.  Two trainings that start from
different seeds end with the same units in another order, and the line between them passes through bad networks.  Find

    argmax_π  Σ over tensors  ⟨W_A, π(W_B)⟩

by coordinate ascent: with all other permutations held, that of one layer is a linear assignment of the matrix

    A  =  Σ over tensors and axes that it touches  W_A W_Bᵀ        (n, n)

and merged = (1 − t) W_A + t π(W_B).  The heads of an attention layer are assigned as blocks: for each pair of heads the
best assignment inside them first, for queries with keys and for values with outputs, whose sums are what the
heads are assigned by.  That is the exact optimum over everything of that layer, so that the objective never falls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from subspace_lab.errors import UserError
from subspace_lab.merging.architectures import Family, find_spec
from subspace_lab.merging.base import Merge, Stack
from subspace_lab.merging.connectivity import Connectivity, Evaluate, connect
from subspace_lab.merging.permutations import Heads, Permutations, PermutationSpec, moved
from subspace_lab.merging.sources import Sources, StateDicts

if TYPE_CHECKING:
    from subspace_lab.merging.workshop import Workshop

Read = Callable[[str], Tensor]
Matrix = NDArray[np.float64]

_LEAST_GAIN = 1e-12
_SWEEPS = 100


@dataclass(frozen=True)
class Matching:
    """Permutations of a network that bring its units to those of another.

    Attributes:
        permutations: by name of the spec.
        objective: Σ ⟨W_A, π(W_B)⟩ over the layers that were matched, after each sweep; before the first at 0.
    """

    permutations: Mapping[str, Tensor]
    objective: Sequence[float]

    @property
    def sweeps(self) -> int:
        """How often all layers were gone through."""
        return len(self.objective) - 1


def match(spec: PermutationSpec, a: Read, b: Read, *, seed: int = 0, sweeps: int = _SWEEPS) -> Matching:
    """Coordinate ascent of Σ ⟨W_A, π(W_B)⟩, layers in a random order anew in each sweep.

    Args:
        spec: of both networks.
        a: name -> tensor of the network that stays, in float32 or float64; called for each use, nothing is kept.
        b: likewise of the network that is permuted.
        seed: of the orders.
        sweeps: at most; it ends with the first in which no layer gains more than 1e-12.
    """
    permutations = spec.identity()
    generator = torch.Generator().manual_seed(seed)
    grouped = {heads.names: heads for heads in spec.heads}
    objective = [_objective(spec, a, b, permutations)]
    for _ in range(sweeps):
        gained = False
        for index in torch.randperm(len(spec.units), generator=generator).tolist():
            names = spec.units[index]
            scores = [_scores(spec, name, a, b, permutations) for name in names]
            found = _assign_heads(scores, grouped[names]) if names in grouped else [_assign(scores[0])[0]]
            old = sum(_value(A, permutations[name].numpy()) for A, name in zip(scores, names, strict=True))
            new = sum(_value(A, order) for A, order in zip(scores, found, strict=True))
            if new > old + _LEAST_GAIN:
                gained = True
                permutations |= {name: torch.from_numpy(order) for name, order in zip(names, found, strict=True)}
        objective.append(_objective(spec, a, b, permutations))
        if not gained:
            break
    return Matching(permutations, objective)


def _scores(spec: PermutationSpec, name: str, a: Read, b: Read, permutations: Permutations) -> Matrix:
    """A (n, n): what it adds to the objective that unit j of B comes to the place of unit i of A."""
    n = spec.sizes[name]
    total = np.zeros((n, n))
    for touch in spec.touches[name]:
        W_a, W_b = a(touch.tensor), spec.permute(touch.tensor, b(touch.tensor), permutations, leave=touch.axis)
        rows = [W.narrow(touch.axis, touch.start, touch.stop - touch.start) for W in (W_a, W_b)]
        left, right = (part.movedim(touch.axis, 0).reshape(n, -1) for part in rows)
        total += (left @ right.mT).double().cpu().numpy()
    return total


def _assign(A: Matrix) -> tuple[NDArray[np.int64], float]:
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    _, columns = linear_sum_assignment(A, maximize=True)
    order = np.asarray(columns, dtype=np.int64)
    return order, _value(A, order)


def _value(A: Matrix, order: NDArray[np.int64]) -> float:
    return float(A[np.arange(len(order)), order].sum())


def _assign_heads(scores: Sequence[Matrix], heads: Heads) -> list[NDArray[np.int64]]:
    """The best assignment of heads, and inside each of them."""
    H = heads.count
    blocks = [A.reshape(H, len(A) // H, H, len(A) // H).transpose(0, 2, 1, 3) for A in scores]
    inside = [[[_assign(block[i, j]) for j in range(H)] for i in range(H)] for block in blocks]
    gains = np.array([[sum(part[i][j][1] for part in inside) for j in range(H)] for i in range(H)])
    order = _assign(gains)[0]
    return [
        np.concatenate([part[i][j][0] + j * (len(A) // H) for i, j in enumerate(order)])
        for part, A in zip(inside, scores, strict=True)
    ]


def _objective(spec: PermutationSpec, a: Read, b: Read, permutations: Permutations) -> float:
    names = dict.fromkeys(touch.tensor for touches in spec.touches.values() for touch in touches)
    pairs = ((a(name), spec.permute(name, b(name), permutations)) for name in names)
    return sum(float((W_a.double() * W_b.double()).sum()) for W_a, W_b in pairs)


class WeightMatching(Merge):
    """The mean of models whose hidden units are permuted onto those of the first.

    Two models are meant.  More are matched to the first one after the other, and all are averaged alike.

    Args:
        spec: which axes are permuted together: found from the tensors' names (auto), or for networks of one family.
        heads: of an attention layer, which no tensor tells; null: of 64 units each.
        t: share of the second of two models.
        seed: of the order in which layers are matched.

    Raises:
        UserError: t is not a share.
    """

    scalable: ClassVar[bool] = False
    needs_base: ClassVar[bool] = False
    least: ClassVar[int] = 2

    def __init__(
        self, spec: Family | PermutationSpec = "auto", heads: int | None = None, t: float = 0.5, seed: int = 0
    ) -> None:
        super().__init__()
        if not 0 <= t <= 1:
            raise UserError(f"method.t={t}: expected a share from 0 to 1")
        if heads is not None and heads < 1:
            raise UserError(f"method.heads={heads}: expected at least 1")
        self.spec, self.heads, self.t, self.seed = spec, heads, t, seed
        #: of the last survey: the spec of the networks, and what was found for the second model and those after it
        self.network: PermutationSpec | None = None
        self.matchings: list[Matching] = []

    @override
    def survey(self, sources: Sources) -> None:
        if self.t != 0.5 and sources.models > 2:
            raise UserError(f"method.t={self.t} is the share of the second of two models: there are {sources.models}")
        infos = sources.infos()
        if isinstance(self.spec, PermutationSpec):
            self.spec.check(infos)
            self.network = self.spec
        else:
            self.network = find_spec(infos, self.spec, self.heads)

        def reader(model: int) -> Read:
            def read(name: str) -> Tensor:
                W = sources.read(model, name).view(infos[name].shape)
                return W if W.dtype == torch.float64 else W.float()

            return read

        self.matchings = [match(self.network, reader(0), reader(t), seed=self.seed) for t in range(1, sources.models)]

    @override
    def update(self, stack: Stack) -> Tensor:
        shares = [1 - self.t, self.t] if stack.models == 2 else [1 / stack.models] * stack.models
        U = stack.tuned(0).mul_(shares[0])
        for t in range(1, stack.models):
            U.add_(self._permuted(stack, t), alpha=shares[t])
        return U.sub_(stack.base())

    def _permuted(self, stack: Stack, t: int) -> Tensor:
        assert self.network is not None, "survey comes first"
        found = self.matchings[t - 1].permutations
        W = stack.tuned(t)
        return torch.stack([self.network.permute(name, W[i], found) for i, name in enumerate(stack.names)])

    def curves(
        self, models: Sequence[Mapping[str, Tensor]], evaluate: Evaluate, points: int = 25
    ) -> dict[str, Connectivity]:
        """Loss and accuracy on the line between the first two models, as they are and after matching.

        Args:
            models: their state dicts.
            evaluate: see `subspace_lab.merging.connectivity`.
            points: of the line, both ends among them.

        Returns:
            naive and matched.

        Raises:
            UserError: the permuted network is another function: the spec does not describe these networks.
        """
        a, b = models[:2]
        self.survey(StateDicts(a, [a, b]))
        assert self.network is not None
        turned = self.network.apply(b, self.matchings[0].permutations)
        naive, matched = connect(a, b, evaluate, points), connect(a, turned, evaluate, points)
        ends = naive.loss[-1], matched.loss[-1]
        if abs(ends[0] - ends[1]) > 1e-3 * max(1.0, abs(ends[0])):
            raise UserError(
                f"permuted as a {self.network.family}, the second network has a loss of {ends[1]:.4g}, "
                f"not {ends[0]:.4g}: its layers are not what their names say",
                hint="normalisation over neighbouring channels cannot be permuted",
            )
        return {"naive": naive, "matched": matched}

    def examine(self, workshop: Workshop, evaluate: Evaluate) -> dict[str, Any]:
        """The lines between the first two models, for results.json."""
        curves = self.curves(workshop.models, evaluate)
        return {"connectivity": {label: curve.record() for label, curve in curves.items()}}

    @override
    def metrics(self) -> dict[str, float]:
        if not self.matchings:
            return {}
        n = len(self.matchings)
        return {
            "weight_matching/sweeps": sum(found.sweeps for found in self.matchings) / n,
            "weight_matching/moved": sum(moved(found.permutations) for found in self.matchings) / n,
            "weight_matching/objective_before": sum(found.objective[0] for found in self.matchings) / n,
            "weight_matching/objective": sum(found.objective[-1] for found in self.matchings) / n,
        }
