"""Time merges in memory of eight ViT-B/32-sized experts, beside FusionBench's code where it is installed.

    python scripts/bench_merging.py                                   two cores, all twelve layers   (make bench)
    python scripts/bench_merging.py --layers 1 --rounds 1             a quick look
    python scripts/bench_merging.py --fusion-bench other/bin/python   FusionBench of another environment
    python scripts/bench_merging.py --device cuda                     a GPU                          (make bench-gpu)

Tensors have the shapes of CLIP's ViT-B/32 vision tower (87.46 million parameters); task vectors are random, with
singular values that decay as 1, 2^-0.7, 3^-0.7, …, partly in common directions.  Every round times ours and theirs in
turn, so that a busy moment hits both; figures are wall seconds, medians of the rounds, ratios the medians of each
round's ratios.  FusionBench runs in a process of its own, with its own threads, on the same numbers; its functions are
called as its algorithms call them, without their loading and without moving anything to a device.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: idle threads must not take the other side's time

import torch
from torch import Tensor

State = dict[str, Tensor]

WIDTH, HIDDEN, TASKS = 768, 3072, 8
# At most this share of FusionBench's time, on two cores
TARGETS = {
    "task_arithmetic": 0.15,
    "ties": 0.15,
    "iso_c": 0.55,
    "iso_cts": 0.25,
    "tsv_merge": 0.6,
    "tsv_merge_gram": 0.33,
    "opcm": 0.33,
}
THEIRS = {"tsv_merge_gram": "tsv_merge"}  # the same algorithm


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    """CLIP's vision tower with that many blocks."""
    found: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (WIDTH,),
        "embeddings.patch_embedding.weight": (WIDTH, 3, 32, 32),
        "embeddings.position_embedding.weight": (50, WIDTH),
        "pre_layrnorm.weight": (WIDTH,),
        "pre_layrnorm.bias": (WIDTH,),
    }
    for i in range(layers):
        block = f"encoder.layers.{i}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            found |= {f"{block}.self_attn.{name}.weight": (WIDTH, WIDTH), f"{block}.self_attn.{name}.bias": (WIDTH,)}
        found |= {f"{block}.mlp.fc1.weight": (HIDDEN, WIDTH), f"{block}.mlp.fc1.bias": (HIDDEN,)}
        found |= {f"{block}.mlp.fc2.weight": (WIDTH, HIDDEN), f"{block}.mlp.fc2.bias": (WIDTH,)}
        for name in ("layer_norm1", "layer_norm2"):
            found |= {f"{block}.{name}.weight": (WIDTH,), f"{block}.{name}.bias": (WIDTH,)}
    return found | {"post_layernorm.weight": (WIDTH,), "post_layernorm.bias": (WIDTH,)}


def experts(layers: int) -> tuple[State, list[State]]:
    """A base and eight models; the same in every process."""
    g = torch.Generator().manual_seed(0)
    base, models = {}, [State() for _ in range(TASKS)]
    bases = {n: torch.linalg.qr(torch.randn(n, WIDTH, generator=g)).Q for n in (WIDTH, HIDDEN)}
    decay = 0.02 * torch.arange(1, WIDTH + 1).pow(-0.7)
    for name, shape in shapes(layers).items():
        base[name] = 0.02 * torch.randn(shape, generator=g)
        shared = (
            _turned(bases, shape, decay, g) if shape[0] in bases and shape[-1] in bases and len(shape) == 2 else None
        )
        for W in models:
            if shared is None:
                W[name] = base[name] + 1e-3 * torch.randn(shape, generator=g)
            else:
                W[name] = base[name] + 0.5 * shared + _turned(bases, shape, decay, g)
    return base, models


def _turned(bases: dict[int, Tensor], shape: tuple[int, ...], s: Tensor, g: torch.Generator) -> Tensor:
    """A matrix with singular values s and random singular vectors: rows of orthonormal ones, shuffled and signed."""
    m, n = shape

    def turned(rows: int) -> Tensor:
        signs = torch.randint(0, 2, (rows, 1), generator=g) * 2 - 1
        return signs * bases[rows][torch.randperm(rows, generator=g)]

    return turned(m) * s @ turned(n).mT


