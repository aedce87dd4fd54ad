"""Time rounds of federated learning: this process beside Flower's simulation, and the memory of many clients.

    python scripts/bench_federated.py [--device cuda] [--skip-flower]          (make bench)

Rounds: FedAvg on permuted digits (the default: 10 clients, one pass in batches of 10, 64-100-100-10) by both engines,
the same work on the same seeds; Flower's start-up and its first round are left out. Memory: 100 rounds of the same
network with 250 and with 1000 clients in every round, each count in a process of its own. Rules: aggregation of 15
updates of 10^7 entries. Figures are wall clock, medians of the rounds.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from bench_continual import target

from subspace_lab.app import compose_config
from subspace_lab.federated.client import ClientPool
from subspace_lab.federated.exchange import Exchange, InProcess, Work
from subspace_lab.federated.flag import flag
from subspace_lab.federated.robust import bulyan, krum, median, trimmed_mean

WORDS = ["method=fedavg", "trainer.progress=off"]


def times_of(pool: ClientPool, exchange: Exchange, rounds: int) -> list[float]:
    """Seconds of each round but the first."""
    w, everyone = pool.layout.read(pool.model), list(range(pool.federation.clients))
    shares, seconds = [1 / len(everyone)] * len(everyone), []
    for index in range(rounds + 1):
        began = time.perf_counter()
        w = w + exchange.sum_train(w, everyone, Work(0, index), shares).to(w)
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def engines(rounds: int, device: str) -> None:
    """Both engines at the same work."""
    from subspace_lab.federated.flower.engine import FlowerEngine

    cfg = compose_config([*WORDS, "federation.engine=flower"])
    pool = ClientPool(cfg, device)
    ours = statistics.median(times_of(pool, InProcess(pool), rounds))
    began = time.perf_counter()
    start: list[float] = []

    def main(exchange: Exchange) -> list[float]:
        start.append(time.perf_counter() - began)
        return times_of(pool, exchange, rounds)

    theirs = statistics.median(FlowerEngine(cfg, pool.federation.clients).run(main))
    print("| 10 clients, one pass | ms per round |\n|---|--:|")
    print(f"| inprocess | {1e3 * ours:.1f} |\n| flower | {1e3 * theirs:.1f} |\n\nstart of flower: {start[0]:.1f} s\n")
    print(target("inprocess ÷ flower", ours / theirs, 0.5), "\n")


def many(clients: int, rounds: int, device: str) -> None:
    """Rounds with so many clients; prints seconds and the largest memory, for `memory`."""
    pool = ClientPool(compose_config([*WORDS, f"federation.clients={clients}"]), device)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds = sum(times_of(pool, InProcess(pool), rounds))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"{seconds} {before / 1024} {after / 1024}")


def memory(rounds: int, device: str) -> None:
    """The same rounds with more and more clients."""
    print(f"| clients × {rounds} rounds | seconds | MiB before | largest MiB |\n|---|--:|--:|--:|")
    grown = {}
    for clients in (250, 1000):  # 237 fill a group that is trained at once
        words = [sys.executable, __file__, "--many", str(clients), "--rounds", str(rounds), "--device", device]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()
        seconds, before, after = map(float, told)
        grown[clients] = after - before
        print(f"| {clients} | {seconds:.1f} | {before:.0f} | {after:.0f} |")
    print(f"\nmemory that training took, 1000 clients ÷ 250: {grown[1000] / max(grown[250], 1):.2f}\n")


def rules(n: int, device: str) -> None:
    """Rules of a server on 15 updates."""
    updates = torch.randn(15, n, device=device)
    candidates: dict[str, Callable[[], torch.Tensor]] = {
        "mean": lambda: updates.mean(0),
        "flag": lambda: flag(updates),
        "krum": lambda: krum(updates, 3),
        "median": lambda: median(updates),
        "trimmed mean": lambda: trimmed_mean(updates, 3),
        "bulyan": lambda: bulyan(updates, 3),
    }
    print(f"| rule, 15 × {n:,} | ms |\n|---|--:|")
    for name, rule in candidates.items():
        seconds = []
        for _ in range(4):
            began = time.perf_counter()
            rule()
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
        print(f"| {name} | {1e3 * statistics.median(seconds[1:]):.0f} |")
    print()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--skip-flower", action="store_true")
    parser.add_argument("--many", type=int, help=argparse.SUPPRESS)
    args, _ = parser.parse_known_args()  # make hands its ARGS to every script
    torch.set_num_threads(args.threads)
    if args.many:
        many(args.many, args.rounds, args.device)
        return
    print(f"# Federated learning on {args.device}, {args.threads} thread(s), load {os.getloadavg()[0]:.1f}\n")
    if not args.skip_flower:
        engines(min(args.rounds, 30), args.device)
    memory(args.rounds, args.device)
    rules(10_000_000, args.device)


if __name__ == "__main__":
    main()
