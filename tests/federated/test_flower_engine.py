"""The Flower engine with its real simulation: the numbers of one process, and nothing left behind.

Ray takes its time to start: the test that is not slow does all it can in one run.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from federated.flower_clients import ArithmeticClients, arithmetic
from omegaconf import OmegaConf
from safetensors.torch import load_file

from subspace_lab import interrupt
from subspace_lab.errors import UserError
from subspace_lab.federated.exchange import Exchange, InProcess, Question, Work
from subspace_lab.federated.flower.engine import FlowerEngine

CLIENTS = 10
WORK = Work(task=1, round=4, lr_scale=0.5)
REPOSITORY = Path(__file__).parents[2]


def engine(clients: int = CLIENTS, secure: bool = False, **config: Any) -> FlowerEngine:
    return FlowerEngine(OmegaConf.create({"text": "a: 'b'", **config}), clients, secure=secure, build=arithmetic)


def descendants(pid: int | None = None) -> dict[int, str]:
    """Running processes below this one, or below another, and all of Ray's: theirs may have lost their parent."""
    parents, names = dict[int, int](), dict[int, str]()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except OSError:
            continue
        if state != "Z":
            parents[int(folder.name)], names[int(folder.name)] = int(parent), command
    below = {pid or os.getpid()}
    while more := {child for child, parent in parents.items() if parent in below} - below:
        below |= more
    wanted = below - {pid or os.getpid()}
    return {number: names[number] for number in names if number in wanted or "ray::" in names[number]}


def listening(pids: Iterator[int]) -> set[str]:
    """Addresses, in the kernel's writing, at which processes wait for connections over TCP."""
    wanted = set()
    for pid in pids:
        for link in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                wanted.add(os.readlink(link))
            except OSError:
                continue
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in wanted:
                found.add(fields[1].rsplit(":", 1)[0])
    return found


LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}


def rounds(exchange: Exchange, count: int) -> torch.Tensor:
    """Some rounds of averaging with changing participants."""
    weights = torch.randn(1003, generator=torch.Generator().manual_seed(0))
    for number in range(count):
        chosen = [client for client in range(CLIENTS) if (client + number) % 3]
        coefficients = [1 / len(chosen)] * len(chosen)
        weights = weights + exchange.sum_train(weights, chosen, Work(0, number, 0.9**number), coefficients).float()
    return weights


def plain(**config: Any) -> InProcess:
    return InProcess(ArithmeticClients(OmegaConf.create(config)))


class Broken(Exception):
    pass


@pytest.mark.slow
def test_one_run(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity, clients' errors, ports, secure sums with a client lost in them; and an error in main leaves nothing."""
    monkeypatch.setattr("tempfile.tempdir", "/tmp")
    before, environment = descendants(), dict(os.environ)
    handlers = {number: signal.getsignal(number) for number in interrupt.WATCHED}
    folders = set(Path("/tmp").glob("ray-*"))
    seen: dict[str, Any] = {}

    def main(exchange: Exchange) -> None:
        seen["weights"] = rounds(exchange, 5)
        weights = seen["weights"]
        seen["train"] = list(exchange.train(weights, [1, 4, 8], WORK))
        seen["where"] = [answer for _, answer in exchange.ask(weights, range(CLIENTS), Question("where", 0, 0))]
        for client in (3, 4):
            with pytest.raises(UserError) as caught:
                list(exchange.train(weights, [0, client], Work(9, 0)))
            seen[f"error {client}"] = str(caught.value)
        seen["ports"] = listening(iter([os.getpid(), *set(descendants()) - set(before)]))
        exchange._secure = True  # one start serves both ways
        seen["secure"] = exchange.sum_train(weights, range(CLIENTS), WORK, [0.1] * CLIENTS)
        seen["survivors"] = exchange.sum_train(weights, range(CLIENTS), Work(9, 1), [0.1] * CLIENTS)
        seen["left out"] = exchange.left_out
        raise Broken("in main")

    with pytest.raises(Broken, match="in main"):
        engine(failing=[3], refusing=[4], only_in_task=9).run(main)

    assert not set(descendants()) - set(before)
    assert set(Path("/tmp").glob("ray-*")) == folders
    assert dict(os.environ) == environment
    assert {number: signal.getsignal(number) for number in interrupt.WATCHED} == handlers

    assert (seen["weights"] - rounds(plain(), 5)).abs().max() == 0.0
    assert [client for client, _ in seen["train"]] == [1, 4, 8]
    for (_, update), (_, wanted) in zip(seen["train"], plain().train(seen["weights"], [1, 4, 8], WORK), strict=True):
        assert torch.equal(update, wanted)
    assert {float(answer["threads"]) for answer in seen["where"]} == {1.0}
    assert {float(answer["telemetry"]) for answer in seen["where"]} == {0.0}
    assert os.getpid() not in {int(answer["process"]) for answer in seen["where"]}
    assert seen["error 3"].startswith("client 3: ZeroDivisionError: no examples (flower_clients.py:")
    assert seen["error 4"] == "client 4: this client has no data (give it some)"
    assert seen["ports"] and seen["ports"] <= LOOPBACK
    wanted = plain().sum_train(seen["weights"], range(CLIENTS), WORK, [0.1] * CLIENTS)
    torch.testing.assert_close(seen["secure"], wanted, rtol=0, atol=1e-9)
    there = [client for client in range(CLIENTS) if client not in (3, 4)]
    assert seen["left out"] == (3, 4)
    wanted = plain().sum_train(seen["weights"], there, Work(9, 1), [0.125] * 8)
    torch.testing.assert_close(seen["survivors"], wanted, rtol=0, atol=1e-9)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("warning: secure sum of 8 of 10 clients: client 3: ") and err.count("\n") == 1


@pytest.mark.parametrize("package", ["flwr", "ray"])
def test_a_missing_package_is_named_with_what_to_type(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] in ("flwr", "ray")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"needs the package {package}") as caught:
        engine().run(lambda exchange: None)
    assert caught.value.hint == "pip install subspace-lab[flower]"


