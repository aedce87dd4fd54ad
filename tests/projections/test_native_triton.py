"""The Triton kernels: their logic in Triton's interpreter, their code for an absent GPU, and on a present one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from subspace_lab.projections import create

triton = pytest.importorskip("triton")

INTERPRETED = """
import torch
from subspace_lab.projections.native import check, gpu

keys, c = (2**62 + 5, 7, 11), 95 / 256
for n, d, rows in ((64, 50, (10, 300)), (1024, 750, (0, 3000)), (8192, 5000, (7, 20000))):
    gpu.GROUP = 2 * n
    z, g = gpu._wave(d, None), gpu._wave(rows[1] - rows[0], None)
    for base in (None, g):
        up = torch.empty_like(g)
        gpu.lift(z, base, up, n, keys, c, rows)
        assert check.same_bits(up, check.lift(z, base, rows[1], n, keys, c, rows)), n
    down, wanted = torch.empty_like(z), check.project(g, d, rows[1], n, keys, c, rows)
    gpu.project(g, down, n, keys, c, rows)
    assert (down - wanted).abs().max() <= 1e-6 * wanted.abs().max(), n
    assert n > 64 or gpu._trusted(torch.device("cpu"), n)
"""

COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from subspace_lab.projections.native import triton_kernels as k

names = [p.name for p in k.butterflies.params]
for read, write, base, low, steps, columns in (
    (k.FROM_Z, k.PLAIN, False, 0, 12, 0), (k.GATHER, k.TO_ROWS, True, 0, 10, 0), (k.PLAIN, k.TO_ROWS, True, 12, 5, 7),
    (k.FROM_ROWS, k.SIGNED, False, 0, 6, 0), (k.GATHER_BACK, k.SIGNED, False, 0, 12, 0),
):
    bits = 17 if steps in (5, 12) else steps
    constants = dict(BITS=bits, LOW=low, STEPS=steps, COLUMNS=columns, HAS_BASE=base)
    constants |= dict(READ=read.value, WRITE=write.value)
    types = dict.fromkeys(names, "i32") | dict.fromkeys(("source", "target", "base"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("start", "stop"), "i64") | dict.fromkeys(constants, "constexpr")
    source = ASTSource(k.butterflies, types, constexprs={(names.index(n),): v for n, v in constants.items()})
    made = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": False})
    assert "fma.rn.f32" not in made.asm["ptx"], "rounds once where the definition rounds twice"
"""


def run(program: str, tmp_path, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_logic_in_the_interpreter(tmp_path):
    run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")


@pytest.mark.slow
def test_compiles_for_a_gpu_without_contraction(tmp_path):
    run(COMPILED, tmp_path)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("D", "d"), [(5000, 60), (199_210, 750), (10**6, 10**4), (10**6, 10**5)])
def test_same_bits_as_on_the_cpu(D, d):
    from subspace_lab.projections.native import gpu

    z, base = torch.randn(d), torch.randn(D)
    P = create("orthoblock", D=D, d=d, seed=1)
    wanted, projected = P.lift(z, base=base), P.project(base)
    made = P.lift(z.cuda(), base=base.cuda())
    assert gpu._trusted(made.device, P.n), "the kernels were used, not the torch form"
    assert torch.equal(made.cpu(), wanted)
    assert torch.equal(P.lift(z.cuda(), base=base[77:4000].cuda(), rows=(77, 4000)).cpu(), wanted[77:4000])
    first, again = P.project(base.cuda()), P.project(base.cuda())
    assert torch.equal(first, again)
    torch.testing.assert_close(first.cpu(), projected, rtol=0, atol=1e-5 * float(projected.abs().max()))
