"""`federation.engine=flower`: a Flower ServerApp and ClientApp on Flower's simulation engine, which Ray runs.

Flower's engine runs in a thread of this process; the ServerApp's main function lends its grid to the thread that called
`run`, and waits. So the server's code runs where the caller is: signals, tracebacks and what torch keeps per thread are
as with the in-process engine, and nothing goes on in the background once `run` has returned. (`flwr run` would leave a
SuperLink running.)
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from typing_extensions import override

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted, UserError
from subspace_lab.federated.exchange import Engine, Exchange
from subspace_lab.federated.flower.processes import Processes
from subspace_lab.federated.flower.quiet import quiet

if TYPE_CHECKING:
    from flwr.app import Context
    from flwr.serverapp import Grid

    from subspace_lab.federated.flower.app import Build

T = TypeVar("T")
_ATTEMPTS = 3
_GRACE_S = 3.0  # Flower's threads look every second whether they should end
_SOCKET_PATH = 107 - 64  # what Ray's socket names leave of the longest path of a Unix socket


class FlowerEngine(Engine):
    """Clients as Flower nodes, in one Ray worker per core.

    Args:
        cfg: the validated configuration, from which every worker builds the clients.
        clients: how many there are.
        device: where clients compute, for torch.
        secure: sums over clients come from secure aggregation.
        build: makes the clients from the configuration and the device; None: `ClientPool`.
    """

    def __init__(
        self,
        cfg: DictConfig,
        clients: int,
        *,
        device: str = "cpu",
        secure: bool = False,
        build: Build | None = None,
    ) -> None:
        self._configuration = OmegaConf.to_yaml(cfg, resolve=True)
        self._clients, self._device, self._secure, self._build = clients, device, secure, build

    @override
    def run(self, main: Callable[[Exchange], T]) -> T:
        """Start Flower and Ray, call `main`, stop both: no process is left, whatever `main` raises.

        Raises:
            UserError: flwr or Ray is not installed, or does not start, or a client fails; whatever `main` raises.
        """
        with quiet():
            from subspace_lab.federated.flower.app import client_app
            from subspace_lab.federated.flower.exchange import FlowerExchange

            app = client_app(self._configuration, self._device, self._build)
            simulation = _Simulation(app, self._clients)
            try:
                simulation.start()
                grid = simulation.grid()
                _take_signals_back()
                exchange = FlowerExchange(grid, self._clients, secure=self._secure, check=simulation.check)
                exchange.connect()
                simulation.starting = False
                return main(exchange)
            finally:
                simulation.stop()


class _Simulation:
    """Flower's engine in a thread, and the processes it starts.

    Args:
        app: a flwr ClientApp.
        clients: how many nodes run it.

    Attributes:
        starting: until all nodes are there.
    """

    def __init__(self, app: Any, clients: int) -> None:
        self._app, self._clients = app, clients
        self._folder = _short_folder()
        self._processes = Processes(self._folder)
        self._thread = threading.Thread(target=self._run, name="flower", daemon=True)
        self._lent: Grid | None = None
        self._running, self._done, self._ended = threading.Event(), threading.Event(), threading.Event()
        self._error: BaseException | None = None
        self.starting = True

    def start(self) -> None:
        self._thread.start()

    def grid(self) -> Grid:
        """Wait for the ServerApp to run; returns its grid."""
        while not self._running.wait(0.05):
            self.check()
        assert self._lent is not None
        return self._lent

    def check(self) -> None:
        """Raise if the engine has ended, or if a signal asks for the end before there is anything to save.

        Raises:
            UserError: with the engine's error.
            Interrupted: while starting.
        """
        if self.starting and interrupt.requested() is not None:
            raise Interrupted("interrupted while Flower was starting; nothing is lost")
        if self._ended.is_set():
            raise UserError(
                f"Flower's simulation engine stopped: {_root(self._error)}",
                hint="federation.engine=inprocess needs no other process",
            )

    def stop(self) -> None:
        """Let the ServerApp return, wait until nothing of Flower and Ray is left, then raise what arrived meanwhile."""
        interrupted: BaseException | None = None
        self._done.set()
        pressed = time.monotonic() + _GRACE_S
        ended = self._thread.ident is None  # a signal came before it had begun
        while not ended:
            try:
                # Not Thread.join: of one that a signal interrupts Python 3.11 believes that the thread has ended.
                ended = self._ended.wait(0.1)
                if not ended and time.monotonic() > pressed:
                    self._processes.kill_clients()  # one is busy with what nobody waits for any more
                    pressed = time.monotonic() + _GRACE_S
            except (KeyboardInterrupt, Interrupted) as signalled:
                interrupted = signalled
        if interrupted is not None:
            raise interrupted

    def _run(self) -> None:
        import ray
        from flwr.serverapp import ServerApp
        from flwr.simulation import run_simulation

        server = ServerApp()

        @server.main()
        def lend(grid: Grid, context: Context) -> None:
            self._lent = grid
            self._running.set()
            self._done.wait()
            self._processes.note()

        try:
            self._start_ray()
            if not self._done.is_set():
                resources: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
                run_simulation(server, self._app, self._clients, backend_config=resources)
        except BaseException as error:
            self._error = error
        finally:
            with contextlib.suppress(Exception):
                ray.shutdown()
                self._processes.end()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._ended.set()

    def _start_ray(self) -> None:
        """Start Ray as Flower would, and again where a busy machine takes longer than the 30 s that Ray allows."""
        import ray

        path = os.pathsep.join([*sys.path, *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        for attempt in range(_ATTEMPTS):
            try:
                ray.init(
                    address="local",  # never a cluster that RAY_ADDRESS names
                    num_cpus=min(len(os.sched_getaffinity(0)), self._clients),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.CRITICAL,
                    runtime_env={"env_vars": {"PYTHONPATH": path}},
                    _temp_dir=str(self._folder),
                )
                return
            except Exception:
                ray.shutdown()
                self._processes.end()
                if attempt == _ATTEMPTS - 1 or self._done.is_set():
                    raise


def _take_signals_back() -> None:
    """Set every handler again: Ray's core sets its own below Python, and with that SIGTERM ends the process at once."""
    if threading.current_thread() is threading.main_thread():
        for number in interrupt.WATCHED:
            handler = signal.getsignal(number)
            if handler is not None:
                signal.signal(number, handler)


def _short_folder() -> Path:
    """A new folder for Ray's session, where the names of its sockets are not too long."""
    parent = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix="ray-", dir=parent if len(parent) + 13 < _SOCKET_PATH else "/tmp"))


def _root(error: BaseException | None) -> str:
    """What was wrong in the first place, in one line."""
    if error is None:
        return "no reason is known"
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
