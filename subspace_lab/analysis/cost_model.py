"""Memory and communication of AdamW and GaLore on w processes, in closed form (docs/scale.md).

Per weight of m × n entries of b bytes; a projected one has a basis of its side q and coordinates of p rows. A ring
all-reduce of S bytes has every process send 2 (w − 1)/w · S, an all-gather or a reduce-scatter (w − 1)/w · S.

                      DDP                                FSDP2
    weights           Σ b m n                            1/w of it
    gradients         Σ b m n                            1/w of it
    AdamW's state     2 Σ b m n                          1/w of it
    GaLore's state    Σ (8 p r + 4 q r)                  1/w of it
    sent per step     all-reduce Σ b m n                 2 all-gathers of blocks, 1 of the root, 1 reduce-scatter of all
      and GaLore's    nothing                            2 all-gathers of the bases, Σ 4 q r
    per refresh       broadcast Σ 4 q r                  all-reduce Σ (20 q k + 48 k² + 8),  k = min(r + 16, q), and an
                                                         all-gather of the bases
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from subspace_lab.subspaces.span import SPLIT_ITERATIONS, SPLIT_OVERSAMPLE

Strategy = Literal["ddp", "fsdp"]


@dataclass(frozen=True)
class Weight:
    """One parameter.

    Attributes:
        rows: m.
        columns: n; 0 for a vector of m entries.
        block: number of the block that FSDP2 gathers it with, None for the root.
        projected: GaLore keeps its moments in a subspace of the shorter side.
    """

    rows: int
    columns: int
    block: int | None
    projected: bool

    @property
    def entries(self) -> int:
        """M n."""
        return self.rows * max(self.columns, 1)


@dataclass(frozen=True)
class Costs:
    """Bytes of one process.

    Attributes:
        weights: its part of the parameters.
        gradients: its part of the gradients.
        state: moments and bases.
        gathered: whole parameters that FSDP2 has at a time: the root's, a block's and the next block's.
        sent: for one micro-batch and one step.
        sent_refresh: more in a step that refreshes all bases.
    """

    weights: float
    gradients: float
    state: float
    gathered: float
    sent: float
    sent_refresh: float

    @property
    def total(self) -> float:
        """Memory without activations."""
        return self.weights + self.gradients + self.state + self.gathered


def llama_weights(
    hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int | None, vocabulary: int
) -> list[Weight]:
    """The weights of a LLaMA with untied embeddings, projected where GaLore's `targets` say (attention, MLP)."""
    kv = hidden * (kv_heads or heads) // heads
    weights = [Weight(vocabulary, hidden, None, False)] * 2 + [Weight(hidden, 0, None, False)]
    for block in range(layers):
        shapes = [(hidden, hidden)] * 2 + [(kv, hidden)] * 2 + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]
        weights += [Weight(m, n, block, True) for m, n in shapes]
        weights += [Weight(hidden, 0, block, False)] * 2
    return weights


def costs(weights: Iterable[Weight], *, processes: int, strategy: Strategy, width: int, rank: int | None) -> Costs:
    """Return what one process holds and sends.

    Args:
        weights: of the model.
        processes: w.
        strategy: ddp or fsdp.
        width: b, bytes of an entry of weights, gradients and AdamW's moments.
        rank: r of GaLore (with exact bases under DDP, iterated ones under FSDP2); None is AdamW on everything.
    """
    weights = list(weights)
    w, ring = processes, (processes - 1) / processes
    part = w if strategy == "fsdp" else 1
    whole = float(sum(x.entries for x in weights) * width)
    state = refresh = steps = 0.0
    for x in weights:
        if rank is None or not x.projected:
            state += 2 * width * x.entries / part
            continue
        p, q = max(x.rows, x.columns), min(x.rows, x.columns)
        if strategy == "fsdp" and x.columns > x.rows and x.columns % w:
            p, q = q, p  # FSDP2 cuts columns into equal parts only: see training/sharding.py
        r = min(rank, q)
        if strategy == "ddp":
            state += 8 * p * r + 4 * q * r
            refresh += ring * 4 * q * r
        else:
            basis = 4 * -(-q // w) * r  # one process's part, padded
            state += 8 * p * r / w + basis
            refresh += 2 * ring * _iterated(q, r) + ring * w * basis
            steps += 2 * ring * w * basis + 2 * ring * 4  # and whether the gradient is finite
    if strategy == "ddp":
        return Costs(whole, whole, state, 0.0, 2 * ring * whole, refresh)
    root = float(sum(x.entries for x in weights if x.block is None) * width)
    blocks: dict[int, float] = {}
    for x in weights:
        if x.block is not None:
            blocks[x.block] = blocks.get(x.block, 0.0) + x.entries * width
    return Costs(
        weights=whole / w,
        gradients=whole / w,
        state=state,
        gathered=root + sum(sorted(blocks.values())[-2:]),
        sent=ring * (2 * sum(blocks.values()) + root + whole) + steps,
        sent_refresh=refresh,
    )


def _iterated(q: int, r: int) -> float:
    """Bytes that a refresh of `randomized_svd` on split rows adds up: factors AᵀQ (q, k) and Grams (k, k)."""
    k = min(r + SPLIT_OVERSAMPLE, q)
    products = SPLIT_ITERATIONS + 1
    grams = SPLIT_ITERATIONS + 2  # one for each iteration, two at the end
    return products * 4 * q * k + grams * 8 * k * k + 2 * 4
