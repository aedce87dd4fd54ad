"""Time whole training steps of a continual run, with data, trainer and rows: GPM beside naive fine-tuning.

    python scripts/bench_continual_epochs.py          (make bench)

`protocol=continual` on digits enlarged to 28 × 28 pixels with permuted MNIST's network and batch (784-100-100-10
without biases, batch 10, SGD).  GPM's bases are random, of the ranks that permuted MNIST ends with (544, 99, 84) and
of half the space, where projecting costs most (392).  Each round trains one task with every candidate, in turn;
figures are wall clock, medians of the rounds; ratios are the medians of each round's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from bench_continual import random_basis, target

from subspace_lab import build
from subspace_lab.app import compose_config
from subspace_lab.protocols import assembling
from subspace_lab.protocols.task_sequence import TaskSequence

WORDS = ["data=permuted_digits", "data.image_size=28", "model=mlp", "model.bias=false", "scheduler=constant"]
WORDS += ["trainer.progress=off", "trainer.log_every=100", "trainer.checkpoint_every=0", "trainer.max_epochs=null"]
SHAPES = {"1": 784, "3": 100, "5": 100}
CANDIDATES = {"naive": None, "GPM, ranks 544, 99, 84": (544, 99, 84), "GPM, ranks 392, 50, 50": (392, 50, 50)}


def sequence_of(ranks: tuple[int, ...] | None, steps: int, rounds: int, folder: Path) -> TaskSequence:
    """A run that has learnt its first task and protects bases of these ranks."""
    method = ["method=gpm", "method.threshold=0.0"] if ranks else ["method=naive"]
    folder.mkdir()
    words = [*method, *WORDS, f"scenario.tasks={rounds + 2}", f"trainer.max_steps={steps}"]
    cfg = compose_config([*words, f"paths.output_dir={folder}"])
    data: Any = build.build_data(cfg)
    data.configure(0, 1, 0)
    data.setup("fit")
    parts = build.build_method(cfg), build.instantiate(cfg.scenario), data
    sequence = TaskSequence(cfg, assembling.build_plan(cfg), *parts, folder, "bench", folder, part="test")
    once(sequence)
    for (path, d), k in zip(SHAPES.items(), ranks or (), strict=False):
        sequence.method.memory.put(path, random_basis(d, k, "cpu"))  # type: ignore[attr-defined]
    once(sequence)  # to warm up
    return sequence


def once(sequence: TaskSequence) -> float:
    """Train and end one task; its training in seconds."""
    sequence.train()
    sequence.finish()
    return sequence.standing.seconds[-1][0]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    args, _ = parser.parse_known_args()  # make hands its ARGS to every script
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: sequence_of(ranks, args.steps, args.rounds, Path(folder) / str(index))
            for index, (name, ranks) in enumerate(CANDIDATES.items())
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name, sequence in runs.items():
                times[name].append(once(sequence))
    print(f"# Steps of continual runs, {args.threads} thread(s), load {os.getloadavg()[0]:.1f}\n")
    print("| | ms per step | ÷ naive |\n|---|--:|--:|")
    ratios = {n: statistics.median(a / b for a, b in zip(t, times["naive"], strict=True)) for n, t in times.items()}
    for name, values in times.items():
        print(f"| {name} | {1e3 * statistics.median(values) / args.steps:.3f} | {ratios[name]:.3f} |")
    print()
    for name in list(ratios)[1:]:
        print(target(f"{name} ÷ naive", ratios[name], 1.25))


if __name__ == "__main__":
    main()
