"""Jobs in a real SLURM, what they leave, and what to look at when one does not do what it should."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Four processes on two cores: what costs is starting them, so a run has many small steps.
WORDS = (
    "data=text",
    "data.block_size=16",
    "data.batch_size=4",
    "data.global_batch_size=16",
    "data.val_fraction=0.2",
    "data.val_tokens=256",
    "model.hidden_size=16",
    "model.intermediate_size=24",
    "model.num_heads=2",
    "model.num_layers=1",
    "method.rank=4",
    "method.refresh_every=7",
    "optimizer.lr=0.01",
    "trainer.accelerator=cpu",
    "trainer.log_every=1",
    "trainer.val_every=100",
    "trainer.checkpoint_every=100",
    "trainer.progress=off",
    "compare=null",
    "export=false",
)


def load_script(name: str) -> ModuleType:
    """Import a file of scripts/."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@dataclass
class Cluster:
    """The SLURM of this session, used from one folder."""

    env: dict[str, str]
    work: Path
    jobs: list[str] = field(default_factory=list)

    def run(self, *command: str, timeout: float = 60, check: bool = True) -> str:
        done = subprocess.run(command, cwd=self.work, env=self.env, capture_output=True, text=True, timeout=timeout)
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *words: str | Path) -> str:
        """Submit and return the job's id."""
        job = self.run("sbatch", "--parsable", *map(str, words)).strip().split(";")[0]
        self.jobs.append(job)
        return job

    def shown(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it (of an array: of one task, given as JOB_TASK)."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", job, check=False)))

    def wait(self, what: str, condition: Callable[[], Any], timeout: float) -> Any:
        """Return what the condition returns once that is true; fail with all there is to look at when it is not."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            found = condition()
            if found:
                return found
            time.sleep(0.2)
        pytest.fail(f"no {what} within {timeout:g} s\n{self.everything()}")

    def state(self, job: str, *states: str, timeout: float) -> dict[str, str]:
        """Wait until a job is in one of these states."""
        names = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")

        def there() -> dict[str, str] | None:
            shown = self.shown(job)
            return shown if shown.get("JobState") in names else None

        found: dict[str, str] = self.wait(f"{'/'.join(names)} of job {job}", there, timeout)
        return found

    def everything(self) -> str:
        """The jobs and the ends of their logs."""
        parts = [self.run("squeue", check=False)]
        parts += [self.run("scontrol", "show", "job", job, check=False) for job in self.jobs]
        for log in sorted(
            [*self.work.glob("outputs/slurm/*"), *self.work.glob("**/*_log.*"), *self.work.glob("*.log")]
        ):
            parts.append(f"--- {log}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:]))
        return "\n".join(parts)


def use(local_slurm: Any, work: Path) -> Cluster:
    env = local_slurm.env | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        # The nodes are this machine under two names.
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    return Cluster(env, work)


def write_corpus(folder: Path) -> Path:
    file = folder / "corpus.jsonl"
    lines = [
        f'{{"text": "document {i}: {"abcdefgh"[i % 8] * (i % 13)} the quick brown fox {i * i}"}}' for i in range(300)
    ]
    file.write_text("\n".join(lines) + "\n")
    return file


def words(folder: Path, *more: str) -> list[str]:
    """The overrides of a tiny run on a text in this folder."""
    text = folder / "corpus.jsonl"
    if not text.exists():
        write_corpus(folder)
    return [*WORDS, f"data.files=[{text}]", f"paths.cache_dir={folder}/cache", *more]


def rows(run_dir: Path) -> list[dict[str, str]]:
    """metrics.csv without the columns that depend on the clock; empty while there is none."""
    try:
        with (run_dir / "metrics.csv").open(newline="") as file:
            return [{k: v for k, v in row.items() if "per_second" not in k and v} for row in csv.DictReader(file)]
    except (OSError, csv.Error):
        return []


def weights(run_dir: Path) -> dict[str, Any]:
    """Everything in the newest checkpoint but what depends on the clock."""
    from subspace_lab.training import checkpoint

    newest = checkpoint.list_checkpoints(run_dir)[0]
    contents = checkpoint.load(newest)
    return {"step": contents["global_step"], **contents["state_dict"], "optimizers": contents["optimizer_states"]}


def identical(left: Any, right: Any, where: str = "") -> None:
    """Assert that two nested containers of tensors are the same, bit for bit."""
    import torch

    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            identical(left[key], right[key], f"{where}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), where
        for index, pair in enumerate(zip(left, right, strict=True)):
            identical(*pair, f"{where}/{index}")
    else:
        assert left == right, where


def results(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "results.json").read_text())
    return found
