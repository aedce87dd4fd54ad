"""Time the update of class subspaces: beside a tall batched SVD, beside the head itself, on a GPU beside ResNet-50.

    python scripts/bench_manifolds.py                 one thread of the CPU   (make bench)
    python scripts/bench_manifolds.py --device cuda   a GPU                   (make bench-gpu)

C = 1000 classes, k = 8 dimensions of n = 2048 features.  Every round times every candidate once, in turn, so that a
busy moment hits all of them alike; figures are medians of the rounds, ratios the medians of each round's ratios.  On
the CPU a time is the thread's CPU time with one thread, on a GPU the time between events.  The wear is the largest
|SᵀS − I| during 1000 steps of a given arc, in float32.  On a GPU the update runs with torch's synchronisation check on.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not count as work

import torch
from bench_projections import Run, clock
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from subspace_lab.manifolds import Grassmann
from subspace_lab.models.heads import GrassmannHead
from subspace_lab.optim.riemannian import RiemannianSGD

CLASSES, DIMENSION, FEATURES, BATCH = 1000, 8, 2048, 256
UPDATES = [(u, m) for m in ("transported", "ambient") for u in ("geodesic", "polar", "qr")]
ARCS = (1e-3, 0.03, 0.5)


def tall_svd(S: Tensor, D: Tensor) -> Run:
    """Momentum, projection and geodesic as the release writes them, batched: (C, n, k) matrices and their SVD."""
    S, m = S.clone(), torch.zeros_like(S)
    driver = "gesvda" if S.is_cuda else None

    def run() -> None:
        nonlocal S
        m.mul_(0.9).add_(D)
        G = m - S @ (S.mT @ m)
        U, sigma, Vh = torch.linalg.svd(G, full_matrices=False, driver=driver)
        angles = -0.1 * sigma.unsqueeze(-2)
        S = ((S @ Vh.mT) * angles.cos() + U * angles.sin()) @ Vh

    return run


def resnet50_step(device: str) -> Run:
    """One training step, fp32, without the optimizer."""
    from torchvision.models import resnet50

    model = resnet50(num_classes=CLASSES).to(device)
    x, y = torch.randn(BATCH, 3, 224, 224, device=device), torch.arange(BATCH, device=device)

    def run() -> None:
        model.zero_grad()
        cross_entropy(model(x), y).backward()

    return run


def candidates(device: str) -> dict[str, Run]:
    """Everything that is timed; the first is what ratios refer to."""
    torch.manual_seed(0)
    head = GrassmannHead(FEATURES, [DIMENSION] * CLASSES).to(device)
    S = head.bases[f"k{DIMENSION}"]
    x, y = torch.randn(BATCH, FEATURES, device=device, requires_grad=True), torch.arange(BATCH, device=device)

    def head_alone() -> None:
        head.zero_grad(set_to_none=False)
        cross_entropy(head(x), y).backward()

    head_alone()
    assert S.grad is not None
    found: dict[str, Run] = {
        "geodesic by tall batched SVD": tall_svd(S.detach().mT.contiguous(), S.grad.mT.contiguous()),
        f"the head's forward + backward, batch {BATCH}": head_alone,
    }
    for update, momentum in UPDATES:
        groups = [{"params": [nn.Parameter(S.detach().clone())], "manifold": "grassmann", "blocks": True}]
        groups[0]["params"][0].grad = S.grad.clone()
        optimizer = RiemannianSGD(groups, lr=0.1, update=update, transport=momentum)
        found[f"{update}, {momentum}"] = optimizer.step
    if device == "cuda":
        found[f"ResNet-50 forward + backward, batch {BATCH}"] = resnet50_step(device)
    return found


def wear(update: str, arc: float, device: str) -> float:
    """Largest |SᵀS − I| during 1000 steps whose tangent vectors have spectral norm `arc`; 8 classes."""
    generator = torch.Generator(device).manual_seed(0)
    S = nn.Parameter(torch.linalg.qr(torch.randn(8, FEATURES, DIMENSION, device=device, generator=generator))[0].mT)
    S.data = S.data.contiguous()
    groups = [{"params": [S], "manifold": "grassmann", "blocks": True}]
    optimizer = RiemannianSGD(groups, lr=1.0, momentum=0.0, update=update)  # type: ignore[arg-type]
    worst = torch.zeros((), device=device)
    for _ in range(1000):
        D = torch.randn(S.shape, device=device, generator=generator)
        S.grad = D * (arc / torch.linalg.matrix_norm(D, 2))[:, None, None]
        optimizer.step()
        worst = torch.maximum(worst, Grassmann().check(S.detach().mT).amax())
    return worst.item()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    args, _ = parser.parse_known_args()  # make hands its ARGS to every script
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch sees no CUDA device; without it, the figures are the CPU's")
    torch.set_num_threads(1)
    runs = candidates(args.device)
    if args.device == "cuda":
        _check_no_sync({name: run for name, run in runs.items() if "," in name and "batch" not in name})
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(clock(run, args.device))
    lines = [*_table(times), "", *_targets(times, args.device), ""]
    lines += [f"Wear after 1000 steps, arcs {', '.join(map(str, ARCS))}:", ""]
    for update in ("geodesic", "polar", "qr"):
        worn = [wear(update, arc, args.device) for arc in ARCS]
        lines.append(f"- {'met   ' if max(worn) <= 2e-6 else 'MISSED'} {update}: {', '.join(f'{w:.1e}' for w in worn)}")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else "1 thread"
    lines.append(f"\ntorch {torch.__version__}, {args.device}, {machine}, load {os.getloadavg()[0]:.1f}")
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"manifolds_{args.device}.md").write_text("\n".join(lines) + "\n")


def _check_no_sync(runs: dict[str, Run]) -> None:
    for run in runs.values():
        run()
        torch.cuda.set_sync_debug_mode("error")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _ratio(times: dict[str, list[float]], name: str, other: str) -> float:
    return statistics.median(a / b for a, b in zip(times[name], times[other], strict=True))


def _table(times: dict[str, list[float]]) -> list[str]:
    svd, head = list(times)[:2]
    lines = [
        f"\n# Class subspaces: C = {CLASSES}, k = {DIMENSION}, n = {FEATURES}, fp32\n",
        "| one step | ms | ÷ tall SVD | ÷ head |",
        "|---|--:|--:|--:|",
    ]
    for name, values in times.items():
        ratios = f"{_ratio(times, name, svd):.2f} | {_ratio(times, name, head):.2f}"
        lines.append(f"| {name} | {1e3 * statistics.median(values):.3g} | {ratios} |")
    return lines


def _targets(times: dict[str, list[float]], device: str) -> list[str]:
    names = list(times)
    limits = {"÷ tall SVD": (names[0], 0.35), "÷ head": (names[1], 0.6)}
    if device == "cuda":
        limits = {"÷ ResNet-50 step": (names[-1], 0.1)}
    lines = []
    for what, (other, most) in limits.items():
        ratio = _ratio(times, "geodesic, transported", other)
        lines.append(f"- {'met   ' if ratio <= most else 'MISSED'} default update {what}: {ratio:.3f}, at most {most}")
    return lines


if __name__ == "__main__":
    main()
