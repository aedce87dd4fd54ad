"""Two processes over gloo, started once: refreshes that are divided, and weights that are sharded (FSDP2).

What they do together is compared with what one process does alone; every item of this file reports one case of them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from distributed.split_cases import (
    CASES,
    EVERY,
    RANK,
    REPLICATED,
    SHARDED,
    STEPS,
    alone,
    dtype_of,
    factory,
    method,
    net,
    process,
    together,
    train,
)
from torch import nn
from torch.optim import Adafactor, AdamW

from subspace_lab.optim.refreshing import divide
from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
from subspace_lab.subspaces import SVD
from subspace_lab.subspaces.within import Sketched


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
