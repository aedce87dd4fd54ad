"""Weights & Biases, which may be unreachable, misconfigured or slow, and must never stop a run for it."""

from __future__ import annotations

import contextlib
import netrc
import os
import socket
import sys
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

_ID_FILE = "wandb_id"


class WandbRunLogger(Logger):
    """Logs rows to W&B by optimizer step.

    The run's id is kept in the run folder, so that a resumed run goes on in the same W&B run. Without WANDB_MODE and
    without an API key it works offline and says so. After a first failure it says so in one line and logs no more.

    Args:
        run_dir: the run folder.
        settings: arguments of wandb.init.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        super().__init__()
        self._run: Any = None
        self._guard(lambda: self._start(run_dir, settings))

    def _start(self, run_dir: Path, settings: Mapping[str, Any]) -> None:
        import wandb

        id_file = run_dir / _ID_FILE
        run_id = id_file.read_text().strip() if id_file.is_file() else uuid.uuid4().hex[:8]
        if not os.environ.get("WANDB_MODE"):
            os.environ.pop("WANDB_MODE", None)  # empty: wandb would refuse it
        mode: Any = os.environ.get("WANDB_MODE")
        server = os.environ.get("WANDB_BASE_URL") or str(wandb.Settings().base_url)
        # Looked at before wandb.init, which would try for a minute and then keep nothing.
        obstacle = None
        if mode is None and not _has_key(server):
            obstacle = "no API key"
        elif mode in (None, "online") and not _reachable(server):
            obstacle = f"{server} does not answer"
        if obstacle is not None:
            mode = "offline"
            print(
                f"wandb: {obstacle}, logging offline; upload later with: wandb sync {run_dir}/wandb/offline-*",
                file=sys.stderr,
            )
        # `reinit`: a compared baseline in the same process is a run of its own. No console capture, no prompts.
        self._run = wandb.init(
            **settings,
            id=run_id,
            resume="allow",
            dir=str(run_dir),
            mode=mode,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True, init_timeout=60),
        )
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
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            print(f"wandb: {reason}; the run goes on without it", file=sys.stderr)


def _reachable(server: str) -> bool:
    """Return whether something listens at the server's address, or a proxy stands in between."""
    parts = urllib.parse.urlsplit(server)
    if parts.scheme in urllib.request.getproxies():
        return True
    try:
        port = parts.port or (80 if parts.scheme == "http" else 443)
        socket.create_connection((parts.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def _has_key(server: str) -> bool:
    """Return whether `wandb login` or WANDB_API_KEY has left a key, without asking the network or the user."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urllib.parse.urlsplit(server).hostname or ""
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