def ours(base: State, models: list[State]) -> dict[str, Callable[[], object]]:
    """Merges by name; a method that is not there is left out."""
    from functools import partial
    from importlib import import_module

    from subspace_lab.merging import merge_state_dicts

    places = {
        "task_arithmetic": ("averaging", "TaskArithmetic", {}),
        "ties": ("ties", "TIES", {}),
        "iso_c": ("iso", "IsoC", {}),
        "iso_cts": ("iso", "IsoCTS", {}),
        "tsv_merge": ("tsv", "TSVMerge", {}),
        "tsv_merge_gram": ("tsv", "TSVMerge", {"solver": "gram"}),
        "opcm": ("opcm", "OPCM", {"order": "given"}),
    }
    return {
        name: partial(
            merge_state_dicts, getattr(import_module(f"subspace_lab.merging.{module}"), kind)(**options), base, models
        )
        for name, (module, kind, options) in places.items()
    }


class FusionBench:
    """Its process.

    Args:
        python: interpreter that has it.
        layers: of the models.

    Attributes:
        names: merges that it can do; none if it is not installed.
    """

    def __init__(self, python: str, layers: int) -> None:
        command = [python, str(Path(__file__).with_name("merging_by_fusion_bench.py")), str(layers)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self._process.stdout is not None
        self.names = self._process.stdout.readline().split()

    def seconds(self, name: str) -> float | None:
        """Of one merge; None if it failed (float32 SVDs do, now and then)."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(name, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            self.names = []
            return None
        return float(answer)

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--fusion-bench", default=sys.executable, metavar="PYTHON", help="interpreter that has it")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    args, _ = parser.parse_known_args()  # make hands its ARGS to every script
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: --device cuda, but torch sees no CUDA device; without it, the figures are the CPU's")
    base, models = experts(args.layers)
    if args.device == "cuda":
        base, *models = ({name: W.cuda() for name, W in found.items()} for found in (base, *models))
    runs = {name: run for name, run in ours(base, models).items() if name in args.methods}
    other = FusionBench(args.fusion_bench, args.layers) if args.device == "cpu" else None
    try:
        times = _measure(runs, other, args.rounds, args.device)
    finally:
        if other is not None:
            other.close()
    size = sum(W.numel() for W in base.values())
    lines = [f"\n# Merging {TASKS} models of {size / 1e6:.1f} million parameters, fp32\n", *_table(times)]
    if other is not None and not any(row[1] for row in times.values()):
        lines.append(
            "\n- skipped: FusionBench (not installed here; --fusion-bench PYTHON names an interpreter that has it)"
        )
    machine = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} threads"
    lines.append(f"\ntorch {torch.__version__}, {args.device}, {machine}, load {os.getloadavg()[0]:.1f}")
    print("\n".join(lines))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"merging_{args.device}.md").write_text("\n".join(lines) + "\n")


Times = dict[str, tuple[list[float], list[float]]]


def _measure(runs: dict[str, Callable[[], object]], other: FusionBench | None, rounds: int, device: str) -> Times:
    """Seconds of ours and theirs, method by method: a merge is long, and what stands next to it counts."""
    times: Times = {name: ([], []) for name in runs}
    for name, run in runs.items():
        if device == "cuda":
            run()
        for _ in range(rounds):
            for mine in (True, False):
                if mine:
                    times[name][0].append(_seconds(run, device))
                elif other is not None and THEIRS.get(name, name) in other.names:
                    found = other.seconds(THEIRS.get(name, name))
                    times[name][1].extend(_found(found))
    return times


def _found(seconds: float | None) -> Iterator[float]:
    if seconds is not None:
        yield seconds


def _seconds(run: Callable[[], object], device: str) -> float:
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _table(times: Times) -> list[str]:
    lines = ["| merge | s | FusionBench s | ratio | at most | |", "|---|--:|--:|--:|--:|---|"]
    for name, (mine, their) in times.items():
        row = [name, f"{statistics.median(mine):.3g}", "", "", f"{TARGETS[name]}", ""]
        if their:
            ratio = statistics.median(a / b for a, b in zip(mine, their, strict=False))
            row[2:] = [f"{statistics.median(their):.3g}", f"{ratio:.2f}", f"{TARGETS[name]}"]
            row.append("met" if ratio <= TARGETS[name] else "MISSED")
        lines.append(f"| {' | '.join(row)} |")
    return lines


if __name__ == "__main__":
    main()
