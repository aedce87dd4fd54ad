"""What happens to the moments when the basis under them changes."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.optim import Optimizer

from subspace_lab.optim.stack import Stack
from subspace_lab.optim.traits import FIRST_MOMENTS, SECOND_MOMENTS
from subspace_lab.subspaces.base import Members

Moments = Literal["keep", "rotate", "reset"]


def carry_over(inner: Optimizer, stack: Stack, members: Members, change: Tensor | None, policy: Moments) -> None:
    """Carry moments of `members` into the new basis.

    ``keep``    leaves the numbers as they are, now read in the new basis (GaLore).
    ``rotate``  M <- M R, V <- V (R ∘ R) with R = P_oldᵀ P_new (b, r, r): the momentum's part inside the common
                subspace is kept exactly, V stays non-negative, and R = I changes nothing.
    ``reset``   starts them again from zero, bias correction included.

    Raises:
        ValueError: the optimizer keeps moments in a form that cannot be rotated (factored, quantised).
    """
    if policy == "keep" or stack.subspace.full_size:  # no basis, nothing that could have changed under them
        return
    where = list(range(stack.B))[members] if isinstance(members, slice) else members
    if policy == "reset":
        _reset(inner, stack, where)
    elif change is None:
        raise ValueError("moments=rotate needs the change of basis")
    elif stack.stacked:
        _rotate(inner, stack.coords[0], members, change)
    else:
        for row, i in enumerate(where):
            _rotate(inner, stack.coords[i], None, change[row])


def _reset(inner: Optimizer, stack: Stack, where: list[int]) -> None:
    if not stack.stacked:
        for i in where:
            inner.state.pop(stack.coords[i], None)
        return
    # Single members of a stack share its step counter: theirs goes on (late first bases; see `Stack.due`).
    for value in inner.state.get(stack.coords[0], {}).values():
        if isinstance(value, Tensor) and value.ndim:
            value[where] = 0


def forget(inner: Optimizer, stack: Stack) -> None:
    """Start all moments of a stack again, step counters included."""
    for param in stack.coords:
        inner.state.pop(param, None)


def _rotate(inner: Optimizer, param: Tensor, members: Members | None, R: Tensor) -> None:
    state = inner.state.get(param)
    if not state:
        return
    known = FIRST_MOMENTS + SECOND_MOMENTS
    strange = [k for k, v in state.items() if isinstance(v, Tensor) and v.ndim and k not in known]
    if strange or not any(k in known for k in state):
        raise ValueError(
            f"moments=rotate cannot rotate the state {strange or sorted(state)} of {type(inner).__name__}; "
            "use moments=keep or moments=reset"
        )
    for key in known:
        M = state.get(key)
        if isinstance(M, Tensor):
            turn = R if key in FIRST_MOMENTS else R.square()
            if members is None:
                M.copy_(M @ turn)
            else:
                M[members] = M[members] @ turn
