"""Which folder a run goes to: fresh, the one to continue, the job's own; and who may write in it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig

from subspace_lab import rundir
from subspace_lab.schema import config_hash


class Runs:
    """A stand-in for training that writes what a real run writes, and ends with a chosen status."""

    def __init__(self) -> None:
        self.status = "completed"
        self.folders: list[Path] = []
        self.configs: list[DictConfig] = []
        self.names: list[str] = []

    def __call__(self, cfg: DictConfig) -> float:
        folder = Path(cfg.paths.output_dir)
        self.folders.append(folder)
        self.configs.append(cfg)
        self.names.append(cfg.name)
        (folder / rundir.HASH_FILE).write_text(config_hash(cfg))
        if self.status != "killed":
            (folder / rundir.RESULTS_FILE).write_text(json.dumps({"status": self.status}))
        return 1.5


@pytest.fixture
def runs(fake_run) -> Runs:
    made = Runs()
    fake_run(made)
    return made


def test_a_run_has_its_folder_log_and_overrides(command, runs: Runs, tmp_path: Path) -> None:
    answer = command("seed=3")
    assert answer.code == 0, answer.err
    (folder,) = runs.folders
    assert folder.parent == tmp_path / "outputs" / "galore_llama_tiny_stdlib_text"
    assert (folder / "run.log").is_file()
    assert "seed=3" in (folder / ".hydra" / "overrides.yaml").read_text()
    assert Path.cwd() == tmp_path


@pytest.mark.parametrize("status", ["killed", "interrupted", "failed"])
def test_auto_continues_the_unfinished_run_of_the_same_configuration(command, runs: Runs, status: str) -> None:
    runs.status = "completed"
    command("seed=2")
    runs.status = status
    command("seed=1")
    command("seed=1", "resume=auto")
    other, first, continued = runs.folders
    assert continued == first != other
    assert runs.configs[-1].resume == "auto"


def test_auto_starts_afresh_where_nothing_fits(command, runs: Runs) -> None:
    runs.status = "killed"
    command("seed=1")
    command("seed=2", "resume=auto")
    assert runs.folders[0] != runs.folders[1]


def test_auto_says_that_a_run_is_finished(command, runs: Runs) -> None:
    command("seed=1")
    answer = command("seed=1", "resume=auto")
    assert answer.code == 0
    assert "already finished" in answer.err and str(runs.folders[0]) in answer.err
    assert len(runs.folders) == 1


def test_resume_repeats_the_overrides_from_anywhere(command, runs: Runs, tmp_path: Path, monkeypatch) -> None:
    runs.status = "interrupted"
    command("seed=7", "data.batch_size=3")
    elsewhere = tmp_path / "else where"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    answer = command("resume", str(runs.folders[0]), "trainer.log_every=2")
    assert answer.code == 0, answer.err
    cfg = runs.configs[1]
    assert runs.folders[1] == runs.folders[0]
    assert (cfg.seed, cfg.data.batch_size, cfg.trainer.log_every) == (7, 3, 2)
    assert Path(cfg.resume) == runs.folders[0]


def test_resume_of_a_finished_run_does_nothing(command, runs: Runs) -> None:
    command("seed=1")
    answer = command("resume", str(runs.folders[0]))
    assert answer.code == 0 and "already finished" in answer.err
    assert len(runs.folders) == 1


def test_a_slurm_job_keeps_its_folder_when_requeued(command, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    runs.status = "killed"
    command("seed=1")
    assert runs.folders[0].name == "4711"
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    command("seed=1")
    assert runs.folders[1] == runs.folders[0]
    assert runs.configs[1].resume == "auto"
    # Another run inside the same job must not write over it.
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    command("seed=2")
    assert runs.folders[2].name == "4711-2"


def test_array_tasks_have_their_own_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "10")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert rundir.run_id() == "10_2"


def test_a_sweep_has_one_folder_and_continues_in_it(command, runs: Runs, tmp_path: Path) -> None:
    runs.status = "killed"
    answer = command("-m", "method=galore,none", "seed=range(0,2)")
    assert answer.code == 1 and "4 of 4 cells are interrupted" in answer.err, answer.err
    group = tmp_path / "outputs" / "galore+none_llama_tiny_stdlib_text" / "sweeps"
    (sweep,) = group.iterdir()
    assert [folder.relative_to(sweep).as_posix() for folder in runs.folders] == ["0", "1", "2", "3"]
    assert set(runs.names) == {"galore_llama_tiny_stdlib_text", "none_llama_tiny_stdlib_text"}
    command("-m", "method=galore,none", "seed=range(0,2)", "resume=auto")
    assert runs.folders[4:] == runs.folders[:4]


def test_a_failing_job_does_not_stop_the_sweep(command, runs: Runs, fake_run) -> None:
    def second_fails(cfg: DictConfig) -> float:
        runs(cfg)
        if cfg.seed == 0:
            raise ValueError("job went wrong")
        return 0.0

    fake_run(second_fails)
    answer = command("-m", "seed=0,1")
    assert answer.code == 1
    assert len(runs.folders) == 2
    assert "job went wrong" in answer.err and "Traceback" not in answer.err


def test_newest_by_start(tmp_path: Path) -> None:
    for age, name in enumerate(("c", "a", "b")):
        (tmp_path / name).mkdir()
        file = tmp_path / name / rundir.HASH_FILE
        file.write_text("h\n")
        os.utime(file, (1000 - age, 1000 - age))
    (tmp_path / "c" / rundir.RESULTS_FILE).write_text('{"status": "comp')  # cut short by a kill
    assert rundir.newest(tmp_path, "h") == rundir.Found(tmp_path / "c", completed=False)
    assert rundir.newest(tmp_path, "other") is None


def test_two_processes_never_write_in_one_folder(command, runs: Runs) -> None:
    runs.status = "killed"
    command("seed=1")
    folder = runs.folders[0]
    program = (
        "import sys; from pathlib import Path; from subspace_lab import rundir\n"
        "with rundir.locked(Path(sys.argv[1])):\n    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    try:
        for words in (["seed=1", "resume=auto"], ["resume", str(folder)]):
            answer = command(*words)
            assert answer.code == 2
            assert f"process {holder.pid}" in answer.err
    finally:
        holder.kill()
        holder.wait()
    # The kernel dropped the lock with the process.
    assert command("seed=1", "resume=auto").code == 0
    assert runs.folders[-1] == folder
