"""Weight matching and robust weight signatures in NumPy, as the papers write them (arXiv 2209.04836, 2302.12480)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

Array = NDArray[np.float64]
Spec = Mapping[str, Sequence[str | None]]


def permuted(spec: Spec, P: Mapping[str, NDArray[np.int64]], name: str, W: Array, leave: int | None = None) -> Array:
    """Apply the permutation of every axis but one."""
    for axis, p in enumerate(spec[name]):
        if p is not None and axis != leave:
            W = np.take(W, P[p], axis=axis)
    return W


def objective(spec: Spec, P: Mapping[str, NDArray[np.int64]], a: Mapping[str, Array], b: Mapping[str, Array]) -> float:
    """Sum over tensors of the inner products of W_a and the permuted W_b."""
    return sum(float(np.vdot(a[name], permuted(spec, P, name, b[name]))) for name in spec)


def weight_matching(
    spec: Spec, a: Mapping[str, Array], b: Mapping[str, Array], orders: Iterator[Sequence[int]], sweeps: int = 100
) -> dict[str, NDArray[np.int64]]:
    """Algorithm 1 with one permutation matrix at a time; `orders` gives the order of each sweep."""
    sizes: dict[str, int] = {}
    for name, axes in spec.items():
        for axis, p in enumerate(axes):
            if p is not None:
                sizes[p] = a[name].shape[axis]
    P = {p: np.arange(n) for p, n in sizes.items()}
    names = list(sizes)
    for _ in range(sweeps):
        progress = False
        for index in next(orders):
            p, n = names[index], sizes[names[index]]
            A = np.zeros((n, n))
            for name, axes in spec.items():
                for axis, q in enumerate(axes):
                    if p == q:
                        w_a = np.moveaxis(a[name], axis, 0).reshape(n, -1)
                        w_b = np.moveaxis(permuted(spec, P, name, b[name], axis), axis, 0).reshape(n, -1)
                        A += w_a @ w_b.T
            rows, columns = linear_sum_assignment(A, maximize=True)
            assert (rows == np.arange(n)).all()
            old, new = np.vdot(A, np.eye(n)[P[p]]), np.vdot(A, np.eye(n)[columns])
            progress = progress or new > old + 1e-12
            P[p] = columns
        if not progress:
            break
    return P


def robust_weight_signature(pretrained: Array, clean: Array, robust: Array) -> Array:
    """What is left of W_robust − W_pre after projection onto W_clean − W_pre, by the projection matrix."""
    a, d = (clean - pretrained).reshape(-1, 1), (robust - pretrained).reshape(-1, 1)
    projection = a @ a.T / (a.T @ a)
    return (d - projection @ d).reshape(pretrained.shape)


def patched(pretrained: Array, clean: Array, robust: Sequence[Array], strengths: Sequence[float]) -> Array:
    """W_clean + Σ α_i RWS_i."""
    return clean + sum(
        s * robust_weight_signature(pretrained, clean, W) for s, W in zip(strengths, robust, strict=True)
    )


def released(pretrained: Array, clean: Array, robust: Sequence[Array], alpha: float) -> Array:
    """The release's `decompose`: weights α/n before the projection and again in the sum."""
    weight = np.full(len(robust), alpha / len(robust))
    a = (clean - pretrained).reshape(1, -1)
    param = np.stack([((W - pretrained) * w).reshape(-1) for W, w in zip(robust, weight, strict=True)])
    vectors = param - (a.T @ a / (a @ a.T) @ param.T).T
    total: Array = (np.diag(weight) @ vectors).sum(0).reshape(pretrained.shape) + clean
    return total


def levels(x: Array, count: int) -> Array:
    """Values rounded to `count` evenly spaced ones between the smallest and the largest."""
    low, high = x.min(), x.max()
    return np.round((x - low) / (high - low) * (count - 1)) / (count - 1) * (high - low) + low


def quantised(x: Array, bits: int, scheme: str) -> Array:
    """A signature without zeros as it is stored."""
    if scheme == "linear":
        return levels(x, 2**bits)
    if scheme == "tanh":
        return np.arctanh(levels(np.tanh(x), 2**bits))
    return np.sign(x) * np.exp2(levels(np.log2(np.abs(x)), 2**bits >> 1))
