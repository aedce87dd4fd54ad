"""What two processes do in test_split_steps.py: nets, optimizers, and one function for each kind of case."""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from subspace_lab.analysis.communication import Communication
from subspace_lab.methods.galore import GaLore
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
from subspace_lab.subspaces import SVD, Identity, Random, Randomized, Subspace
from subspace_lab.subspaces.within import Sketched

STEPS, EVERY, RANK = 8, 3, 3
GRID = {
    "svd": lambda: SVD(RANK),
    "svd-right": lambda: SVD(RANK, side="right"),
    "randomized": lambda: Randomized(RANK, power_iterations=2),
    "random": lambda: Random(RANK),
    "identity": Identity,
}
SHARDED = [
    *GRID,
    "svd-rotate",
    "svd-reset",
    "svd-stagger",
    "svd-decay",
    "svd-sgd",
    "svd-bf16",
    "randomized-cold",
]
REPLICATED = ["svd", "svd-rotate", "svd-reset", "svd-stagger", "randomized", "sketched", "random"]


class Net(nn.Module):
    """Tall, wide, square and repeated layers, and one that is not projected; its rows do not divide by two."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.ModuleList(
            [nn.Linear(12, 20), nn.Linear(20, 16), nn.Linear(16, 20), nn.Linear(20, 16), nn.Linear(16, 16, bias=False)]
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.mlp:
            x = torch.tanh(layer(x))
        out: Tensor = self.head(x)
        return out


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype)


def method(case: str) -> GaLore:
    kind, _, variant = case.partition("-")
    subspace: Subspace = GRID.get(case, GRID[kind])()
    if variant == "cold":
        subspace = Randomized(RANK, power_iterations=3, warm_start=False)
    chosen: Any = {"moments": variant} if variant in ("rotate", "reset") else {}
    return GaLore(
        subspace,
        RANK,
        refresh_every=EVERY,
        scale=1.0,
        stagger=variant == "stagger",
        targets=["mlp"],
        **chosen,
    )


def factory(case: str) -> Any:
    if case.endswith("sgd"):
        return partial(SGD, lr=0.05, momentum=0.9)
    return partial(AdamW, lr=0.01, weight_decay=0.1 if case.endswith("decay") else 0.0)


def batch(t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(t)
    return torch.randn(8, 12, generator=generator).to(dtype), torch.randn(8, 5, generator=generator).to(dtype)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, steps: range, dtype: torch.dtype = torch.float32
) -> list[Communication]:
    """Returns what was sent in each optimizer step."""
    sent = []
    for t in steps:
        x, y = batch(t, dtype)
        optimizer.zero_grad()
        (model(x[rows]) - y[rows]).float().square().mean().backward()
        with Communication() as traffic:
            optimizer.step()
        sent.append(traffic)
    return sent


def weights(model: nn.Module) -> dict[str, Tensor]:
    from subspace_lab.optim.shards import whole

    return {name: whole(p.detach()).clone() for name, p in model.named_parameters()}


def dtype_of(case: str) -> torch.dtype:
    return torch.bfloat16 if case.endswith("bf16") else torch.float32


def alone(case: str, steps: range = range(STEPS)) -> tuple[Net, torch.optim.Optimizer]:
    model = net(dtype_of(case))
    optimizer = method(case).build_optimizer(model, factory(case))
    train(model, optimizer, slice(0, 8), steps, dtype_of(case))
    return model, optimizer


# -- what the two processes do -----------------------------------------------------------------------------------


def sharded(case: str, rank: int) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh

    from subspace_lab.training.sharding import shard

    model, how = net(dtype_of(case)), method(case)
    shard(model, init_device_mesh("cpu", (2,)), how.shard_dimensions(model))
    optimizer = how.build_optimizer(model, factory(case))
    sent = train(model, optimizer, slice(4 * rank, 4 * rank + 4), range(STEPS), dtype_of(case))
    assert isinstance(optimizer, SubspaceOptimizer)
    state = copy.deepcopy(optimizer.state_dict())
    # Saved whole, loaded into other shards, and on from there: nothing is lost on the way.
    second = how.build_optimizer(model, factory(case))
    second.load_state_dict(copy.deepcopy(state))
    again = second.state_dict()
    same = all(
        torch.equal(v, again["state"][n][k]) if isinstance(v, Tensor) else v == again["state"][n][k]
        for n, entry in state["state"].items()
        for k, v in entry.items()
    )
    optimizer.measure = True
    train(model, second, slice(4 * rank, 4 * rank + 4), range(STEPS, STEPS + 2), dtype_of(case))
    return {
        "weights": weights(model),
        "state": state,
        "same": same,
        "bytes": optimizer.state_bytes(),
        "kinds": [{k: (v.calls, v.bytes, v.largest) for k, v in step.kinds.items()} for step in sent],
    }


def measured(case: str, rank: int) -> dict[str, Any]:
    """Captured energy of one step, and a step in which one process alone sees a NaN."""
    from torch.distributed.device_mesh import init_device_mesh

    from subspace_lab.training.sharding import shard

    model, how = net(), method("svd")
    shard(model, init_device_mesh("cpu", (2,)), how.shard_dimensions(model))
    optimizer = how.build_optimizer(model, factory("svd"))
    assert isinstance(optimizer, SubspaceOptimizer)
    optimizer.measure = True
    train(model, optimizer, slice(4 * rank, 4 * rank + 4), range(1))
    energy = float(how.metrics()["captured_energy"])
    before = weights(model)
    x, y = batch(1, torch.float32)
    optimizer.zero_grad()
    (model(x) - y).square().mean().backward()
    for name, p in model.named_parameters():
        if name == "mlp.1.weight" and rank == 1:
            p.grad.to_local()[0, 0] = float("nan")  # type: ignore[union-attr]
    optimizer.step()
    return {"energy": energy, "before": before, "after": weights(model)}


def replicated(case: str, rank: int) -> dict[str, Any]:
    model = net()
    optimizer = together(case, model)
    optimizer.share_refreshes()
    chosen: list[int] = []
    for unit in optimizer.units:
        for stack in unit.stacks:
            refresh = stack.subspace.refresh

            def counting(A: Tensor, *more: Any, refresh: Callable[..., Any] = refresh) -> Any:
                chosen.append(len(A))
                return refresh(A, *more)

            stack.subspace.refresh = counting  # type: ignore[method-assign]
    sent = train(model, optimizer, slice(0, 8), range(STEPS))
    return {
        "weights": weights(model),
        "chosen": sum(chosen),
        "refreshes": optimizer.refresh_count,
        "kinds": [{k: (v.calls, v.bytes, v.largest) for k, v in step.kinds.items()} for step in sent],
        "state": {
            n: {k: v for k, v in e.items() if k.startswith("subspace.")}
            for n, e in optimizer.state_dict()["state"].items()
        },
    }


def together(case: str, model: nn.Module) -> SubspaceOptimizer:
    if case != "sketched":
        optimizer = method(case).build_optimizer(model, factory(case))
        assert isinstance(optimizer, SubspaceOptimizer)
        return optimizer
    protected = {"mlp.1.weight": torch.linalg.qr(torch.randn(20, 4, generator=torch.Generator().manual_seed(3)))[0]}
    inside = [(n, p) for n, p in model.named_parameters() if p.ndim == 2 and n.startswith("mlp")]
    group = {"params": inside, "subspace": Sketched(RANK, protected, sketch=5)}
    return SubspaceOptimizer([group], factory(case), refresh_every=EVERY)


CASES: dict[str, tuple[Callable[[str, int], Any], str]] = {
    **{f"sharded {case}": (sharded, case) for case in SHARDED},
    **{f"replicated {case}": (replicated, case) for case in REPLICATED},
    "measured svd": (measured, "svd"),
}


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for name, (run, case) in CASES.items():
        try:
            found[name] = run(case, rank)
        except Exception:
            found[name] = {"error": traceback.format_exc()}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
