"""Write slurm/ anew: the templates, and a batch script for every published experiment (`make slurm`).

Every file is what `subspace-lab sbatch …` prints for the words in its second line; nothing in it is edited by hand.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from hydra import initialize_config_module

from subspace_lab import catalog
from subspace_lab.cluster.commands import written

FOLDER = Path(__file__).resolve().parents[1] / "slurm"
SITE = "cluster=a100"
TEMPLATES = {
    "single_node": (
        [SITE, "trainer.devices=1"],
        "One GPU of one node. More: sbatch --ntasks-per-node=4 --gpus-per-node=4 FILE trainer.devices=4 …",
    ),
    "multi_node_ddp": (
        [SITE, "trainer=ddp", "trainer.devices=8", "trainer.num_nodes=2"],
        "Two nodes of eight GPUs, gradients averaged over all of them.",
    ),
    "multi_node_fsdp": (
        [SITE, "trainer=fsdp", "trainer.devices=8", "trainer.num_nodes=2"],
        "Two nodes of eight GPUs, weights, gradients and optimizer state divided among them (FSDP2).",
    ),
    "sweep_array": (
        ["-m", SITE, "method=galore,none", "seed=0,1"],
        "A grid, one task of the array for each cell; then: subspace-lab report outputs/…/sweeps/JOB",
    ),
}


def scripts() -> dict[str, tuple[list[str], str]]:
    """Return for every file (relative to slurm/) the words of its command and what it is."""
    experiments = {
        f"experiments/{entry.name}": ([f"experiment={entry.name}", SITE], entry.description)
        for entry in catalog.entries("experiment")
    }
    return {f"{name}.sbatch": how for name, how in (TEMPLATES | experiments).items()}


def text(name: str, words: list[str], what: str) -> str:
    """Return one file's text."""
    multirun = words[0] == "-m"
    usage = "Further overrides come after it, and sbatch's own options before it: sbatch --time=2:00:00 FILE seed=1"
    command = shlex.join(["subspace-lab", "sbatch", *words])
    job_name = None if name.startswith("experiments/") else Path(name).stem
    return written(words[multirun:], multirun=multirun, command=command, about=(what, usage), job_name=job_name)


def main() -> int:
    wanted = {}
    with initialize_config_module("subspace_lab.conf", version_base="1.3", job_name="run"):
        for name, (words, what) in scripts().items():
            wanted[FOLDER / name] = text(name, words, what)
    for path in FOLDER.rglob("*.sbatch"):
        if path not in wanted:
            path.unlink()
    for path, content in wanted.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    print(f"{len(wanted)} files in {FOLDER}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
