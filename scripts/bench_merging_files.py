"""Time merges from disk to disk: ours beside mergekit, and task arithmetic beside the time that reading alone takes.

    python scripts/bench_merging_files.py                                      8 experts of the size of ViT-B/32
    python scripts/bench_merging_files.py --mergekit ~/mergekit/bin/python     … beside mergekit of that interpreter

Checkpoints (350 MB each) are made in a temporary folder and stay in the page cache.  Every round runs everything in
turn, and medians are shown.  `compute` reads and merges, `merge` also writes, both with all libraries loaded; `process`
is a whole one from nothing with the hashes of its inputs, `peak` its largest resident memory, mapped files included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor
from typing_extensions import override

from subspace_lab.merging import Merge
from subspace_lab.merging.averaging import TaskArithmetic
from subspace_lab.merging.checkpoints import Checkpoint, Checkpoints
from subspace_lab.merging.dare import DARE
from subspace_lab.merging.engine import Sink, run
from subspace_lab.merging.grouping import pieces
from subspace_lab.merging.settings import TensorRules
from subspace_lab.merging.ties import TIES
from subspace_lab.merging.writing import CheckpointWriter, ScratchFile

CONSOLE = Console()
METHODS: dict[str, Merge] = {
    "task arithmetic": TaskArithmetic(0.3),
    "TIES": TIES(0.3),
    "TIES, by tensor": TIES(0.3, trim="tensor"),
    "DARE": DARE(0.3, p=0.5),
}
MERGEKIT: dict[str, dict[str, Any]] = {
    "task arithmetic": {"merge_method": "task_arithmetic"},
    "TIES, by tensor": {"merge_method": "ties", "density": 0.2},
    "DARE": {"merge_method": "dare_linear", "density": 0.5},
}
_OURS = """
import json, sys, torch
torch.set_num_threads(int(sys.argv[3]))
from pathlib import Path
from subspace_lab.merging.averaging import TaskArithmetic
from subspace_lab.merging.dare import DARE
from subspace_lab.merging.ties import TIES
from subspace_lab.merging import files, settings
method = {"task arithmetic": TaskArithmetic(0.3), "TIES": TIES(0.3), "TIES, by tensor": TIES(0.3, trim="tensor"),
          "DARE": DARE(0.3, p=0.5)}[sys.argv[1]]