# -- slow: a start of Ray each -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_in_one_process_and_folders_with_spaces(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = descendants()
    (tmp_path / "my runs").mkdir()
    monkeypatch.chdir(tmp_path / "my runs")
    with TemporaryDirectory(prefix="a b ", dir="/tmp") as place:
        for secure in (False, True):
            with monkeypatch.context() as patched:
                patched.setattr("tempfile.tempdir", place)
                weights = engine(secure=secure).run(lambda exchange: rounds(exchange, 2))
            assert (weights - rounds(plain(), 2)).abs().max() < 1e-6
            assert not set(descendants()) - set(before) and not os.listdir(place)
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_worker_that_dies_is_an_error_and_leaves_nothing() -> None:
    before = descendants()
    with pytest.raises(UserError, match=r"^client 2: Flower lost it") as caught:
        engine(dying=[2]).run(lambda exchange: rounds(exchange, 2))
    assert "\n" not in str(caught.value)
    assert not set(descendants()) - set(before)


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from pathlib import Path
from omegaconf import OmegaConf
from safetensors.torch import load_file
from subspace_lab import interrupt
interrupt.install()
from subspace_lab.errors import Interrupted
from federated.flower_clients import arithmetic
from subspace_lab.federated.exchange import Work
from subspace_lab.federated.flower.engine import FlowerEngine
import torch

def main(exchange):
    interrupt.request.armed = {armed}
    if {busy}:
        list(exchange.train(torch.zeros(5), range(4), Work(0, 0)))
    Path({marker!r}).touch()
    while interrupt.requested() is None:
        list(exchange.train(torch.zeros(5), range(4), Work(1, 0)))
    raise Interrupted("everything is saved")

cfg = OmegaConf.create({{"sleeping": [2], "only_in_task": 0, "marker": {marker!r}}})
try:
    FlowerEngine(cfg, 4, build=arithmetic).run(main)
except BaseException as error:
    print(type(error).__name__, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("number", "armed", "busy", "when", "name"),
    [
        (signal.SIGINT, True, False, "running", "Interrupted"),
        (signal.SIGTERM, True, False, "running", "UserError"),  # of the round: Ray's processes are told too
        (signal.SIGINT, False, True, "running", "KeyboardInterrupt"),
        (signal.SIGTERM, False, True, "running", "Interrupted"),
        (signal.SIGINT, False, False, "starting", "KeyboardInterrupt"),
        (signal.SIGKILL, True, False, "running", ""),
    ],
)
def test_signals_leave_nothing(
    number: signal.Signals, armed: bool, busy: bool, when: str, name: str, tmp_path: Path
) -> None:
    marker = tmp_path / "there"
    code = SCRIPT.format(tests=str(REPOSITORY / "tests"), armed=armed, busy=busy, marker=str(marker))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    known: set[int] = set()
    deadline = time.monotonic() + 400
    while time.monotonic() < deadline and process.poll() is None:
        known |= set(descendants(process.pid))
        raylet = any("raylet" in command for command in descendants(process.pid).values())
        if marker.exists() if when == "running" else raylet:
            break
        time.sleep(0.2)
    assert process.poll() is None
    began = time.monotonic()
    os.killpg(process.pid, number)  # as the terminal does: to Ray's processes as well
    told, _ = process.communicate(timeout=120)
    took = time.monotonic() - began
    assert told.strip() == name
    if number == signal.SIGKILL:
        time.sleep(10)  # Ray notices by itself
    left = {pid: command for pid, command in descendants(process.pid).items() if pid in known or "ray::" in command}
    assert not left
    assert not [pid for pid in known if Path(f"/proc/{pid}/stat").exists() and _runs(pid)]
    assert took < 60


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("secure", [False, True])
def test_a_whole_run_is_that_of_one_process(secure: bool, tmp_path: Path) -> None:
    """`subspace-lab` with FOT: two tasks with rounds, sketches and projections, weights to 1e-6."""
    exports = []
    words = ["method=fot", "scenario.tasks=2", "federation.rounds=2", "seed=3", "trainer.progress=off"]
    for engine_name in ("inprocess", "flower"):
        folder = tmp_path / engine_name
        options = [
            f"federation.engine={engine_name}",
            f"federation.secure_aggregation={secure and engine_name == 'flower'}",
        ]
        done = subprocess.run(
            [sys.executable, "-m", "subspace_lab", *words, *options, f"hydra.run.dir={folder}"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        exports.append(load_file(next(folder.rglob("*.safetensors"))))
    plainly, carried = exports
    assert plainly.keys() == carried.keys()
    for name, tensor in plainly.items():
        assert (tensor - carried[name]).abs().max() < 1e-6, name
