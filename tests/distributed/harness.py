"""Two processes that are started once and run one case after another, and one beside them that runs alone."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("worker.py")
START_SECONDS = 240.0  # the imports, on a busy machine
CASE_SECONDS = 150.0
GRACE_SECONDS = 20.0  # for one rank when the other has failed
STACK_SECONDS = 2.0
NAMES = ("alone", "rank0", "rank1")
PAIR = ("rank0", "rank1")


class Hang(AssertionError):
    """A process did not answer; the message has all stacks."""


class Processes:
    """The three processes; started when first needed, and again after a hang.

    Args:
        folder: where jobs have their folders.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._process: subprocess.Popen[bytes] | None = None
        self._streams: dict[str, Any] = {}
        self._pids: dict[str, int] = {}

    def run(
        self, what: str, jobs: Mapping[str, Sequence[str]], *, do: str = "protocol", seconds: float = CASE_SECONDS
    ) -> dict[str, dict[str, Any]]:
        """Give jobs to processes and wait for all answers.

        Args:
            what: names the case, and is its folder.
            jobs: for "alone" and for "pair" the overrides.
            do: one of the worker's `DO`.
            seconds: after which whoever has not answered hangs.

        Raises:
            Hang: somebody did not answer in time; the processes have been ended.
        """
        self._start()
        asked = []
        for team, words in jobs.items():
            job = {"do": do, "words": list(words), "folder": str(self.place(what, team))}
            for name in PAIR if team == "pair" else (team,):
                self._streams[name].write(json.dumps(job).encode() + b"\n")
                self._streams[name].flush()
                asked.append(name)
        try:
            told = self._wait(what, asked, seconds)
        except BaseException:  # pytest's own time limit too: answers would come to the next question
            self._end(signal.SIGKILL)
            self.close()
            raise
        if any(not answer.get("error", "Interrupted").startswith("Interrupted") for answer in told.values()):
            self.close()  # who knows which messages of the pair are still under way
        return told

    def place(self, what: str, team: str) -> Path:
        """The run folder of a case."""
        return self.folder / what / team

    def close(self) -> None:
        """End all processes, by their own ids."""
        for stream in self._streams.values():
            with contextlib.suppress(OSError):
                stream.close()
        self._streams = {}
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.wait(5)  # they end when nobody asks any more
        except subprocess.TimeoutExpired:
            self._end(signal.SIGKILL)
            process.kill()
            process.wait()

    def _end(self, number: int) -> None:
        for pid in self._pids.values():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self.close()
        pairs = [socket.socketpair() for _ in NAMES]
        theirs = [pair[1].fileno() for pair in pairs]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(WORKER), str(self.folder), str(port), *map(str, theirs)]
        with (self.folder / "start.log").open("w") as log:
            self._process = subprocess.Popen(
                command,
                pass_fds=theirs,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        for name, (mine, other) in zip(NAMES, pairs, strict=True):
            other.close()
            self._streams[name] = mine.makefile("rwb", buffering=0)
        self._pids = {}
        try:
            self._pids = {name: told["pid"] for name, told in self._wait("start", NAMES, START_SECONDS).items()}
        except BaseException:
            self._process.kill()  # before it has forked, or its children end with their sockets
            self.close()
            raise

    def _wait(self, what: str, names: Sequence[str], seconds: float) -> dict[str, dict[str, Any]]:
        told: dict[str, dict[str, Any]] = {}
        parts = dict.fromkeys(names, b"")
        end = time.monotonic() + seconds
        while len(told) < len(names):
            waiting = {self._streams[name].fileno(): name for name in names if name not in told}
            ready, _, _ = select.select(list(waiting), [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise self._hang(what, sorted(waiting.values()), told)
            for number in ready:
                name = waiting[number]
                read = self._streams[name].read(1 << 16)
                if not read:
                    raise self._hang(what, [f"{name}, which has died"], told)
                parts[name] += read
                if parts[name].endswith(b"\n"):
                    told[name] = json.loads(parts[name])
                    if "error" in told[name] or told[name].get("code"):
                        end = min(end, time.monotonic() + GRACE_SECONDS)
        return told

    def _hang(self, what: str, missing: Sequence[str], told: Mapping[str, Mapping[str, Any]]) -> Hang:
        """End everything and say who stood where."""
        self._end(signal.SIGQUIT)
        time.sleep(STACK_SECONDS)
        text = [f"{what}: no answer from {', '.join(missing)}"]
        text += [f"{name}: {answer.get('traceback', 'is done')}" for name, answer in told.items()]
        for file in [self.folder / "start.log", *sorted(self.folder.glob("stacks-*.txt"))]:
            text.append(f"--- {file.name}\n{file.read_text()[-6000:]}")
        for log in sorted((self.folder / what).glob("*/*.log")):
            text.append(f"--- {log}\n{log.read_text()[-3000:]}")
        return Hang("\n".join(text))


def rows(folder: Path) -> list[dict[str, float]]:
    """metrics.csv without what depends on the clock."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [
            {k: float(v) for k, v in row.items() if v and not any(word in k for word in ("per_second", "seconds"))}
            for row in csv.DictReader(file)
        ]
