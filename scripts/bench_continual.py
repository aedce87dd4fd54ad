"""Time what continual learning adds: extending bases, protected steps, projecting inputs instead of gradients.

    python scripts/bench_continual.py                 one thread of the CPU   (make bench)
    python scripts/bench_continual.py --device cuda   a GPU                   (make bench-gpu)

Bases of a 768 × 3072 layer beside the full SVD of a matrix of the weight's size; inputs with singular values i^-1.
Steps of gradient projection memory beside naive SGD on the permuted-MNIST protocol: 784-100-100-10 without biases,
batch 10, bases of rank 544, 99 and 84 as after ten tasks, in a bare loop with nothing else to do (whole runs are
timed by bench_continual_epochs.py).  Every round times every candidate once, in turn; figures are medians of the
rounds, ratios the medians of each round's ratios; on the CPU a time is the thread's CPU time.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not count as work

import torch
from bench_projections import Run, clock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from torch.optim import SGD

from subspace_lab.continual.layers import ProtectedLinear
from subspace_lab.continual.memory import BasisMemory
from subspace_lab.linalg.energy import energy_directions
from subspace_lab.linalg.removal import Removal
from subspace_lab.methods.continual.base import ContinualMethod
from subspace_lab.methods.continual.projection import GPM
from subspace_lab.subspaces import Complement

OUT, IN, EPSILON, STEPS = 768, 3072, 0.97, 50
RANKS = (544, 99, 84)

Times = dict[str, list[float]]


def random_basis(d: int, k: int, device: str) -> Tensor:
    """Orthonormal columns (d, k)."""
    generator = torch.Generator().manual_seed(d + k)
    return torch.linalg.qr(torch.randn(d, k, generator=generator))[0].to(device)


def updates(device: str) -> dict[str, Run]:
    """Extending a basis; the first is what ratios refer to."""
    W = torch.randn(OUT, IN, device=device)
    runs: dict[str, Run] = {f"full SVD, {OUT} × {IN}": lambda: torch.linalg.svd(W, full_matrices=False)}
    for d in (IN, OUT):
        turn = random_basis(d, d, device).double()
        s = torch.arange(1, d + 1, device=device).double() ** -1.0
        G = (turn * s.square()) @ turn.mT
        old = turn[:, :4].float().contiguous()
        runs[f"first basis, {d} inputs"] = partial(extend, G, None)
        runs[f"next directions, {d} inputs"] = partial(extend, G, old)
    return runs


def extend(G: Tensor, old: Tensor | None) -> None:
    """What happens to one layer after a task, once its inputs are summed up."""
    memory = BasisMemory()
    if old is not None:
        memory.put("layer", old)
    memory.extend("layer", energy_directions(G, old, EPSILON))


def steps(device: str) -> dict[str, Run]:
    """STEPS training steps each."""
    x, y = torch.randn(STEPS, 10, 784, device=device), torch.randint(10, (STEPS, 10), device=device)
    runs: dict[str, Run] = {}
    for name, ranks in (("naive", None), (f"GPM, ranks {RANKS}", RANKS), ("GPM, ranks (75, 30, 20)", (75, 30, 20))):
        torch.manual_seed(0)
        widths = ((784, 100), (100, 100), (100, 10))
        plain: list[nn.Module] = [nn.Linear(a, b, bias=False) for a, b in widths]
        network = nn.Sequential(plain[0], nn.ReLU(), plain[1], nn.ReLU(), plain[2]).to(device)
        method = ContinualMethod() if ranks is None else GPM()
        model = method.prepare(network)
        if isinstance(method, GPM) and ranks is not None:
            for (path, layer), k in zip(method.layers.items(), ranks, strict=True):
                method.memory.extend(path, random_basis(layer.weight.shape[1], k, device))
            method.install(model, 1)
        optimizer = method.build_optimizer(model, partial(SGD, lr=0.01))

        def loop(model: nn.Module = model, optimizer: torch.optim.Optimizer = optimizer) -> None:
            for batch, labels in zip(x, y, strict=True):
                optimizer.zero_grad()
                cross_entropy(model(batch), labels).backward()
                optimizer.step()

        def alone(optimizer: torch.optim.Optimizer = optimizer) -> None:
            for _ in range(STEPS):
                optimizer.step()

        runs[f"{name}: whole step"] = loop
        runs[f"{name}: optimizer alone"] = alone
    return runs


def ways(device: str) -> dict[str, Run]:
    """Forward and backward of a 768 × 3072 layer with 1000 protected inputs, for 64 rows, the gradient projected."""
    layer = ProtectedLinear(IN, OUT, bias=False, device=device)
    M = random_basis(IN, 1000, device)
    layer.protect(Removal.of(M))
    space = Complement({"w": M}).allocate((1, OUT, IN), names=["w"], device=torch.device(device))
    x = torch.randn(64, IN, device=device)

    def gradient() -> None:
        (G,) = torch.autograd.grad(linear(x, layer.weight).square().sum(), [layer.weight])
        space.lift(G.unsqueeze(0), slice(0, 1))

    def inputs() -> None:
        torch.autograd.grad(layer(x).square().sum(), [layer.weight])

    return {"gradient projected": gradient, "inputs projected": inputs}


def measure(runs: dict[str, Run], rounds: int, device: str) -> Times:
    """Seconds of every round."""
    times: Times = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(clock(run, device))
    return times


def ratio(times: Times, name: str, other: str) -> float:
    """Median over the rounds."""
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def table(title: str, times: Times, other: str, repeats: int = 1) -> list[str]:
    """Rows of name, milliseconds and the ratio to `other`."""
    lines = [f"\n## {title}\n", f"| | ms | ÷ {other} |", "|---|--:|--:|"]
    for name, values in times.items():
        lines.append(f"| {name} | {1e3 * statistics.median(values) / repeats:.3g} | {ratio(times, name, other):.3f} |")
    return lines


def target(what: str, value: float, most: float) -> str:
    """One line that says whether a figure is as small as it should be."""
    return f"- {'met   ' if value <= most else 'MISSED'} {what}: {value:.3f}, at most {most}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    args, _ = parser.parse_known_args()  # make hands its ARGS to every script
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch sees no CUDA device; without it, the figures are the CPU's")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    bases = measure(updates(args.device), args.rounds, args.device)
    training = measure(steps(args.device), args.rounds, args.device)
    projecting = measure(ways(args.device), args.rounds, args.device)
    svd, naive, gradient = next(iter(bases)), next(iter(training)), next(iter(projecting))
    lines = ["# Continual learning: bases, steps, projected inputs, fp32"]
    lines += table(f"Extending a basis to {EPSILON:.0%} of the energy", bases, svd)
    lines += table("One step, permuted MNIST's network, batch 10", training, naive, STEPS)
    lines += table("768 × 3072 layer, 1000 protected inputs, 64 rows", projecting, gradient)
    lines.append("")
    lines += [target(f"{name} ÷ {svd}", ratio(bases, name, svd), 0.2) for name in list(bases)[1:]]
    lines.append(target("inputs ÷ gradient", ratio(projecting, "inputs projected", gradient), 1.0))
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "1 thread"
    lines.append(f"\ntorch {torch.__version__}, {args.device}, {machine}, load {os.getloadavg()[0]:.1f}")
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"continual_{args.device}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
