"""Weights & Biases, which may be unreachable, misconfigured, slow or gone halfway, and must never stop a run for it."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from subspace_lab.training import wandb_server

_ID_FILE = "wandb_id"
# Seconds: for a server that answers and then does nothing; for what is left to be sent at the end, once by the run and
# once by wandb's own process. What is not sent stays on the disk.
_INIT_TIMEOUT = 10.0
_FINISH_TIMEOUT = 10.0


class WandbRunLogger(Logger):
    """Logs rows to W&B by optimizer step.

    The run's id is kept in the run folder, so that a resumed run goes on in the same W&B run. Without an API key or
    with a server that does not answer it works offline and says so. After a first failure it says so in one line and
    logs no more.

    Args:
        run_dir: the run folder.
        settings: arguments of wandb.init.
        announce: whether to say that there is no key; a sweep says it once for all its cells.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], *, announce: bool = True) -> None:
        super().__init__()
        self._run: Any = None
        self._guard(lambda: self._start(run_dir, settings, announce))

    def _start(self, run_dir: Path, settings: Mapping[str, Any], announce: bool) -> None:
        id_file = run_dir / _ID_FILE
        run_id = id_file.read_text().strip() if id_file.is_file() else uuid.uuid4().hex[:8]
        mode, server = wandb_server.wanted_mode(), wandb_server.address()
        obstacle = wandb_server.obstacle(server) if mode in (None, "online") else None
        if obstacle is not None:
            mode = "offline"
            if announce or obstacle != wandb_server.NO_KEY:
                wandb_server.tell_offline(obstacle, run_dir)
        arguments = {**settings, "id": run_id, "resume": "allow", "dir": str(run_dir.absolute())}
        try:
            self._run = _init(arguments, mode)
        except Exception as error:
            if mode not in (None, "online"):
                raise
            wandb_server.give_up(server, f"{server} does not work")
            wandb_server.tell_offline(_first_line(error), run_dir)
            self._run = _init(arguments, "offline")
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        id_file.write_text(run_id + "\n")

    @property
    def name(self) -> str:
        """Return the kind of logger."""
        return "wandb"

    @property
    def version(self) -> str:
        """Return the W&B run id."""
        return str(self._run.id) if self._run is not None else ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the configuration was given at the start."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Send one row; `step` is a column of its own, so that a resumed run may write a step again."""
        if self._run is not None:
            self._guard(lambda: self._run.log({**metrics, "step": step}))

    def log_table(self, name: str, columns: list[str], rows: list[list[Any]]) -> None:
        """Send a table."""
        if self._run is None:
            return
        import wandb

        self._guard(lambda: self._run.log({name: wandb.Table(columns=[*columns], data=rows)}))

    def finalize(self, status: str) -> None:
        """End a failed W&B run. Lightning calls this after every loop; a good run is ended by `close`."""
        if status != "success":
            self._finish(1)

    def close(self) -> None:
        """End the W&B run, when everything is logged."""
        self._finish(0)

    def _finish(self, exit_code: int) -> None:
        if self._run is not None:
            self._guard(lambda: self._run.finish(exit_code=exit_code))
            self._run = None

    def _guard(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:
            self._run = None
            print(f"wandb: {_first_line(error)}; the run goes on without it", file=sys.stderr)


def _init(arguments: Mapping[str, Any], mode: str | None) -> Any:
    """Start a W&B run: a compared baseline in the same process is one of its own; no console capture, no prompts."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")  # read before the settings below are
    settings = wandb.Settings(console="off", silent=True, init_timeout=_INIT_TIMEOUT, finish_timeout=_FINISH_TIMEOUT)
    chosen: Any = mode
    return wandb.init(**arguments, mode=chosen, reinit="create_new", settings=settings)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
