"""FusionBench's side of `bench_merging.py`, which starts it with an interpreter that has fusion-bench: how many layers?

Prints the names of the merges it can do, then, for every name on standard input, the seconds of that merge.
"""

from __future__ import annotations

import contextlib
import io
import sys
import time
from collections.abc import Callable

import torch
from bench_merging import State, experts
from torch import Tensor


def theirs(base: State, models: list[State]) -> dict[str, Callable[[], object]]:
    """FusionBench's functions as its algorithms call them; those whose module cannot be imported are left out."""
    from fusion_bench.utils.state_dict_arithmetic import state_dict_add, state_dict_mul, state_dict_sub

    found: dict[str, Callable[[], object]] = {}

    def added(vector: State) -> State:
        return state_dict_add(base, vector)

    def vectors() -> list[State]:
        return [state_dict_sub(W, base) for W in models]

    def task_arithmetic() -> State:
        total: State | None = None
        for W in models:
            D = state_dict_sub(W, base)
            total = D if total is None else state_dict_add(total, D)
        assert total is not None
        return added(state_dict_mul(total, 0.3))

    found["task_arithmetic"] = task_arithmetic
    with contextlib.suppress(ImportError):
        from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts

        found["iso_c"] = lambda: added(iso_c(vectors(), accelerator="cpu"))
        found["iso_cts"] = lambda: added(iso_cts(vectors(), 0.8, accelerator="cpu"))
    with contextlib.suppress(ImportError):
        from fusion_bench.method.task_singular_vector.utils import TSVM_utils

        found["tsv_merge"] = lambda: added(TSVM_utils.compute_and_sum_svd_mem_reduction(vectors(), accelerator="cpu"))
    with contextlib.suppress(ImportError):
        from fusion_bench.method.ties_merging.ties_merging_utils import (
            state_dict_to_vector,
            ties_merging,
            vector_to_state_dict,
        )

        def ties() -> State:
            flat = torch.vstack([state_dict_to_vector(W, []) for W in models])
            start = state_dict_to_vector(base, [])
            merged = ties_merging(flat - start, reset_thresh=20, merge_func="sum")
            return dict(vector_to_state_dict(start + 0.3 * merged, base, remove_keys=[]))

        found["ties"] = ties
    with contextlib.suppress(ImportError):
        from fusion_bench.method.opcm.opcm import OPCMForCLIP

        found["opcm"] = lambda: _their_opcm(OPCMForCLIP, base, models)
    return found


def _their_opcm(algorithm: type, base: State, models: list[State]) -> State:
    """What `OPCMForCLIP.run` does to tensors, with its two merging functions."""
    from fusion_bench.utils.parameters import state_dict_to_vector
    from fusion_bench.utils.state_dict_arithmetic import state_dict_sub

    def norm(W: State) -> Tensor:
        return torch.linalg.norm(state_dict_to_vector(state_dict_sub(W, base)))

    self = object.__new__(algorithm)
    self.previous_lambda_t = 1  # type: ignore[attr-defined]
    merged, norms = dict(models[0]), [norm(models[0])]
    for W in models[1:]:
        norms.append(norm(W))
        mean = sum(norms) / len(norms)
        self.lambda_t = 1  # type: ignore[attr-defined]
        for name, value in merged.items():
            if name.startswith("encoder") and value.dim() == 2:
                merged[name] = self.merge_linear_weights(value, base[name], W[name], name, alpha=0.5)  # type: ignore[attr-defined]
            else:
                merged[name] = self.merge_other_parameters(value, base[name], W[name], name)  # type: ignore[attr-defined]
        length = norm(merged)
        self.previous_lambda_t = length / mean  # type: ignore[attr-defined]
        merged = {name: base[name] + (value - base[name]) * (mean / length) for name, value in merged.items()}
    return merged


def serve(layers: int) -> None:
    """FusionBench's side: one name a line from standard input, its seconds to standard output."""
    answers = sys.stdout
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
        functions = theirs(*experts(layers))
        print(*functions, file=answers, flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            functions[line.strip()]()
            print(time.perf_counter() - start, file=answers, flush=True)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
