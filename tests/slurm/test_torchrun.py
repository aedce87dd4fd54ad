"""Two ranks under torchrun: one folder for both, and a signal to torchrun or to a rank saves both."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from slurm.cluster_harness import identical, results, rows, weights, words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2")
STEPS = 300
START = 400.0


class Torchrun:
    """`torchrun --nproc-per-node 2 -m subspace_lab …` in a folder."""

    def __init__(self, folder: Path, *more: str) -> None:
        self.group = folder / "outputs" / "galore_llama_tiny_text"
        with socket.socket() as one:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
        made = words(folder, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", *more)
        self.log = folder / f"log{port}"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*TORCHRUN, f"--master-port={port}", "-m", "subspace_lab", *made],
                cwd=folder,
                env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
                stdout=log,
                stderr=log,
            )

    def folder(self) -> Path:
        (found,) = self.group.iterdir()
        return found

    def wait_for_rows(self, count: int) -> None:
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.process.poll() is None:
            if self.group.is_dir() and len(rows(self.folder())) >= count:
                return
            time.sleep(0.1)
        self.process.kill()
        pytest.fail(f"no row {count}\n{self.log.read_text()}")

    def ranks(self) -> list[int]:
        listed = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in listed]

    def end(self) -> int:
        try:
            return self.process.wait(START)
        except subprocess.TimeoutExpired:
            self.process.kill()
            pytest.fail(f"torchrun did not end\n{self.log.read_text()}")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = Torchrun(tmp_path_factory.mktemp("undisturbed"), f"trainer.max_steps={STEPS}")
    assert run.end() == 0, run.log.read_text()
    return run.folder()


@pytest.mark.parametrize("how", ["SIGTERM to torchrun", "SIGUSR2 to one rank", "SIGINT to all"])
def test_both_ranks_save_and_the_same_command_continues(how: str, tmp_path: Path, undisturbed: Path) -> None:
    more = (f"trainer.max_steps={STEPS}", "resume=auto")
    first = Torchrun(tmp_path, *more)
    first.wait_for_rows(20)
    if how == "SIGTERM to torchrun":
        first.process.terminate()
    elif how == "SIGUSR2 to one rank":
        os.kill(first.ranks()[1], signal.SIGUSR2)  # not the one that writes
    else:  # as a terminal does
        for pid in (*first.ranks(), first.process.pid):
            os.kill(pid, signal.SIGINT)
    assert first.end() != 0
    folder = first.folder()
    assert results(folder)["status"] == "interrupted", first.log.read_text()
    assert 20 <= len(rows(folder)) < STEPS and "everything is saved" in first.log.read_text()
    second = Torchrun(tmp_path, *more)
    assert second.end() == 0, second.log.read_text()
    assert second.folder() == folder
    assert rows(folder) == rows(undisturbed)
    identical(weights(folder), weights(undisturbed))
