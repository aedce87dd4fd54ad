"""Two processes over gloo, started once: refreshes that are divided, and weights that are sharded (FSDP2).

What they do together is compared with what one process does alone; every item of this file reports one case of them.
"""

from __future__ import annotations

import copy
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, AdamW

from subspace_lab.analysis.communication import Communication
from subspace_lab.methods.galore import GaLore
from subspace_lab.optim.refreshing import divide
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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    folder = tmp_path_factory.mktemp("pair")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")  # where the host's name leads nowhere
        mp.spawn(process, args=(str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    both = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]
    return {name: [found[name] for found in both] for name in CASES}


def outcome(pair: dict[str, list[Any]], name: str) -> list[Any]:
    for found in pair[name]:
        assert "error" not in found, found["error"]
    return pair[name]


# -- sharded -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHARDED)
def test_shards_step_as_the_whole(pair: dict[str, list[Any]], case: str) -> None:
    found = outcome(pair, f"sharded {case}")
    assert all(torch.equal(found[0]["weights"][n], found[1]["weights"][n]) for n in found[0]["weights"])
    model, _ = alone(case, range(STEPS + 2))
    # AdamW's first steps have the size of the learning rate whatever the gradient's, so an error in a direction that
    # was nearly zero shows; iterated bases add a little to rounding.
    tolerance = 0.04 if case.endswith("bf16") else 2e-4
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[0]["weights"][name], p.detach(), rtol=0, atol=tolerance, msg=f"{case} {name}")
    start = net(dtype_of(case))
    moved = max(
        float((p - q).detach().abs().max()) for p, q in zip(model.parameters(), start.parameters(), strict=True)
    )
    assert moved > 0.03, "the comparison would not notice a step that is left out"


@pytest.mark.parametrize("case", SHARDED)
def test_saved_state_is_that_of_one_process(pair: dict[str, list[Any]], case: str) -> None:
    first, second = outcome(pair, f"sharded {case}")
    assert first["same"] and second["same"], "loading a saved state and saving it again changes it"
    _, optimizer = alone(case)
    assert isinstance(optimizer, SubspaceOptimizer)
    mine = optimizer.state_dict()["state"]
    assert first["state"]["state"].keys() == mine.keys()
    for name, entry in mine.items():
        theirs = first["state"]["state"][name]
        assert {k: getattr(v, "shape", None) for k, v in theirs.items()} == {
            k: getattr(v, "shape", None) for k, v in entry.items()
        }
    optimizer.load_state_dict(first["state"])  # one process goes on from what two have saved


