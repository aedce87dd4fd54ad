"""Cells in other processes: worker processes, a job array on submitit's local cluster, two searches at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from search.fakes import FAKE, configuration

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.protocols.dimension_search import DimensionSearch

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interrupt.request, "signal", None)
    monkeypatch.setenv("PYTHONPATH", f"{TESTS}{os.pathsep}{TESTS.parent}")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def search(root: Path, data: dict[str, Any] | None = None, **arguments: Any) -> dict[str, Any]:
    run_dir = root / "outputs" / "fake" / "run"
    run_dir.mkdir(parents=True, exist_ok=True)
    settings = {"global_baseline": 1.0, "grid": [50, 100, 200], "seeds": 2, "cell": FAKE, **arguments}
    outcome = DimensionSearch(**settings).run(
        configuration(root, **(data or {})), run_dir, label="x", resume_dir=run_dir
    )
    return dict(outcome.sections["search"])


def lives(root: Path) -> list[list[str]]:
    files = sorted((root / "outputs/fake/cells").glob("*/lives"))
    return [line.split() for file in files for line in file.read_text().splitlines()]


def answers(found: dict[str, Any]) -> Any:
    return found["definitions"], found["points"], found["baseline"]


def test_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    alone = search(tmp_path / "alone")
    found = search(tmp_path, launcher="joblib", workers=2)
    assert answers(found) == answers(alone)
    processes = {pid for pid, _ in lives(tmp_path)}
    assert len(processes) <= 2 and str(os.getpid()) not in processes, "each worker lives for many cells"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    assert {threads for _, threads in lives(tmp_path)} == {str(max(1, cores // 2))}
    deadline = time.monotonic() + 10
    while any(_alive(int(pid)) for pid in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_alive(int(pid)) for pid in processes)


def _alive(pid: int) -> bool:
    try:
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_interrupted_workers_save_and_the_search_continues(tmp_path: Path) -> None:
    data = {"seconds": 1.0}

    def ctrl_c() -> None:
        while len(lives(tmp_path)) < 4:
            time.sleep(0.05)
        time.sleep(0.3)
        interrupt.request.signal = signal.SIGINT

    watcher = threading.Thread(target=ctrl_c)
    watcher.start()
    with pytest.raises(Interrupted, match="continue with: subspace-lab resume"):
        search(tmp_path, data, launcher="joblib", workers=2)
    watcher.join()
    interrupt.request.signal = None
    folders = list((tmp_path / "outputs/fake/cells").iterdir())
    saved = [f for f in folders if (f / "steps").is_file()]
    assert saved and not any((f / "result.json").is_file() for f in saved)
    assert all(0 < int((f / "steps").read_text()) < 50 for f in saved)
    finished = len([f for f in folders if (f / "result.json").is_file()])
    found = search(tmp_path, data, launcher="joblib", workers=2)
    assert found["cells"]["reused"] == finished
    assert found["definitions"] == search(tmp_path / "alone")["definitions"]


def test_failures_in_workers(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"grid": [200], "seeds": 1, "launcher": "joblib", "workers": 2}
    with pytest.raises(RuntimeError, match=r"singular matrix \[d=200 seed 0 lr.*error.log"):
        search(tmp_path, {"crash_at": 200}, **settings)
    with pytest.raises(UserError, match=r"a wrong word \[d=200 .*the right word"):
        search(tmp_path, {"mistake_at": 200}, **settings)
    with pytest.raises(UserError, match="a worker process died"):
        search(tmp_path, {"die_at": 200}, **settings)


def test_job_array_on_the_local_cluster(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    found = search(tmp_path, launcher="slurm", workers=2, grid=[50, 200], seeds=1, slurm={"cluster": "local"})
    assert answers(found) == answers(search(tmp_path / "alone", grid=[50, 200], seeds=1))
    assert str(os.getpid()) not in {pid for pid, _ in lives(tmp_path)}
    assert list((tmp_path / "outputs/fake/run/slurm").glob("*_result.pkl"))
    with pytest.raises(UserError, match="a wrong word"):
        search(tmp_path, {"mistake_at": 50}, launcher="slurm", grid=[50], seeds=1, slurm={"cluster": "local"})


def test_slurm_settings_are_checked(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match=r"launcher=slurm: .*partitionn"):
        search(tmp_path, launcher="slurm", slurm={"cluster": "local", "partitionn": "gpu"})


def test_preempted_job_is_saved_and_queued_again(tmp_path: Path) -> None:
    submitit = pytest.importorskip("submitit")
    from subspace_lab.search.cells import CellFactory, CellResult, CellSpec
    from subspace_lab.search.executors import CellJob

    cfg = configuration(tmp_path, seconds=4.0)
    factory = CellFactory(cfg, protocol=FAKE, resume_dir=tmp_path)
    factory.d_max = 256
    task = factory.task(CellSpec("subspace", 0, 1.0, 50))
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=5)
    job = executor.submit(CellJob(), task)
    while not (task.folder / "lives").is_file():
        time.sleep(0.1)
    time.sleep(1)
    os.kill(int(lives(tmp_path)[0][0]), signal.SIGUSR2)  # what SLURM sends before a time limit or preemption
    ended = job.result()
    assert isinstance(ended, CellResult) and ended.value("test/accuracy") > 0.1
    assert 0 < int((task.folder / "steps").read_text()) < 200, "the second life went on where the first was cut off"
    assert len(lives(tmp_path)) == 2


def test_two_searches_at_once_share_their_cells(tmp_path: Path) -> None:
    code = f"""
import json, sys
from pathlib import Path
sys.path.insert(0, {str(TESTS)!r})
from search.test_executors import search, answers
print(json.dumps(answers(search(Path({str(tmp_path)!r}), {{"seconds": 0.2}}))))
"""
    runs = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate()[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert printed[0] == printed[1] and json.loads(printed[0])
    assert len(lives(tmp_path)) == 4 * 4, "no cell is trained twice"
