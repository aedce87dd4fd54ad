"""Runs of one rank in a real SLURM: the templates, a sweep through the launcher, time limits, scancel, failures."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster_harness import ROOT, Cluster, identical, results, rows, use, weights, words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

NAME = "galore_llama_tiny_text"
TEMPLATE = ROOT / "slurm" / "single_node.sbatch"
START = 300.0
STEPS = 400


def submit(cluster: Cluster, *flags: str, steps: int = STEPS) -> tuple[str, Path]:
    made = words(cluster.work, f"trainer.max_steps={steps}")
    job = cluster.sbatch(*flags, TEMPLATE, *made)
    return job, cluster.work / "outputs" / NAME / job


def wait_for_rows(cluster: Cluster, run_dir: Path, count: int) -> None:
    cluster.wait(f"row {count} of {run_dir}", lambda: len(rows(run_dir)) >= count, START)


@pytest.fixture(scope="module")
def undisturbed(local_slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cluster = use(local_slurm, tmp_path_factory.mktemp("undisturbed"))
    job, run_dir = submit(cluster)
    assert cluster.state(job, timeout=START)["JobState"] == "COMPLETED", cluster.everything()
    assert results(run_dir)["status"] == "completed"
    return run_dir


def test_a_time_limit_requeues_and_the_job_goes_on(slurm: Cluster, undisturbed: Path) -> None:
    # The limit is far enough for the start, and the notice comes as early before it as SLURM allows.
    job, run_dir = submit(slurm, "--time=30", "--signal=USR2@120")
    wait_for_rows(slurm, run_dir, 10)
    minutes = int(slurm.shown(job)["RunTime"].split(":")[1]) + 2
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    slurm.wait("requeueing", lambda: slurm.shown(job)["Restarts"] == "1", START)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    assert slurm.state(job, timeout=START)["JobState"] == "COMPLETED", slurm.everything()
    assert rows(run_dir) == rows(undisturbed)
    identical(weights(run_dir), weights(undisturbed))
    log = (slurm.work / "outputs" / "slurm" / f"single_node-{job}.log").read_text()
    assert log.count(f"SLURM job {job} goes back into the queue") == 1, "both lives wrote into one log"


def test_a_cancelled_job_leaves_a_folder_that_resumes(slurm: Cluster, undisturbed: Path) -> None:
    job, run_dir = submit(slurm)
    wait_for_rows(slurm, run_dir, 20)
    slurm.run("scancel", job)
    shown = slurm.state(job, timeout=60)
    assert (shown["JobState"], shown["Restarts"]) == ("CANCELLED", "0")
    slurm.wait("end of the program", lambda: results(run_dir)["status"] == "interrupted", 20)
    again = slurm.sbatch("--job-name=again", "--wrap", f"srun subspace-lab resume {run_dir}")
    assert slurm.state(again, timeout=START)["JobState"] == "COMPLETED", slurm.everything()
    assert rows(run_dir) == rows(undisturbed)
    identical(weights(run_dir), weights(undisturbed))


def test_a_run_that_fails_is_a_failed_job(slurm: Cluster) -> None:
    job = slurm.sbatch(TEMPLATE, *words(slurm.work), "data.files=[nowhere.jsonl]")
    shown = slurm.state(job, timeout=START)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "2:0")
    log = (slurm.work / "outputs" / "slurm" / f"single_node-{job}.log").read_text()
    assert "error: " in log and "nowhere.jsonl" in log and "Traceback" not in log


def test_the_wrong_number_of_processes_is_one_line(slurm: Cluster) -> None:
    job = slurm.sbatch("--ntasks-per-node=2", TEMPLATE, *words(slurm.work))
    assert slurm.state(job, timeout=START)["JobState"] == "FAILED"
    log = (slurm.work / "outputs" / "slurm" / f"single_node-{job}.log").read_text()
    assert log.count("error: SLURM started 2 processes") == 1 and "trainer.devices=2" in log


def test_a_sweep_as_an_array_of_the_template(slurm: Cluster) -> None:
    made = [word for word in words(slurm.work, "trainer.max_steps=10") if not word.startswith("method.")]
    job = slurm.sbatch(ROOT / "slurm" / "sweep_array.sbatch", *made)
    slurm.wait("end of the array", lambda: not slurm.run("squeue", "-h", "-j", job, check=False).strip(), 2 * START)
    sweep = slurm.work / "outputs" / "galore+none_llama_tiny_stdlib_text" / "sweeps" / job
    found = [results(sweep / str(task)) for task in range(4)]
    assert [(one["status"], one["method"], one["seed"]) for one in found] == [
        ("completed", method, seed) for method in ("galore", "none") for seed in (0, 1)
    ]


def test_a_sweep_through_the_launcher(slurm: Cluster) -> None:
    made = [word for word in words(slurm.work, "trainer.max_steps=10") if not word.startswith("method.")]
    made += ["hydra/launcher=submitit_slurm", "cluster=a100", "cluster.time_minutes=20"]
    done = subprocess.run(
        [sys.executable, "-m", "subspace_lab", "-m", "method=galore,none", "seed=0,1", *made],
        cwd=slurm.work,
        env=slurm.env,
        capture_output=True,
        text=True,
        timeout=3 * START,
    )
    assert done.returncode == 0, done.stdout + done.stderr + slurm.everything()
    (sweep,) = (slurm.work / "outputs" / "galore+none_llama_tiny_text" / "sweeps").iterdir()
    found = [results(sweep / str(task)) for task in range(4)]
    assert [(one["status"], one["method"], one["seed"]) for one in found] == [
        ("completed", method, seed) for method in ("galore", "none") for seed in (0, 1)
    ]
    (text,) = {script.read_text() for script in sweep.glob(".submitit/**/*submission*.sh")}
    for line in (
        "--array=0-3%4",
        "--signal=USR2@300",
        "--requeue",
        "--cpus-per-task=8",
        "--mem=60GB",
        "--constraint=a100",
    ):
        assert f"#SBATCH {line}" in text, line
    assert json.loads((sweep / "sweep.json").read_text())
