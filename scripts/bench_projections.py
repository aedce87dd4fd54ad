"""Time P z and Pᵀ g of every projection: beside a dense stored P, beside torch fastfood, and beside the floor.

    python scripts/bench_projections.py                 one thread of the CPU   (make bench)
    python scripts/bench_projections.py --device cuda   a GPU, with D = 10⁸     (make bench-gpu)

Every round times every product once, in turn, so that a busy moment hits all of them alike; the figure is the least of
the rounds.  On the CPU it is the thread's CPU time with one thread, on a GPU the time between events.  The floor is
what a training step cannot do without: read θ0 and y, write θ (torch.add), and read g once (torch.sum).  Extra memory
is what the process (or the device) held at most during lift and project beyond z, g, θ0 and θ, in vectors of size D.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not count as work

import torch
from torch import Tensor

SIZES = {"cpu": [(199_210, 750), (10**6, 10**4), (10**7, 10**4)]}
SIZES["cuda"] = [*SIZES["cpu"], (10**8, 10**5)]
STORED = {"cpu": 2e9, "cuda": 3e10}  # bytes a dense stored P may take here
PER_ENTRY = ("dense", "gaussian")  # families that do work for each of the D d entries
ENTRIES = {"cpu": 1e9, "cuda": 2e10}  # more than so many are not waited for
Run = Callable[[], object]


@dataclass
class Row:
    """One way to multiply: what is timed, and the least seconds of each product."""

    name: str
    lift: Run
    project: Run
    state: int | None = None
    extra: float | None = None
    best: dict[str, float] = field(default_factory=dict)


def switched(run: Run, on: bool) -> Run:
    """`run`, with the compiled kernels or without them."""
    if on:
        return run

    def alone() -> None:
        from subspace_lab.projections import seam

        os.environ["SUBSPACE_NATIVE"] = "0"
        seam.transforms.cache_clear()
        try:
            run()
        finally:
            del os.environ["SUBSPACE_NATIVE"]
            seam.transforms.cache_clear()

    return alone


def clock(run: Run, device: str) -> float:
    """Seconds of one call."""
    if device == "cuda":
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    started = time.thread_time()
    run()
    return time.thread_time() - started


def resident(what: str) -> int:
    """Bytes of this process, VmRSS (now) or VmHWM (at most)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def extra_memory(run: Run, device: str) -> float | None:
    """Bytes that `run` needs at most beyond what there is, caches included."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        before = resident("VmRSS")
        run()
        return max(0, resident("VmHWM") - before)
    except OSError:
        return None


def fastfood_by_cat(D: int, d: int, device: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """The global transform as public code writes it in torch: one torch.cat for each stride."""
    n = 1 << (D - 1).bit_length()
    generator = torch.Generator().manual_seed(0)
    B = (torch.randint(0, 2, (n,), generator=generator) * 2.0 - 1).to(device)
    order = torch.randperm(n, generator=generator).to(device)
    back = torch.argsort(order)
    G = torch.randn(n, generator=generator).to(device)
    c = 1 / math.sqrt(n * float((G**2).sum()) * D / n)

    def H(x: Tensor) -> Tensor:
        for _ in range(n.bit_length() - 1):
            x = torch.cat((x[::2] + x[1::2], x[::2] - x[1::2]))
        return x

    def lift(z: Tensor) -> Tensor:
        return H(G * H(B * torch.nn.functional.pad(z, (0, n - d)))[order])[:D] * c

    def project(g: Tensor) -> Tensor:  # H of this form is the transform in another order; its cost is what is compared
        return (B * H((G * H(torch.nn.functional.pad(g, (0, n - D))))[back]))[:d] * c

    return lift, project


def rows_to_time(D: int, d: int, device: str) -> tuple[list[Row], Row, str]:
    """All ways to multiply at this size, the floor, and what was left out."""
    try:
        from subspace_lab.projections import KINDS, create
    except ImportError as error:
        raise SystemExit(f"error: the projections cannot be imported ({error})") from None
    z, g, theta0 = (torch.randn(k, device=device) for k in (d, D, D))
    y, theta, z_out = torch.randn(D, device=device), torch.zeros(D, device=device), torch.zeros(d, device=device)
    floor = Row("floor: θ0 + y, Σ g", lambda: torch.add(theta0, y, out=theta), lambda: torch.sum(g))
    found, left_out = [], []
    for name in (k for kind in KINDS for k in ((kind, f"{kind}, torch alone") if kind == "orthoblock" else (kind,))):
        kind, on = name.split(",")[0], "torch" not in name
        if kind in PER_ENTRY and D * d > ENTRIES[device]:
            left_out.append(f"{name} (D d = {D * d:.0e} entries)")
            continue

        try:
            small = create(kind, D=5000, d=min(d, 1000), seed=0)  # what is loaded or built on first use is not counted
            small.project(small.lift(z[: small.d]))
            P = create(kind, D=D, d=d, seed=0)
            lift = switched(lambda P=P: P.lift(z, base=theta0, out=theta), on)
            project = switched(lambda P=P: P.project(g, out=z_out), on)
            row = Row(name, lift, project)
            row.extra = extra_memory(lambda a=lift, b=project: (a(), b()), device)
            row.state = P.state_bytes()
            found.append(row)
        except Exception as error:  # a family that does not work at this size must not hide the others
            left_out.append(f"{name} ({type(error).__name__}: {str(error).splitlines()[0][:80]})")
    up, down = fastfood_by_cat(D, d, device)
    found.append(Row("peer: torch fastfood, cat", lambda: torch.add(theta0, up(z), out=theta), lambda: down(g)))
    if 4 * D * d <= STORED[device]:
        P = torch.randn(D, d, device=device)
        found.append(Row("peer: dense stored fp32", lambda: torch.mv(P, z), lambda: torch.mv(P.t(), g)))
    else:
        left_out.append(f"dense stored fp32 ({4 * D * d / 1e9:.0f} GB)")
    return found, floor, "; ".join(left_out)


def measure(rows: list[Row], device: str, rounds: int, budget: float) -> None:
    """Interleaved rounds. A row that is slow takes part in fewer, so that it does not take more than its budget."""
    spent = dict.fromkeys((row.name for row in rows), 0.0)
    for _ in range(rounds):
        for row in rows:
            if spent[row.name] > budget:
                continue
            for what, run in (("lift", row.lift), ("project", row.project)):
                took = clock(run, device)
                spent[row.name] += took
                row.best[what] = min(row.best.get(what, math.inf), took)


def report(D: int, d: int, rows: list[Row], floor: Row, left_out: str) -> list[str]:
    """The table of one size in markdown."""
    dense = next((row for row in rows if "dense stored" in row.name), None)
    cat = next(row for row in rows if "cat" in row.name)
    pair = sum(floor.best.values())

    def ratio(row: Row, other: Row | None, what: str) -> str:
        return "–" if other is None else f"{row.best[what] / other.best[what]:.3f}"

    lines = [
        f"\nD = {D:,}, d = {d:,}: milliseconds, the least of the rounds\n",
        "| P | P z | Pᵀ g | ÷ dense stored | ÷ torch fastfood | pair ÷ floor | state MB | extra memory ÷ 4 D |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in [*rows, floor]:
        up, down = (row.best[k] * 1e3 for k in ("lift", "project"))
        beside = " / ".join(ratio(row, dense, k) for k in ("lift", "project")) if dense else "–"
        other = " / ".join(ratio(row, cat, k) for k in ("lift", "project"))
        state = "–" if row.state is None else f"{row.state / 1e6:.1f}"
        extra = "–" if row.extra is None else f"{row.extra / (4 * D):.2f}"
        least = f"{(up + down) / pair / 1e3:.2f}"
        lines.append(f"| {row.name} | {up:.3g} | {down:.3g} | {beside} | {other} | {least} | {state} | {extra} |")
    if left_out:
        lines.append(f"\nNot run: {left_out}.")
    return lines


def targets(D: int, d: int, device: str, rows: list[Row], floor: Row) -> list[str]:
    """What this project asks of itself, and whether this run met it."""
    by_name = {row.name: row for row in rows}
    lines = []

    def tell(what: str, value: float, most: float) -> None:
        lines.append(f"- {'met   ' if value <= most else 'MISSED'} {what}: {value:.3f}, at most {most}")

    dense, pair = by_name.get("peer: dense stored fp32"), sum(floor.best.values())
    for name, most in (("orthoblock", 0.05), ("orthoblock, torch alone", 0.1)):
        if dense and name in by_name and device == "cpu":
            for what in ("lift", "project"):
                tell(f"{name}, {what} ÷ dense stored", by_name[name].best[what] / dense.best[what], most)
    if "orthoblock" in by_name and D >= 10**7:
        row, most = by_name["orthoblock"], 4.0 if device == "cpu" else 3.0
        tell("orthoblock, pair ÷ floor", sum(row.best.values()) / pair, most)
        if row.extra is not None:
            tell("orthoblock, extra memory in vectors of size D", row.extra / (4 * D), 3.0)
    return lines


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--budget", type=float, default=10.0, help="seconds for one row of a table, at most")
    parser.add_argument("--sizes", type=int, help="only the first so many sizes")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch sees no CUDA device; without it, the figures are the CPU's")
    os.environ.pop("SUBSPACE_NATIVE", None)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    lines = [f"# Projections, {args.device}\n"]
    for D, d in SIZES[args.device][: args.sizes]:
        rows, floor, left_out = rows_to_time(D, d, args.device)
        measure([*rows, floor], args.device, args.rounds, args.budget)
        made = [*report(D, d, rows, floor, left_out), "", *targets(D, d, args.device, rows, floor)]
        print("\n".join(made), flush=True)
        lines += made
        del rows, floor
        gc.collect()
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "1 thread"
    print(f"\ntorch {torch.__version__}, {args.device}, {machine}, load {os.getloadavg()[0]:.1f}")
    args.out.mkdir(parents=True, exist_ok=True)
    file = args.out / f"projections_{args.device}.md"
    file.write_text("\n".join(lines) + "\n")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
