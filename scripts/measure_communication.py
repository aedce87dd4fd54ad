"""Bytes that two real processes send per step, beside the closed form of docs/scale.md: a LLaMA over gloo.

    python scripts/measure_communication.py [--processes 2] [--steps 6] [--hidden 128] [--layers 4] [--rank 16]

`counted` are the tensors handed to collectives, times what a ring sends of them; `on the wire` is what the loopback
interface carried meanwhile, headers and whatever else used it included: measure on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

CASES = [(strategy, method) for strategy in ("ddp", "fsdp") for method in ("adamw", "galore")]


def loopback_bytes() -> int:
    """Bytes that the loopback interface has carried since the machine started."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[0])
    return 0


def measure(strategy: str, method: str, shape: dict[str, int], rank: int, steps: int) -> dict[str, Any]:
    """Train for some steps in a process group; return the bytes sent per plain step and per refreshing one."""
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.nn.parallel import DistributedDataParallel

    from subspace_lab.analysis.communication import Communication
    from subspace_lab.methods.base import Method
    from subspace_lab.methods.galore import GaLore
    from subspace_lab.models.llama import build_llama
    from subspace_lab.optim.subspace_optimizer import SubspaceOptimizer
    from subspace_lab.training.sharding import shard

    torch.manual_seed(0)
    model = build_llama(**shape)
    how = GaLore(rank=rank, refresh_every=steps // 2) if method == "galore" else Method()
    wrapped: Any = model
    if strategy == "fsdp":
        shard(model, init_device_mesh("cpu", (dist.get_world_size(),)), how.shard_dimensions(model))
    else:
        wrapped = DistributedDataParallel(model)
    optimizer = how.build_optimizer(model, partial(torch.optim.AdamW, lr=1e-3))
    if isinstance(optimizer, SubspaceOptimizer) and strategy == "ddp":
        optimizer.share_refreshes()
    plain, refreshing, wire = [], [], []
    for step in range(steps):
        tokens = torch.randint(shape["vocab_size"], (2, 32))
        dist.barrier()
        before = loopback_bytes()
        with Communication() as traffic:
            wrapped(input_ids=tokens, labels=tokens).loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        carried = loopback_bytes() - before
        if step == 0:
            continue  # DDP also compares its parameters, FSDP2 starts up
        if method == "galore" and step % (steps // 2) == 0:
            refreshing.append(traffic.sent(dist.get_world_size()))
        else:
            plain.append(traffic.sent(dist.get_world_size()))
            wire.append(carried)
    each = sorted(wire)[len(wire) // 2] / dist.get_world_size()
    return {"plain": max(plain), "refresh": max(refreshing, default=max(plain)) - max(plain), "wire": each}


def process(rank: int, folder: str, options: argparse.Namespace, shape: dict[str, int]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=options.processes)
    found = {case: measure(*case, shape, options.rank, options.steps) for case in CASES}
    if rank == 0:
        torch.save(found, f"{folder}/found.pt")
    dist.barrier()
    dist.destroy_process_group()


def main() -> int:
    import tempfile

    import torch
    import torch.multiprocessing as mp

    from subspace_lab.analysis.cost_model import costs, llama_weights

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, value in (
        ("processes", 2),
        ("steps", 6),
        ("hidden", 128),
        ("layers", 4),
        ("rank", 16),
        ("vocabulary", 512),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    intermediate = options.hidden * 11 // 4
    shape = {"hidden_size": options.hidden, "intermediate_size": intermediate, "num_heads": 4}
    shape |= {"num_layers": options.layers, "vocab_size": options.vocabulary}
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(process, args=(folder, options, shape), nprocs=options.processes)
        found = torch.load(f"{folder}/found.pt", weights_only=True)
    weights = llama_weights(options.hidden, intermediate, options.layers, 4, None, options.vocabulary)
    print(
        f"{options.processes} processes, {sum(x.entries for x in weights) / 1e6:.2f} M parameters in fp32, "
        f"rank {options.rank}"
    )
    print("| | sent per step: formula | counted | on the wire | per refresh: formula | counted |")
    print("|---|---|---|---|---|---|")
    worst = 0.0
    for strategy, method in CASES:
        rank = options.rank if method == "galore" else None
        model = costs(weights, processes=options.processes, strategy=strategy, width=4, rank=rank)
        ours = found[strategy, method]
        cells = [model.sent, ours["plain"], ours["wire"], model.sent_refresh, ours["refresh"]]
        print(f"| {method}, {strategy} | " + " | ".join(f"{x / 1e6:.3f} MB" for x in cells) + " |")
        worst = max(worst, abs(ours["plain"] / model.sent - 1))
        if model.sent_refresh:
            worst = max(worst, abs(ours["refresh"] / model.sent_refresh - 1))
    print(f"largest difference between formula and count: {100 * worst:.2f} %")
    return 0 if worst < 0.02 else 1


if __name__ == "__main__":
    sys.exit(main())
