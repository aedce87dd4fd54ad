"""Ranks that srun or torchrun started: their number is checked, and a signal finds none that leaves the others."""

from __future__ import annotations

import os
import signal

import pytest
from in_process import signals_installed  # noqa: F401 - a fixture

from subspace_lab import interrupt, rundir
from subspace_lab.app import compose_config
from subspace_lab.cluster import ranks
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.training import environment

SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "2",
}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}


@pytest.mark.parametrize(
    ("started", "words", "said"),
    [
        ({}, ["trainer.devices=2"], None),
        (SRUN, ["trainer.devices=2", "trainer.num_nodes=2"], None),
        (SRUN, ["trainer=ddp"], None),
        (SRUN, [], "SLURM started 2 processes on each of 2 nodes.*trainer.devices=2 trainer.num_nodes=2"),
        (SRUN | {"SLURM_STEP_ID": ""}, [], None),
        (SRUN | {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1"}, [], None),
        (SRUN | {"SLURM_JOB_NAME": "interactive"}, [], None),
        (TORCHRUN, ["trainer.devices=2"], None),
        (TORCHRUN, [], r"torchrun started 2 processes.*\(trainer.devices=2\)"),
        (TORCHRUN | SRUN, ["trainer.devices=2"], None),
    ],
)
def test_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, started: dict[str, str], words: list[str], said: str | None
) -> None:
    for name, value in started.items():
        if value:
            monkeypatch.setenv(name, value)
    cfg = compose_config(words)
    if started.get("SLURM_STEP_ID") == "":
        said = "start it with srun"
    if said is None:
        ranks.check(cfg)
        return
    with pytest.raises(UserError, match=said):
        ranks.check(cfg)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):  # one line is enough
        ranks.check(cfg)


def test_torchrun_inside_a_slurm_job_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (TORCHRUN | SRUN | {"RANK": "1", "SLURM_PROCID": "0"}).items():
        monkeypatch.setenv(name, value)
    assert environment.global_rank() == 1 and environment.slurm_plugin() is None


@pytest.mark.parametrize("name", ["SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"])
def test_a_later_life_is_counted(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert rundir.restarts() == 0
    monkeypatch.setenv(name, "3")
    assert rundir.restarts() == 3


@pytest.mark.usefixtures("signals_installed")
@pytest.mark.parametrize("started", [SRUN, TORCHRUN])
def test_sigterm_before_training_ends_one_process_and_waits_with_several(
    monkeypatch: pytest.MonkeyPatch, started: dict[str, str]
) -> None:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    signal.raise_signal(signal.SIGTERM)
    assert interrupt.requested() == signal.SIGTERM
    for name in started:
        monkeypatch.delenv(name)
    interrupt.request.signal = None
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("signals_installed")
def test_sigterm_after_a_notice_does_not_cut_the_saving_short() -> None:
    os.kill(os.getpid(), signal.SIGUSR2)
    signal.raise_signal(signal.SIGTERM)
    assert interrupt.requested() == signal.SIGTERM