folder = Path(sys.argv[2])
models = [str(path) for path in sorted(folder.glob("[0-9]*.safetensors"))]
given = settings.MergeSettings(models, str(folder / "base.safetensors"), device="cpu")
files.merge_files(method, given, folder / "ours", lambda _: None)
"""


def vit_b32() -> dict[str, tuple[int, ...]]:
    """Tensors of the vision tower of CLIP ViT-B/32: 87.46 million values."""
    d, inner = 768, 3072
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.class_embedding": (d,),
        "embeddings.patch_embedding.weight": (d, 3, 32, 32),
        "embeddings.position_embedding.weight": (50, d),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):
        shapes |= {f"{norm}.weight": (d,), f"{norm}.bias": (d,)}
    for i in range(12):
        layer = f"encoder.layers.{i}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (d, d), f"{layer}.self_attn.{name}.bias": (d,)}
        shapes |= {f"{layer}.mlp.fc1.weight": (inner, d), f"{layer}.mlp.fc1.bias": (inner,)}
        shapes |= {f"{layer}.mlp.fc2.weight": (d, inner), f"{layer}.mlp.fc2.bias": (d,)}
        for norm in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{norm}.weight": (d,), f"{layer}.{norm}.bias": (d,)}
    return shapes


def make(folder: Path, experts: int) -> None:
    """Write the base and its experts."""
    g = torch.Generator().manual_seed(0)
    base = {name: 0.03 * torch.randn(shape, generator=g) for name, shape in vit_b32().items()}
    save_file(base, folder / "base.safetensors")
    for t in range(experts):
        tuned = {name: W + 1e-3 * torch.randn(W.shape, generator=g) for name, W in base.items()}
        save_file(tuned, folder / f"{t}.safetensors")


class Nowhere(Sink):
    """Merged tensors are dropped: reading and computing alone."""

    @override
    def put(self, name: str, start: int, values: Tensor) -> None:
        pass


def opened(folder: Path) -> Checkpoints:
    models = {path.stem: Checkpoint(str(path), "") for path in sorted(folder.glob("[0-9]*.safetensors"))}
    return Checkpoints(Checkpoint(str(folder / "base.safetensors"), ""), models, torch.device("cpu"))


def read(folder: Path) -> None:
    """Look at every value of every file once, in the pieces and through the mapping that merges use."""
    sources = opened(folder)
    for group in pieces(sources.infos(), TensorRules(), sources.device):
        part = group.parts[0]
        for model in (None, *range(sources.models)):
            sources.read(model, part.tensor, part.start, part.stop).sum()
        sources.release()


def merge(method: Merge, folder: Path, *, write: bool) -> None:
    sources = opened(folder)
    if not write:
        run(method, sources, TensorRules(), Nowhere(), shelf=lambda: ScratchFile(folder))
        return
    infos = sources.infos()
    with CheckpointWriter(folder / "merged", infos, {"model.safetensors": list(infos)}) as writer:
        run(method, sources, TensorRules(), writer, shelf=lambda: ScratchFile(folder))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def process(command: list[str]) -> tuple[float, float]:
    """Wall seconds and peak MiB of a process."""
    began = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    said = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{' '.join(command[:3])} … ended with {child.returncode}: {said.strip()[-500:]}")
    return time.perf_counter() - began, usage.ru_maxrss / 1024


def mergekit(python: str, name: str, folder: Path, threads: int) -> tuple[float, float]:
    options = dict(MERGEKIT[name])
    config = {"merge_method": options.pop("merge_method"), "dtype": "float32"}
    config["base_model"] = str(folder / "base.safetensors")
    config["models"] = [
        {"model": str(path), "parameters": {"weight": 0.3, **options}}
        for path in sorted(folder.glob("[0-9]*.safetensors"))
    ]
    file, output = folder / "mergekit.yaml", folder / "theirs"
    file.write_text(json.dumps(config), encoding="utf-8")
    shutil.rmtree(output, ignore_errors=True)
    code = (
        f"import torch; torch.set_num_threads({threads})\nfrom mergekit.scripts.merge_raw_pytorch import main\nmain()"
    )
    return process([python, "-c", code, str(file), str(output)])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--methods", nargs="+", choices=sorted(METHODS), default=list(METHODS))
    parser.add_argument("--folder", type=Path, help="where the checkpoints are made; default: the temporary folder")
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter with mergekit; without, ours alone")
    options, _ = parser.parse_known_args()  # make hands its ARGS to every script
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.folder) as made:
        folder = Path(made)
        make(folder, options.experts)
        measure(folder, options)


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Run everything, round by round, and print."""
    times: dict[tuple[str, str], list[float]] = {}

    def note(name: str, column: str, value: float) -> None:
        times.setdefault((name, column), []).append(value)

    for _ in range(options.rounds):
        note("", "read", seconds(lambda: read(folder)))
        for name in options.methods:
            method = METHODS[name]
            note(name, "compute", seconds(partial(merge, method, folder, write=False)))
            note(name, "merge", seconds(partial(merge, method, folder, write=True)))
            wall, peak = process([sys.executable, "-c", _OURS, name, str(folder), str(options.threads)])
            note(name, "process", wall)
            note(name, "peak", peak)
            if options.mergekit and name in MERGEKIT:
                wall, peak = mergekit(options.mergekit, name, folder, options.threads)
                note(name, "mergekit", wall)
                note(name, "mergekit peak", peak)
    median = {key: statistics.median(values) for key, values in times.items()}
    floor = median["", "read"]
    inputs = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 2**20
    table = Table(title=f"{options.experts} experts of ViT-B/32, {options.threads} threads, seconds", box=box.SIMPLE)
    columns = ["compute", "merge", "process", "peak", "mergekit", "mergekit peak"]
    for column in ["", *columns, "÷ mergekit"]:
        table.add_column(column, justify="left" if not column else "right")
    for name in options.methods:
        cells = [f"{median[name, c]:,.0f} MiB" if "peak" in c else f"{median[name, c]:.2f}" for c in columns[:4]]
        beside = (name, "mergekit") in median
        if beside:
            cells += [f"{median[name, 'mergekit']:.2f}", f"{median[name, 'mergekit peak']:,.0f} MiB"]
            cells.append(f"{median[name, 'process'] / median[name, 'mergekit']:.2f}")
        table.add_row(name, *cells)
    CONSOLE.print(table)
    CONSOLE.print(f"reading all inputs once: {floor:.2f} s")
    if "task arithmetic" in options.methods:
        ratio = median["task arithmetic", "compute"] / floor
        CONSOLE.print(f"task arithmetic, read and computed: {ratio:.2f} × that (wanted: at most 1.5)")
    if "TIES" in options.methods:
        peak = median["TIES", "peak"]
        CONSOLE.print(f"peak of TIES: {peak:,.0f} MiB (wanted: at most 2,048 + {inputs:,.0f} of mapped inputs)")
    if options.mergekit:
        CONSOLE.print("whole processes ÷ mergekit's: wanted at most 1.00")


if __name__ == "__main__":
    main()
