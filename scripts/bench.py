"""Time optimizer steps: ours beside torch AdamW and galore-torch, paired in one process.

    python scripts/bench.py                 LLaMA-60M shapes on the CPU        (make bench)
    python scripts/bench.py --device cuda   LLaMA-60M and LLaMA-1B on a GPU    (make bench-gpu)

Every round times one step of every optimizer in turn, so that a busy moment hits all of them alike.  On the CPU the
figure to compare is CPU time (all threads); on a GPU it is the time between events.  Results are printed as tables
and written in pyperf's format (`python -m pyperf show FILE`).
"""

from __future__ import annotations

import argparse
import gc
import os
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not count as work

import pyperf
import torch
from bench_peers import SIZES, force_refresh, peers, weights
from record_gradients import record
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.optim import Optimizer

from subspace_lab.linalg import captured_energy
from subspace_lab.subspaces import SVD, Randomized

CONSOLE = Console()
Sample = tuple[float, float]  # seconds of (CPU or device, wall)


def clock(step: Optimizer, device: str) -> Sample:
    """One step's time: (process CPU or device seconds, wall seconds)."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        wall = time.perf_counter()
        begin.record()
        step.step()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, time.perf_counter() - wall
    cpu, wall = time.process_time(), time.perf_counter()
    step.step()
    return time.process_time() - cpu, time.perf_counter() - wall


def floor(size: str, device: str, other: list[torch.Tensor]) -> tuple[float, float]:
    """Seconds that a step cannot do without: (between refreshes, at a refresh).

    Between: the products that project and lift every matrix, and fused AdamW on the other weights.  At a refresh one
    step of subspace iteration needs as many products again.
    """
    hidden, inter, layers, rank = SIZES[size]
    work = [(4 * layers, hidden, hidden), (3 * layers, inter, hidden)]
    stacks = [(torch.randn(1, p, q, device=device), torch.randn(1, q, rank, device=device), B) for B, p, q in work]
    rest = torch.optim.AdamW(other, lr=1e-3, fused=True)

    class Products(torch.optim.Optimizer):
        def __init__(self) -> None:
            super().__init__([torch.zeros(1)], {})

        def step(self, closure: object = None) -> None:
            for A, P, B in stacks:
                for _ in range(B):
                    (A @ P) @ P.mT

    rest.step()
    products = min(clock(Products(), device)[0] for _ in range(5))
    others = min(clock(rest, device)[0] for _ in range(5))
    return products + others, 2 * products + others


def bench_steps(size: str, device: str, rounds: int, gradients: dict[str, Tensor]) -> dict[str, list[float]]:
    """Times of steps between refreshes and of refresh steps, printed and returned by name."""
    inside, other = weights(size, device, gradients)  # shared: what is timed does not depend on the values
    optimizers: dict[str, Optimizer] = {}
    for name, make in peers(size).items():
        try:
            optimizers[name] = make(inside, other)
        except ImportError as error:
            CONSOLE.print(f"[yellow]{name}: not installed ({error}); pip install subspace-lab\\[bench][/yellow]")
    times: dict[str, list[Sample]] = {f"{name} / {kind}": [] for name in optimizers for kind in ("between", "refresh")}
    for optimizer in optimizers.values():  # first basis, allocations
        optimizer.step()
        optimizer.step()
    refreshes = max(2, rounds // 5) if size == "llama_60m" else 1
    for r in range(rounds):
        for name, optimizer in optimizers.items():
            times[f"{name} / between"].append(clock(optimizer, device))
            if r < refreshes and "AdamW" not in name:
                force_refresh(optimizer)
                times[f"{name} / refresh"].append(clock(optimizer, device))
    del optimizers
    gc.collect()
    report_steps(size, device, times, floor(size, device, [p for _, p in other]))
    return {k: [first for first, _ in v] for k, v in times.items() if v}


def report_steps(size: str, device: str, times: dict[str, list[Sample]], lowest: tuple[float, float]) -> None:
    """Print medians beside galore-torch and beside the floor."""
    unit = "GPU ms" if device == "cuda" else "CPU ms"

    def middle(name: str, kind: str, which: int) -> float | None:
        samples = sorted(s[which] for s in times.get(f"{name} / {kind}", []))
        return samples[len(samples) // 2] * 1e3 if samples else None

    def ratio(name: str, kind: str) -> str:
        a, b = middle(name, kind, 0), middle("galore-torch", kind, 0)
        return "–" if a is None or b is None else f"{a / b:.2f}"

    for kind, least in zip(("between", "refresh"), lowest, strict=True):
        what = "a step between refreshes" if kind == "between" else "a refresh step"
        table = Table(title=f"{size}, fp32, rank {SIZES[size][3]}: {what}", box=box.SIMPLE_HEAD)
        for column in ("optimizer", unit, "wall ms", "÷ galore-torch", f"floor {unit}"):
            table.add_column(column, justify="left" if column == "optimizer" else "right", no_wrap=True)
        for name in dict.fromkeys(k.split(" / ")[0] for k in times):
            own, wall = middle(name, kind, 0), middle(name, kind, 1)
            if own is not None and wall is not None:
                beside = f"{least * 1e3:.0f}" if "AdamW" not in name else "–"
                table.add_row(name, f"{own:.0f}", f"{wall:.0f}", ratio(name, kind), beside)
        CONSOLE.print(table)


def report_energy(gradients: dict[str, Tensor], device: str) -> None:
    """Captured energy of bases on recorded gradients, as a share of what the exact SVD of the same rank captures."""
    steps = sorted({int(k.split("/")[0]) for k in gradients})
    last = steps[-1]
    names = [k.split("/", 1)[1] for k in gradients if k.startswith(f"{last}/")]
    table = Table(
        title=f"captured energy at step {last} ÷ exact SVD, rank 128, mean and worst of {len(names)} matrices"
    )
    for column in ("basis", "mean", "worst"):
        table.add_column(column, justify="left" if column == "basis" else "right", no_wrap=True)

    def tall(name: str, step: int) -> Tensor:
        G = gradients[f"{step}/{name}"].to(device)
        return (G.mT if G.shape[0] < G.shape[1] else G).unsqueeze(0)

    rows: dict[str, list[float]] = {}
    for name in names:
        A = tall(name, last)
        shape = (1, A.shape[1], A.shape[2])
        exact = SVD(128).allocate(shape, names=[name], device=A.device)
        exact.refresh(A)
        best = captured_energy(A, exact.basis)
        for age in [last - s for s in steps if s < last] + [None]:
            sub = Randomized(128).allocate(shape, names=[name], device=A.device)
            if age is not None:
                sub.refresh(tall(name, last - age))
                stale = float(captured_energy(A, sub.basis) / best)
                rows.setdefault(f"kept for {age} steps, not refreshed", []).append(stale)
            sub.refresh(A)
            label = "randomized, from a sketch" if age is None else f"randomized, warm from a basis {age} steps old"
            rows.setdefault(label, []).append(float(captured_energy(A, sub.basis) / best))
    for label, values in sorted(rows.items()):
        table.add_row(label, f"{sum(values) / len(values):.4f}", f"{min(values):.4f}")
    CONSOLE.print(table)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "error: --device cuda, but torch sees no CUDA device; run scripts/bench.py for the CPU figures"
        )
    recorded = args.out / "gradients_60m.safetensors"
    if not recorded.exists():
        CONSOLE.print("recording real gradients first (about two minutes on 2 cores, once) …")
        record(recorded, steps=200, layers=3, tokens=512)
    gradients = load_file(recorded)
    last = max(int(k.split("/")[0]) for k in gradients)
    suite = []
    for size in ("llama_60m", "llama_1b") if args.device == "cuda" else ("llama_60m",):
        latest = {k: g for k, g in gradients.items() if k.startswith(f"{last}/")}
        for name, values in bench_steps(size, args.device, args.rounds, latest).items():
            metadata = {"name": f"{size}: {name}", "unit": "second", "device": args.device}
            suite.append(pyperf.Benchmark([pyperf.Run(values, metadata=metadata, collect_metadata=False)]))
    report_energy(gradients, args.device)
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    CONSOLE.print(f"torch {torch.__version__}, {args.device}, {machine}, load {os.getloadavg()[0]:.1f}")
    file = args.out / f"{args.device}.json"
    file.unlink(missing_ok=True)
    pyperf.BenchmarkSuite(suite).dump(str(file))
    CONSOLE.print(f"written: {file}")


if __name__ == "__main__":
    main()