@pytest.mark.parametrize("case", ["svd", "svd-right", "randomized", "random", "identity"])
def test_optimizer_sends_factors_and_no_gradient(pair: dict[str, list[Any]], case: str) -> None:
    kinds = outcome(pair, f"sharded {case}")[0]["kinds"]
    matrices = [p for n, p in net().named_parameters() if p.ndim == 2 and n.startswith("mlp")]
    sides = [p.shape[1] if case == "svd-right" else min(p.shape) for p in matrices]
    bases = 0 if case == "identity" else sum(4 * 2 * -(-q // 2) * RANK for q in sides)
    for t, step in enumerate(kinds):
        assert set(step) <= {"all_reduce", "all_gather"}, f"step {t}: {step}"
        _, reduced, _ = step["all_reduce"]
        _, gathered, _ = step.get("all_gather", (0, 0, 0))
        refreshes = t % EVERY == 0
        # Bases are gathered to project and to lift, and once more to be improved on; what is left is accounted for too.
        old = 1 if refreshes and case in ("svd", "svd-right", "randomized") else 0
        assert gathered == (2 + old) * bases, f"step {t}"
        flags = 4 * len(matrices)  # whether all parts of each gradient are finite
        if not refreshes or case in ("random", "identity"):
            assert reduced == flags, f"step {t}"
        elif case.startswith("svd"):
            # The largest entry twice, AᵀQ (q, k) five times, float64 Grams (k, k) six times: no (p, q), no (q, q).
            ks = [min(RANK + 16, q) for q in sides]
            factors = sum(2 * 4 + 5 * 4 * q * k + 6 * 8 * k * k for q, k in zip(sides, ks, strict=True))
            assert reduced == flags + factors, f"step {t}"
        elif t:
            # Of two warm iterations each: a scale, a Gram (r, r), lengths, and Aᵀ(A P) (q, r).
            factors = sum(4 + 2 * 4 * (1 + RANK * RANK + RANK + q * RANK) for q in sides)
            assert reduced == flags + factors, f"step {t}"


def test_optimizer_state_is_halved(pair: dict[str, list[Any]]) -> None:
    found = outcome(pair, "sharded svd")
    _, optimizer = alone("svd")
    assert isinstance(optimizer, SubspaceOptimizer)
    whole = optimizer.state_bytes()
    # Counters of steps and of readiness are on both; nothing else is.
    assert whole <= sum(f["bytes"] for f in found) <= whole + 4 * 40
    assert abs(found[0]["bytes"] - found[1]["bytes"]) < 0.1 * whole


def test_energy_and_bad_gradients_are_of_all_parts(pair: dict[str, list[Any]]) -> None:
    first, second = outcome(pair, "measured svd")
    model, how = net(), method("svd")
    optimizer = how.build_optimizer(model, factory("svd"))
    assert isinstance(optimizer, SubspaceOptimizer)
    optimizer.measure = True
    train(model, optimizer, slice(0, 8), range(1))
    assert first["energy"] == second["energy"] == pytest.approx(float(how.metrics()["captured_energy"]), rel=1e-4)
    moved = {n: not torch.equal(first["before"][n], first["after"][n]) for n in first["before"]}
    # A NaN in one process's part: the whole matrix takes a zero gradient (momentum still moves it, evenly on both).
    assert all(torch.isfinite(w).all() for w in first["after"].values())
    assert moved["mlp.0.weight"] and moved["mlp.2.weight"]
    for name in first["after"]:
        assert torch.equal(first["after"][name], second["after"][name])


def test_what_cannot_be_sharded_is_said_in_one_line(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh

    from subspace_lab.training.sharding import shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = net()
        shard(model, init_device_mesh("cpu", (1,)))
        params = [("mlp.2.weight", model.mlp[2].weight)]
        with pytest.raises(ValueError, match="one entry at a time"):
            SubspaceOptimizer([{"params": params, "subspace": SVD(2)}], partial(Adafactor, lr=0.1))
        with pytest.raises(ValueError, match="Sketched needs whole weights"):
            SubspaceOptimizer([{"params": params, "subspace": Sketched(2, {}, sketch=2)}], partial(AdamW, lr=0.1))
    finally:
        dist.destroy_process_group()


def test_bases_are_of_the_side_that_is_whole() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from subspace_lab.training.sharding import shard

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)  # type: ignore[no-untyped-call]
    try:
        model, how = net(), method("svd")
        model.mlp[1] = nn.Linear(18, 16)
        with pytest.warns(UserWarning, match=r"1 weights such as mlp.3.weight \(16, 20\) do not divide by 3 processes"):
            shard(model, init_device_mesh("cpu", (3,)), how.shard_dimensions(model))
        optimizer = how.build_optimizer(model, factory("svd"))
        assert isinstance(optimizer, SubspaceOptimizer)
        # (16, 20) is cut into rows of 6, 6, 4 with a basis of the 20; (16, 18) into columns of 6 with one of the 16.
        assert optimizer.directions("mlp.3.weight")["basis"].shape == (20, RANK)
        assert optimizer.directions("mlp.1.weight")["basis"].shape == (16, RANK)
    finally:
        dist.destroy_process_group()


# -- replicated --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REPLICATED)
def test_divided_refreshes_give_what_one_process_chooses(pair: dict[str, list[Any]], case: str) -> None:
    found = outcome(pair, f"replicated {case}")
    model = net()
    optimizer = together(case, model)
    train(model, optimizer, slice(0, 8), range(STEPS))
    for name, p in model.named_parameters():
        assert torch.equal(found[0]["weights"][name], found[1]["weights"][name])
        torch.testing.assert_close(found[0]["weights"][name], p.detach(), rtol=0, atol=1e-6)
    for name, entry in found[0]["state"].items():
        for key, value in entry.items():
            assert torch.equal(value, found[1]["state"][name][key]), f"{name} {key} differs between processes"
    assert found[0]["refreshes"] == found[1]["refreshes"] == optimizer.refresh_count
    if case == "random":
        assert all(not step for step in found[0]["kinds"]), "every process can draw for itself"
        return
    total = optimizer.refresh_count
    assert found[0]["chosen"] + found[1]["chosen"] == total, "a basis is chosen once"
    assert min(found[0]["chosen"], found[1]["chosen"]) >= total // 3
    for t, step in enumerate(found[0]["kinds"]):
        if case != "svd-stagger":
            assert set(step) == ({"broadcast"} if t % EVERY == 0 else set())


def test_shares_are_balanced_by_cost() -> None:
    model = nn.ModuleDict(
        {f"mlp{i}": nn.Linear(n, m, bias=False) for i, (m, n) in enumerate([(64, 64)] * 3 + [(16, 48)] * 6)}
    )
    optimizer = SubspaceOptimizer(
        [{"params": list(model.named_parameters()), "subspace": SVD(4)}], partial(AdamW, lr=0.1)
    )
    due = [(s, list(range(s.B))) for unit in optimizer.units for s in unit.stacks]
    shares = divide(due, 3)
    cost = [0, 0, 0]
    for (s, members), share in zip(due, shares, strict=True):
        assert sorted(i for mine in share for i in mine) == members
        short, long = sorted(s.shape[1:])
        for o, mine in enumerate(share):
            cost[o] += short * short * long * len(mine)
    assert max(cost) - min(cost) <= 16 * 16 * 48
