from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from subspace_lab import linalg

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def tf32() -> Iterator[None]:
    """The setting most training runs use, and the one that would ruin a basis."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


def orthogonality(P: Tensor) -> float:
    P = P.double()
    return float((P.mT @ P - torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)).abs().max())


def test_everything_meant_for_the_step_path_never_synchronises() -> None:
    A = torch.randn(4, 96, 64, device="cuda")
    P = linalg.orthonormalize(torch.randn(4, 64, 16, device="cuda"))
    keys = torch.arange(4, device="cuda")

    def work() -> list[Tensor]:
        Z = linalg.project_span(A.bfloat16(), P)
        new, s = linalg.subspace_iteration(A, P, iterations=2, rayleigh_ritz=False)
        return [
            Z,
            linalg.lift_span(Z, P),
            linalg.project_complement(A, P, twice=True),
            linalg.extend_basis(P, A.mT[..., :8]),
            linalg.energy_rank(s, 0.9),
            new,
            linalg.align_signs(new, P),
            linalg.captured_energy(A, new),
            linalg.overlap(P, new),
            linalg.orthonormalize(torch.zeros_like(A)),
            linalg.rademacher((5, 7), key=keys, offset=3),
            linalg.uniform((5, 7), key=9, device="cuda"),
        ]

    work()  # libraries may synchronise when they load
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_generator_is_identical_to_the_cpu() -> None:
    for key in (0, 2**40 + 3, torch.tensor([1, -5])):
        cuda_key = key.cuda() if isinstance(key, Tensor) else key
        for stream in (linalg.rademacher, linalg.uniform):
            there = stream((33, 65), key=cuda_key, offset=2**33 + 7, device="cuda")
            assert torch.equal(there.cpu(), stream((33, 65), key=key, offset=2**33 + 7))


def test_bases_are_orthonormal_under_tf32_and_agree_with_the_cpu() -> None:
    g = torch.Generator().manual_seed(0)
    spectrum = torch.logspace(0, -8, 64)
    left, right = (linalg.orthonormalize(torch.randn(3, n, 64, generator=g)) for n in (128, 64))
    A = (left * spectrum) @ right.mT
    start = linalg.orthonormalize(torch.randn(3, 64, 16, generator=g))
    routes: list[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = [
        lambda A, P: linalg.truncated_svd(A, 16),
        lambda A, P: linalg.gram_eigh(A, 16),
        lambda A, P: linalg.randomized_svd(A, 16, key=1),
        lambda A, P: linalg.subspace_iteration(A, P, iterations=2),
    ]
    for route in routes:
        there, here = route(A.cuda(), start.cuda())[0], route(A, start)[0]
        assert orthogonality(there) <= 1e-5
        energy = linalg.captured_energy(A, there.cpu())
        torch.testing.assert_close(energy, linalg.captured_energy(A, here), atol=1e-4, rtol=0)
