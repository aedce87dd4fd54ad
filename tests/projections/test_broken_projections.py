"""The checks of the contract turn away the defects found in public implementations (and let the sound ones pass)."""

from __future__ import annotations

import torch
from contracts.projections import adjoint_error, column_error, energy_ratios, gradient_error, isometry_error
from torch import Tensor

from subspace_lab.projections import apply, create

TENSORS = (4000, 90, 6)
D, d = sum(TENSORS), 16
SOUND = create("orthoblock", D=D, d=d, seed=0)


def per_tensor() -> Tensor:
    """One fastfood per tensor, columns of length one in each (Aghajanyan et al.'s code and its copies)."""
    parts = []
    for i, size in enumerate(TENSORS):
        wide = create("fastfood", D=max(size, d), d=d, seed=i).matrix()
        parts.append(wide[:size] / wide[:size].norm(dim=0))
    return torch.cat(parts)


def test_columns_of_variance_one_over_d() -> None:
    """Entries N(0, 1/d) instead of N(0, 1/D): the learning rate silently changes by D/d."""
    P = SOUND.matrix()
    Q = P * (D / d) ** 0.5
    assert column_error(Q) > 10 and isometry_error(lambda x: Q @ x, d) > 10
    assert column_error(P) <= 0.01 and isometry_error(lambda x: P @ x, d) <= 3 / (2 * D) ** 0.5


def test_unnormalised_columns() -> None:
    P = create("gaussian", D=D, d=d, seed=0)._entries(0, D, torch.float64, torch.device("cpu"))
    assert column_error(P) > 1


def test_normalisation_within_each_tensor() -> None:
    P = per_tensor()
    assert 0.7 < column_error(P) < 0.8  # sqrt(3) of length instead of one
    ratios = energy_ratios(P, TENSORS)
    assert ratios[2] > 100 * ratios[0]
    sound = energy_ratios(SOUND.matrix(), TENSORS)
    assert (sound - 1).abs().max() <= 5 * (2 / (d * TENSORS[2])) ** 0.5


class Shrunk(torch.autograd.Function):
    """The transform's backward multiplied by 1/sqrt(N), its forward not."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return SOUND.lift(z)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return SOUND.project(g) / SOUND.n**0.5


class ShrunkPerTensor(torch.autograd.Function):
    """The same with one transform for each tensor: small tensors pull harder, the direction is wrong as well."""

    @staticmethod
    def forward(ctx, z: Tensor) -> Tensor:
        return SOUND.lift(z)

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:
        return SOUND.project(torch.cat([part / len(part) for part in g.split(TENSORS)]))


def test_a_wrong_adjoint() -> None:
    assert gradient_error(lambda z: apply(SOUND, z), D, d, TENSORS) <= 1e-7
    assert gradient_error(Shrunk.apply, D, d, TENSORS) > 0.5
    assert gradient_error(ShrunkPerTensor.apply, D, d, TENSORS) > 0.5
    assert adjoint_error(SOUND.lift, lambda y: SOUND.project(y) / SOUND.n**0.5, D, d, torch.float64) > 1e-3
    assert adjoint_error(SOUND.lift, SOUND.project, D, d, torch.float64) <= 1e-12


def test_dropped_coordinates() -> None:
    """A tensor smaller than d: padding by a negative width drops z[N:], and those coordinates move nothing there."""
    P = per_tensor()[-TENSORS[2] :].clone()
    P[:, TENSORS[2] :] = 0
    assert column_error(torch.cat([SOUND.matrix()[: -TENSORS[2]], P])) > 0.1
