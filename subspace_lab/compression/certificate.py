"""A bound on the error of a network that fits into few bytes, valid whatever was done to find it.

Theorem (PAC-Bayes-kl: Langford & Seeger 2001; Seeger, JMLR 3, 2002; with the constant of Maurer, arXiv cs/0411099,
2004): for a prior P that does not depend on the n i.i.d. training examples, n ≥ 8, with probability at least 1 − δ over
them, simultaneously for all posteriors Q,

    kl( error_train(Q) ‖ error(Q) )  ≤  ( KL(Q‖P) + ln(2 √n / δ) ) / n.

Here Q is one network h, described by `payload` bytes, and P(h) = 2^−bits(h) comes from a prefix-free code: the number
of bytes in Elias' γ code (2 ⌊log2 bytes⌋ + 1 bits), then the bytes; by Kraft's inequality it sums to at most 1. So
KL(Q‖P) = bits·ln 2: Occam's razor. Choosing among k things that the decoder has to be told (seeds, architectures,
decoders) costs ⌈log2 k⌉ bits more. How z was found (learning rate, steps, early stopping, looking at the training
error) costs nothing: the bound holds for all z at once.

It does not hold for weights that start from a checkpoint trained on the same examples, nor for a test distribution
other than that of the training examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Certificate:
    """An upper bound on the error on new examples.

    Attributes:
        bound: the error is at most this, with probability 1 − delta.
        train_error: errors on the training examples / n.
        n: training examples.
        bits: description length: 8·payload + length code + choices.
        delta: probability that the training examples mislead.
    """

    bound: float
    train_error: float
    n: int
    bits: int
    delta: float


def certify(errors: int, n: int, payload: int, *, choices: int = 1, delta: float = 0.05) -> Certificate:
    """Bound the error of a network from its training errors and its description.

    Args:
        errors: wrongly classified training examples.
        n: training examples, at least 8.
        payload: bytes that describe it, at least 1.
        choices: among how many priors (seeds, decoders, …) it was chosen.
        delta: in (0, 1).

    Raises:
        ValueError: a number outside its range.
    """
    if not (n >= 8 and 0 <= errors <= n and payload >= 1 and choices >= 1 and 0 < delta < 1):
        raise ValueError("expected n ≥ 8, 0 ≤ errors ≤ n, payload ≥ 1, choices ≥ 1 and 0 < delta < 1")
    bits = description_bits(payload, choices)
    budget = (bits * math.log(2) + math.log(2 * math.sqrt(n) / delta)) / n
    return Certificate(kl_inverse(errors / n, budget), errors / n, n, bits, delta)


def description_bits(payload: int, choices: int = 1) -> int:
    """Return the bits of a prefix-free description: γ code of the length, the bytes, and which of the choices."""
    return 8 * payload + 2 * (payload.bit_length() - 1) + 1 + (choices - 1).bit_length()


def kl(q: float, p: float) -> float:
    """Return the relative entropy of two coins, q ln(q/p) + (1−q) ln((1−q)/(1−p)), in nats."""
    first = 0.0 if q == 0 else (math.inf if p == 0 else q * math.log(q / p))
    second = 0.0 if q == 1 else (math.inf if p == 1 else (1 - q) * (math.log1p(-q) - math.log1p(-p)))
    return first + second


def kl_inverse(q: float, budget: float) -> float:
    """Return the largest p with kl(q ‖ p) ≤ budget, rounded up by at most 1e-12."""
    low, high = q, 1.0
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if kl(q, middle) <= budget else (low, middle)
    return high
