"""Weights & Biases against a server on this machine: what arrives, what is kept, and what a bad server costs."""

from __future__ import annotations

import http.server
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from subspace_lab.training import wandb_server
from subspace_lab.training.wandb_logger import WandbRunLogger

ABOUT = {
    "project": "subspace-lab",
    "entity": None,
    "group": "galore+none-20261121",
    "job_type": "galore",
    "tags": ["galore", "mlp", "mine"],
    "config": {"method": {"rank": 4}, "sweep": {"method": "galore", "optimizer.lr": 0.1}},
}


class Server(http.server.ThreadingHTTPServer):
    """Speaks as much of W&B's protocol as its client needs, and keeps what it is sent; may stop answering.

    Attributes:
        runs: the variables of every run that was announced.
        streamed: (run, file, lines) in the order of arrival.
        mute: nothing is answered any more.
        status: of every answer.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.runs: list[dict[str, Any]] = []
        self.streamed: list[tuple[str, str, list[str]]] = []
        self.mute = threading.Event()
        self.status = 200
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error."""


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        if self.server.mute.is_set():
            time.sleep(60)
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        told: dict[str, Any] = {}
        if self.path == "/graphql":
            told = self._graphql(json.loads(raw))
        elif match := re.search(r"/([^/]+)/file_stream$", self.path):
            for name, part in (json.loads(raw).get("files") or {}).items():
                self.server.streamed.append((match[1], name, part["content"]))
        body = json.dumps(told).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST

    def _graphql(self, asked: dict[str, Any]) -> dict[str, Any]:
        query, given = asked["query"], asked.get("variables") or {}
        if "upsertBucket" in query:
            self.server.runs.append(given)
            project = {"id": "cA==", "name": given["project"], "entity": {"id": "ZQ==", "name": "me"}}
            bucket = {"id": "cg==", "name": given["name"], "displayName": given["name"], "project": project}
            return {"data": {"upsertBucket": {"bucket": bucket, "inserted": True}}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.server.address}/upload/{name}"} for name in given["files"]]
            return {"data": {"createRunFiles": {"runID": "cg==", "uploadHeaders": [], "files": files}}}
        return {"data": {}}

    def log_message(self, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.shutdown()


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
    monkeypatch.setattr(wandb_server, "_asked", {})


def log_some(run_dir: Path, rows: int = 3, **more: Any) -> WandbRunLogger:
    run_dir.mkdir(exist_ok=True)
    logger = WandbRunLogger(run_dir, ABOUT, **more)
    for row in range(rows):
        logger.log_metrics({"train/loss": 1.0 / (row + 1)}, step=10 * row)
    return logger


def rows_of(server: Server, run: str) -> list[dict[str, Any]]:
    lines = [
        line for own, name, lines in server.streamed if (own, name) == (run, "wandb-history.jsonl") for line in lines
    ]
    return [json.loads(line) for line in lines]


def test_offline_files_are_synced(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_BASE_URL", server.address)
    log_some(tmp_path / "run").close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("wandb: no API key, logging offline; upload later with: wandb sync ")
    assert not server.runs, "nothing was sent"
    (folder,) = (tmp_path / "run" / "wandb").glob("offline-*")
    assert line.endswith(f"{tmp_path}/run/wandb/offline-*")
    done = subprocess.run(
        [sys.executable, "-m", "wandb", "sync", str(folder)],
        env=os.environ | {"WANDB_API_KEY": "0" * 40, "WANDB_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    run = server.runs[0]
    assert run["name"] == (tmp_path / "run" / "wandb_id").read_text().strip()
    assert (run["project"], run["groupName"], run["jobType"]) == ("subspace-lab", ABOUT["group"], "galore")
    assert run["tags"] == ABOUT["tags"]
    config = json.loads(run["config"])
    assert config["sweep"]["value"] == {"method": "galore", "optimizer.lr": 0.1}
    rows = rows_of(server, run["name"])
    assert [(row["step"], round(row["train/loss"], 3)) for row in rows] == [(0, 1.0), (10, 0.5), (20, 0.333)]
    summary = [line for _, name, lines in server.streamed if name == "wandb-summary.json" for line in lines][-1]
    assert json.loads(summary)["step"] == 20


def test_a_cell_of_a_sweep_says_nothing_and_a_resume_keeps_the_id(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    first = log_some(tmp_path / "run", announce=False)
    first.close()
    name = first.version or (tmp_path / "run" / "wandb_id").read_text().strip()
    second = log_some(tmp_path / "run", announce=False)
    assert second.version == name
    second.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["nobody listens", "never answers", "is broken"])
def test_a_bad_server_costs_seconds_and_no_row(
    kind: str, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    address = server.address
    if kind == "never answers":
        server.mute.set()
    elif kind == "is broken":
        server.status = 503
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"http://127.0.0.1:{free.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", address)
    begun = time.monotonic()
    assert wandb_server.obstacle(address) == f"{address} does not answer"
    assert time.monotonic() - begun < wandb_server.PATIENCE + 2
    begun = time.monotonic()
    assert wandb_server.obstacle(address) is not None
    assert time.monotonic() - begun < 0.1, "asked once for all cells"
    log_some(tmp_path / "run").close()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"wandb: {address} does not answer, logging offline; ")
    assert list((tmp_path / "run" / "wandb").glob("offline-*/*.wandb"))


def test_an_answer_of_any_kind_is_an_answer(server: Server) -> None:
    for server.status in (200, 401, 404):
        assert wandb_server.answers(server.address)


@pytest.mark.slow
def test_a_server_that_stops_answering_midway_neither_stops_nor_holds_up_a_run(server: Server, tmp_path: Path) -> None:
    """In a process of its own, whose end waits for wandb's: the limits are those of wandb_logger, twice the finish."""
    program = (
        "import sys, time; from pathlib import Path; from tests_here import log_some\n"
        "logger = log_some(Path('run'), 1); print('started', flush=True); sys.stdin.readline()\n"
        "begun = time.monotonic()\n"
        "for row in range(500): logger.log_metrics({'train/loss': 1.0}, step=row)\n"
        "print('rows', time.monotonic() - begun); logger.close(); print('all done', flush=True)"
    )
    (tmp_path / "tests_here.py").symlink_to(__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"WANDB_BASE_URL": server.address, "PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    assert process.stdout.readline() == "started\n" and server.runs
    server.mute.set()
    process.stdin.write("\n")
    begun = time.monotonic()
    out, _ = process.communicate(timeout=100)
    lasted = time.monotonic() - begun
    assert process.returncode == 0 and "all done" in out
    assert float(out.split()[1]) < 5, "rows do not wait"
    assert lasted < 40
    print(f"after the server fell silent: {lasted:.1f} s")
    assert list((tmp_path / "run" / "wandb").glob("run-*/*.wandb")), "what could not be sent is on the disk"
