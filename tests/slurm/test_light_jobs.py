"""The shipped templates in a real SLURM, with a payload that costs nothing: who gets which signal, what comes back."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster_harness import ROOT, Cluster, load_script, use

from subspace_lab.cluster.commands import written

SMALL = ("--ntasks-per-node=2", "--gpus-per-node=2")
DDP = ROOT / "slurm" / "multi_node_ddp.sbatch"


@pytest.fixture
def light(slurm: Cluster) -> Cluster:
    return with_payload(slurm)


def with_payload(cluster: Cluster) -> Cluster:
    program = cluster.work / "bin" / "subspace-lab"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("payload.py")} "$@"\n')
    program.chmod(0o755)
    cluster.env["PATH"] = f"{program.parent}:{cluster.env['PATH']}"
    cluster.env["PYTHONPATH"] = str(ROOT)
    return cluster


def files(cluster: Cluster, pattern: str) -> list[str]:
    return sorted(path.name for path in cluster.work.glob(pattern))


def start(cluster: Cluster, *words: str | Path, ranks: int = 4) -> str:
    """Submit a job that lasts, and wait until its ranks take note of signals."""
    cluster.env["PAYLOAD_SECONDS"] = "60"
    job = cluster.sbatch(*(words or (*SMALL, DDP)))
    cluster.wait("start of all ranks", lambda: len(files(cluster, "started-*-0.json")) == ranks, 20)
    return job


def test_a_template_starts_its_ranks_and_takes_overrides(light: Cluster) -> None:
    job = light.sbatch(*SMALL, DDP, "method=gcr", "tags=[a b]")
    light.state(job, "COMPLETED", timeout=20)
    assert files(light, "started-*") == [f"started-{rank}-0.json" for rank in range(4)]
    ranks = [json.loads((light.work / name).read_text()) for name in files(light, "started-*")]
    assert [rank["node"] for rank in ranks] == ["n1", "n1", "n2", "n2"]
    assert {(rank["tasks_per_node"], rank["gpus"], rank["cpus"]) for rank in ranks} == {("2", "2", "8")}
    words = ["cluster=a100", "trainer=ddp", "trainer.devices=8", "trainer.num_nodes=2", "method=gcr", "tags=[a b]"]
    assert ranks[3]["words"] == words
    assert (light.work / "outputs" / "slurm" / f"multi_node_ddp-{job}.log").is_file()


def test_what_the_command_prints_can_be_piped_into_sbatch(light: Cluster) -> None:
    text = written(["trainer=cpu", "name='a b'", "+cluster.env.PAYLOAD_EXIT=4"], multirun=False, command="")
    subprocess.run(["sbatch"], input=text, text=True, cwd=light.work, env=light.env, check=True, timeout=30)
    light.wait("start", lambda: files(light, "started-*"), 20)
    light.wait("end", lambda: not light.run("squeue", "-h").strip(), 20)
    found = json.loads((light.work / "started-0-0.json").read_text())
    assert found["words"] == ["trainer=cpu", "name='a b'", "+cluster.env.PAYLOAD_EXIT=4"] and found["gpus"] is None
    (log,) = (light.work / "outputs" / "slurm").iterdir()
    assert log.name.startswith("a b-") and "Exited with exit code 4" in log.read_text()


def test_a_sweep_is_an_array_with_a_cell_for_each_task(light: Cluster) -> None:
    job = light.sbatch(ROOT / "slurm" / "sweep_array.sbatch", "model=mlp")
    light.wait("end of the array", lambda: not light.run("squeue", "-h", "-j", job, check=False).strip(), 30)
    cells = [json.loads((light.work / f"started{task}-0-0.json").read_text())["words"] for task in range(4)]
    assert [words[3:5] for words in cells] == [
        [f"method={method}", f"seed={seed}"] for method in ("galore", "none") for seed in (0, 1)
    ]
    place = f"outputs/galore+none_llama_tiny_stdlib_text/sweeps/{job}"
    assert [words[5:] for words in cells] == [[f"hydra.run.dir='{place}/{task}'", "model=mlp"] for task in range(4)]


@pytest.mark.parametrize(
    "how",
    [
        pytest.param((), id="steps", marks=pytest.mark.slow),
        pytest.param(("--batch",), id="batch_shell", marks=pytest.mark.slow),
        pytest.param(("--full",), id="both"),
    ],
)
def test_a_notice_saves_on_every_rank_and_requeues(light: Cluster, how: tuple[str, ...]) -> None:
    job = start(light)
    for _ in range(2):  # the second one comes while the first is being obeyed
        light.run("scancel", "--signal=USR2", *how, job)
    light.wait("second life", lambda: len(files(light, "started-*-1.json")) == 4, 60)
    assert files(light, "saved-*") == [f"saved-{rank}-{signal.SIGUSR2.value}" for rank in range(4)]
    assert light.state(job, "COMPLETED", timeout=20)["Restarts"] == "1"


def test_a_cancelled_job_has_time_to_save_and_stays_cancelled(light: Cluster) -> None:
    job = start(light)
    light.run("scancel", job)
    light.state(job, "CANCELLED", timeout=30)
    light.wait("saving of all ranks", lambda: len(files(light, f"saved-*-{signal.SIGTERM.value}")) == 4, 10)
    assert light.shown(job)["Restarts"] == "0"


def test_a_job_that_must_not_be_requeued_says_so(light: Cluster) -> None:
    one = start(light, "--no-requeue", ROOT / "slurm" / "single_node.sbatch", ranks=1)
    light.run("scancel", "--signal=USR2", one)
    assert light.state(one, timeout=30)["JobState"] == "FAILED"
    log = (light.work / "outputs" / "slurm" / f"single_node-{one}.log").read_text()
    assert f"SLURM job {one} is not requeued: it was submitted with --no-requeue" in log


@pytest.mark.slow
def test_of_an_array_only_the_task_that_was_told_is_requeued(light: Cluster) -> None:
    light.env["PAYLOAD_SECONDS"] = "60"
    job = light.sbatch(ROOT / "slurm" / "sweep_array.sbatch")
    light.wait("start of all tasks", lambda: len(files(light, "started?-0-0.json")) == 4, 20)
    light.run("scancel", "--signal=USR2", f"{job}_1")
    light.wait("second life", lambda: files(light, "started?-0-1.json"), 60)
    assert files(light, "started?-0-1.json") == ["started1-0-1.json"] and files(light, "saved-*") == ["saved-0-12"]
    logs = {path.name: path.read_text() for path in (light.work / "outputs" / "slurm").iterdir()}
    assert f"SLURM job {job}_1 goes back into the queue" in logs[f"sweep_array-{job}_1.log"] and len(logs) == 4


def test_a_run_of_salloc_is_not_requeued(light: Cluster) -> None:
    light.env["PAYLOAD_SECONDS"] = "20"
    program = "sleep 1; while ! ls started-0-0.json; do sleep 0.1; done; scancel --signal=USR2 $SLURM_JOB_ID"
    light.run("salloc", "--job-name=mine", "bash", "-c", f"({program}) & srun subspace-lab; true")
    assert files(light, "saved-*") == ["saved-0-12"] and files(light, "asked-*") == ["asked-False"]


@pytest.mark.slow
def test_a_job_is_not_requeued_for_ever(light: Cluster) -> None:
    light.env["PAYLOAD_MOST"] = "0"
    job = start(light, ROOT / "slurm" / "single_node.sbatch", ranks=1)
    light.run("scancel", "--signal=USR2", job)
    assert light.state(job, timeout=30)["Restarts"] == "0"


def test_a_failing_program_is_a_failed_job(light: Cluster) -> None:
    light.env["PAYLOAD_EXIT"] = "3"
    job = light.sbatch(ROOT / "slurm" / "single_node.sbatch")
    shown = light.state(job, timeout=20)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "3:0")


@pytest.fixture
def without_user_signal(local_slurm: Any, tmp_path: Path) -> Iterator[Cluster]:
    """A site that tells preempted jobs nothing but SIGTERM."""
    module = load_script("local_slurm")
    other = module.LocalSlurm(tmp_path / "slurm", user_signal=False)
    other.up()
    (tmp_path / "work").mkdir()
    yield with_payload(use(other, tmp_path / "work"))
    other.down()


@pytest.mark.slow
def test_preemption_without_a_signal_of_its_own_requeues_too(without_user_signal: Cluster) -> None:
    cluster = without_user_signal
    job = start(cluster)
    urgent = cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--wrap", "sleep 1")
    cluster.state(urgent, "COMPLETED", timeout=40)
    assert files(cluster, "saved-*") == [f"saved-{rank}-{signal.SIGTERM.value}" for rank in range(4)]
    cluster.wait("second life", lambda: len(files(cluster, "started-*-1.json")) == 4, 60)
    assert cluster.state(job, "COMPLETED", timeout=20)["Restarts"] == "1"


@pytest.mark.slow
def test_nothing_is_left_of_a_cluster_that_went_down(local_slurm: Any, tmp_path: Path) -> None:
    module = load_script("local_slurm")
    own = module.LocalSlurm(tmp_path / "own", nodes=1)
    own.up()
    cluster = use(own, tmp_path)
    cluster.run("sbatch", "--wrap", "trap '' TERM; sleep 100")
    time.sleep(1)
    own.down()
    assert not (tmp_path / "own").exists() and not processes_of(own)


def test_a_cluster_that_cannot_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    module = load_script("local_slurm")
    if module.why_not() is not None:
        pytest.skip(module.why_not())
    own = module.LocalSlurm(tmp_path / "own", more="NoSuchKey=1\n")
    with pytest.raises(module.SlurmError, match=r"slurmctld ended.*\n(.*\n)*.*NoSuchKey"):
        own.up()
    assert not (tmp_path / "own").exists() and not processes_of(own)


def processes_of(own: Any) -> list[str]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if f"SLURM_CONF={own.conf}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append((entry / "cmdline").read_text())
        except OSError:
            continue
    return found
