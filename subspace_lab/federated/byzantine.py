"""What clients who are out of order, or against the others, send in place of their update.

sign_flip   −10 times its own update: Garfield's and the Flag Aggregator's "reverse"
random      a gradient of independent entries from [0, 1), the "random" of the same release and what its figures were
            made with; as an update −η times that
omniscient  an update that turns the mean of all p into the opposite of the honest ones' mean h,
            x = −(2 p − f) / f · h: Blanchard et al., "Machine Learning with Adversaries: Byzantine Tolerant Gradient
            Descent", NeurIPS 2017, arXiv 1703.02757, Lemma 1 (whoever knows the others moves a linear rule anywhere)
            and section 5 (the omniscient attack: the opposite of the gradient, long)

Simulated on the server, where the updates have arrived and before they are aggregated: the same with every engine.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from subspace_lab.linalg.random import derive_key, uniform

Attack = Literal["sign_flip", "random", "omniscient"]
_REVERSE = -10.0
_BLOCK = 1 << 20  # random numbers are made from 64-bit words: not all of them at once


def attack(kind: Attack, updates: Tensor, honest: Tensor, seed: int, lr: float = 1.0) -> Tensor:
    """Replace rows of the updates, in place.

    Args:
        kind: which attack.
        updates: w_c − w (p, n), floating point.
        honest: (p,) bool; all other rows are replaced.
        seed: of the round; of `random`.
        lr: η, the clients' learning rate; of `random`.

    Returns:
        `updates`. Without an honest row there is nothing to know for `omniscient`, and the rows stay.
    """
    rows = (~honest).nonzero().flatten().tolist()
    p, f = len(updates), len(rows)
    if kind == "sign_flip":
        for row in rows:
            updates[row] *= _REVERSE
    elif kind == "random":
        for row in rows:
            key = derive_key(seed, "byzantine", row)
            for offset in range(0, updates.shape[1], _BLOCK):
                block = updates[row, offset : offset + _BLOCK]
                block.copy_(uniform(block.shape, key=key, offset=offset, device=block.device)).mul_(-lr)
    elif 0 < f < p:
        updates[~honest] = honest.to(updates.dtype) @ updates * (-(2 * p - f) / (f * (p - f)))
    return updates
