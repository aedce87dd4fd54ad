from __future__ import annotations

import torch

from subspace_lab import linalg


def test_step_path_never_reads_a_value_back() -> None:
    """Meta tensors have no values: anything that would synchronise on an accelerator raises here."""
    A = torch.empty(4, 96, 64, device="meta")
    P = linalg.orthonormalize(torch.empty(4, 64, 16, device="meta"))
    keys = torch.empty(4, device="meta", dtype=torch.int64)
    Z = linalg.project_span(A.bfloat16(), P)
    assert linalg.lift_span(Z, P).shape == A.shape
    assert linalg.project_complement(A, P, twice=True).shape == A.shape
    assert linalg.extend_basis(P, A.mT[..., :8]).shape == (4, 64, 24)
    new, s = linalg.subspace_iteration(A, P, rayleigh_ritz=False)
    assert linalg.align_signs(new, P).shape == P.shape
    assert linalg.energy_rank(s, 0.9).shape == (4,)
    assert linalg.captured_energy(A, new).shape == (4,)
    assert linalg.overlap(P, new).shape == (4,)
    assert linalg.rademacher((5, 7), key=keys, offset=3).shape == (4, 5, 7)
    assert linalg.uniform((5, 7), key=9, device="meta").device.type == "meta"
