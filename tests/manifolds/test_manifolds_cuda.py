from __future__ import annotations

import pytest
import torch

from subspace_lab.manifolds import Grassmann, Manifold, Retraction, Sphere, Stiefel

MANIFOLDS: dict[str, Manifold] = {"grassmann": Grassmann(), "stiefel": Stiefel(), "sphere": Sphere()}


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MANIFOLDS)
@pytest.mark.parametrize("method", ["polar", "qr"])
def test_cuda_steps_do_not_synchronise_and_survive_tf32(name: str, method: Retraction) -> None:
    manifold = MANIFOLDS[name]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        S = manifold.random((8, 64, 8), 0, device="cuda")
        G = torch.randn(8, 64, 8, device="cuda") * 0.05
        S = manifold.retract(S, manifold.tangent(S, G), method)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(20):
            V = manifold.tangent(S, G)
            S_new = manifold.retract(S, V, method)
            V = manifold.transport(S, V, S_new)
            S = S_new
        residual = manifold.check(S)
        torch.cuda.set_sync_debug_mode("default")
        assert float(residual.max()) <= 2e-6
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_float32_matmul_precision(before)
