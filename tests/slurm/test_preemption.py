"""Two nodes of two ranks that are told to stop, each way there is, compute bit for bit what undisturbed ones do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from slurm.cluster_harness import ROOT, Cluster, identical, results, rows, use, weights, words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

NAME = "galore_llama_tiny_text"
STEPS = 200
START = 400.0  # seconds for four processes to import torch on two cores that others use too
TEMPLATE = (ROOT / "slurm" / "multi_node_ddp.sbatch", "trainer.devices=2")
SMALL = ("--ntasks-per-node=2", "--gpus-per-node=2")


def submit(cluster: Cluster, *flags: str) -> tuple[str, Path]:
    job = cluster.sbatch(*SMALL, *flags, *TEMPLATE, *words(cluster.work, f"trainer.max_steps={STEPS}"))
    return job, cluster.work / "outputs" / NAME / job


def wait_for_rows(cluster: Cluster, run_dir: Path, count: int) -> int:
    cluster.wait(f"row {count} of {run_dir}", lambda: len(rows(run_dir)) >= count, START)
    return len(rows(run_dir))


@pytest.fixture(scope="module")
def undisturbed(local_slurm: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    cluster = use(local_slurm, tmp_path_factory.mktemp("undisturbed"))
    job, run_dir = submit(cluster)
    shown = cluster.state(job, timeout=2 * START)
    assert shown["JobState"] == "COMPLETED", cluster.everything()
    return run_dir


def check(cluster: Cluster, job: str, run_dir: Path, undisturbed: Path, restarts: int) -> None:
    shown = cluster.state(job, timeout=2 * START)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", str(restarts)), cluster.everything()
    assert results(run_dir)["status"] == "completed"
    assert [path.name for path in run_dir.parent.iterdir()] == [job], "every life found the same folder"
    expected = rows(undisturbed)
    assert len(expected) >= STEPS
    assert rows(run_dir) == expected
    identical(weights(run_dir), weights(undisturbed))


def test_by_scancel_again_and_again(slurm: Cluster, undisturbed: Path) -> None:
    job, run_dir = submit(slurm)
    seen = 0
    for life in range(1, 6):
        # 13 rows on, so that the notices come at other places between refreshes, validations and checkpoints
        seen = wait_for_rows(slurm, run_dir, seen + 13)
        slurm.run("scancel", "--signal=USR2", job)
        slurm.wait(f"requeueing {life}", lambda: slurm.shown(job)["Restarts"] == str(life), 120)  # noqa: B023
        assert results(run_dir)["status"] == "interrupted"
        seen = len(rows(run_dir))
    check(slurm, job, run_dir, undisturbed, restarts=5)


def test_by_the_time_limit(slurm: Cluster, undisturbed: Path) -> None:
    # As soon as it trains it has a minute left, of which SLURM tells it at once.
    job, run_dir = submit(slurm, "--time=30", "--signal=USR2@120")
    wait_for_rows(slurm, run_dir, 10)
    spent = slurm.shown(job)["RunTime"]  # H:M:S
    minutes = int(spent.split(":")[1]) + 2
    slurm.run("scontrol", "update", f"JobId={job}", f"TimeLimit={minutes}")
    slurm.wait("requeueing", lambda: slurm.shown(job)["Restarts"] == "1", START)
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=30")
    assert 10 <= len(rows(run_dir)) < STEPS
    check(slurm, job, run_dir, undisturbed, restarts=1)


def test_by_a_job_of_higher_priority(slurm: Cluster, undisturbed: Path) -> None:
    job, run_dir = submit(slurm)
    wait_for_rows(slurm, run_dir, 20)
    urgent = slurm.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 2")
    slurm.state(urgent, "COMPLETED", timeout=120)
    assert len(rows(run_dir)) < STEPS
    check(slurm, job, run_dir, undisturbed, restarts=1)


def test_fsdp_by_scancel(slurm: Cluster) -> None:
    template = (ROOT / "slurm" / "multi_node_fsdp.sbatch", "trainer.devices=2")
    made = words(slurm.work, "trainer.max_steps=60")
    whole = slurm.sbatch(*SMALL, *template, *made)
    assert slurm.state(whole, timeout=2 * START)["JobState"] == "COMPLETED", slurm.everything()
    job = slurm.sbatch(*SMALL, *template, *made)
    folder = slurm.work / "outputs" / NAME
    wait_for_rows(slurm, folder / job, 15)
    slurm.run("scancel", "--signal=USR2", job)
    shown = slurm.state(job, timeout=2 * START)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), slurm.everything()
    assert rows(folder / job) == rows(folder / whole)
    identical(weights(folder / job), weights(folder / whole))
