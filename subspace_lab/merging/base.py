"""What every way of merging is: a rule from the updates of T models to one update, a stack of tensors at a time.

W0 is the base, W_t (t = 1 … T) a fine-tuned model, D_t = W_t − W0 its task vector (Ilharco et al., ICLR 2023, arXiv
2212.04089), U what the rule makes of them; the merged model is W0 + λ U.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

if TYPE_CHECKING:
    from subspace_lab.merging.sources import Sources
    from subspace_lab.merging.workshop import Workshop

Kind = Literal["matrix", "other"]


class Stack(ABC):
    """b tensors of one shape and one kind, of the base and of T models; each model's are read when they are asked for.

    Values are float32 (float64 where the base is), on the device where the merge is computed.  What is returned may be
    overwritten by the caller, and is read again for the next call: a rule that looks at a model twice keeps it, if it
    can afford to.

    Attributes:
        names: of the b tensors; parts of one that was cut apart have the names `<tensor>#0`, `#1`, ….
        kind: matrix: two dimensions, to be treated as a linear map; other: anything else, by the rule of `merge`.
        shape: of one of them.
        models: T.
        start: of elementwise rules, which get flat pieces of one tensor: the index of the piece's first entry in it.
    """

    names: Sequence[str]
    kind: Kind
    shape: tuple[int, ...]
    models: int
    start: int = 0

    @abstractmethod
    def base(self) -> Tensor:
        """W0 (b, *shape)."""

    @abstractmethod
    def tuned(self, t: int) -> Tensor:
        """W_t (b, *shape), t from 0."""

    def delta(self, t: int) -> Tensor:
        """D_t = W_t − W0 (b, *shape), t from 0."""
        return self.tuned(t).sub_(self.base())

    def deltas(self) -> Iterator[Tensor]:
        """D_0, D_1, …, one at a time."""
        return (self.delta(t) for t in range(self.models))

    def total(self) -> Tensor:
        """Sum of the D_t (b, *shape)."""
        total = self.delta(0)
        for t in range(1, self.models):
            total.add_(self.delta(t))
        return total

    def mean(self) -> Tensor:
        """Mean of the D_t (b, *shape): what most rules for matrices do with everything else."""
        return self.total().div_(self.models)


class Merge(ABC):
    """Base of all merging methods; merged = W0 + `scale` · `update`.

    Order of calls: `learn` (only with `needs_data`), `survey`, `update` for every stack in any order, `factor`.

    Args:
        scale: λ.
    """

    #: protocols that run it
    protocols: ClassVar[tuple[str, ...]] = ("merge",)
    #: whether W0 + λ U is meant for every λ > 0, so that λ can be chosen by validation without computing U again
    scalable: ClassVar[bool] = True
    #: whether D_t matter; otherwise the first model may stand for the base
    needs_base: ClassVar[bool] = True
    #: whether `learn` must be called: the method looks at examples through a model
    needs_data: ClassVar[bool] = False
    #: looks at unlabelled examples of the very part that accuracies are measured on
    transductive: ClassVar[bool] = False
    #: fewest and most models
    least: ClassVar[int] = 1
    most: ClassVar[int | None] = None
    #: entry i of U depends on entry i of W0 and the D_t only (and on its index and tensor): stacks may be flat pieces
    elementwise: ClassVar[bool] = False
    #: `update` may be called by several threads at once (on small stacks, each thread with one of BLAS)
    concurrent: ClassVar[bool] = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def learn(self, workshop: Workshop) -> None:  # noqa: B027 - most methods have nothing to learn
        """Find from examples what `update` needs (coefficients, masks, Fisher information, Gram matrices)."""

    def survey(self, sources: Sources) -> None:  # noqa: B027 - most methods are local
        """Look at all tensors once, streamed, before any is merged (a global threshold); forget an earlier survey."""

    @abstractmethod
    def update(self, stack: Stack) -> Tensor:
        """U (b, *shape), in the stack's dtype and on its device."""

    def factor(self) -> float:
        """What all updates are multiplied by, known only after the last `update` (a global norm); 1 for most rules."""
        return 1.0

    @property
    def has_factor(self) -> bool:
        """Whether `factor` has to be asked: updates are then kept in float32 until it is known."""
        return False

    def metrics(self) -> dict[str, float]:
        """Figures of the merge: ranks, densities, fallbacks; after it."""
        return {}

    def learned(self) -> dict[str, Any]:
        """What `learn` found, for results.json: coefficients, steps, entropies."""
        return {}
