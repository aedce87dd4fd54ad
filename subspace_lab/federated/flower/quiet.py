"""What Flower and Ray must not do to the process that calls them: report home, listen to the network, chatter."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from subspace_lab.errors import UserError

ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    # Under `uv run` Ray would otherwise pack and copy the working folder for its workers.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    # Workers see the GPUs that this process sees, so that the same configuration finds the same device.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Its limits are short for a machine that has other work to do.
    "RAY_agent_register_timeout_ms": "600000",
    "RAY_gcs_server_request_timeout_seconds": "600",
    "RAY_worker_register_timeout_seconds": "600",
}
# Flower keeps its state in a database in memory, whose tables alembic makes.
LEVELS = {"flwr": logging.CRITICAL, "alembic": logging.WARNING}
# What importing and starting Ray sets besides.
TOUCHED = (*ENVIRONMENT, "PYTHONBREAKPOINT", "RAY_CLIENT_MODE", "GRPC_VERBOSITY")


@contextmanager
def quiet() -> Iterator[None]:
    """Import Flower and Ray without telemetry and without a word, and put back afterwards what they change.

    Errors are not lost by it: they are raised, or come in the clients' replies.

    Raises:
        UserError: a package is not installed.
    """
    before = {name: os.environ.get(name) for name in TOUCHED}
    levels = {logger: logger.level for logger in map(logging.getLogger, LEVELS)}
    os.environ.update(ENVIRONMENT)
    try:
        _silence()
        _import()
        _silence()  # importing Flower sets its own level
        from ray._private import ray_constants, worker

        cluster, tell = ray_constants.ENABLE_RAY_CLUSTER, worker.print_to_stdstream
        worker.print_to_stdstream = lambda *arguments, **options: None  # of workers that died, on stdout
        # What Ray itself does on a Mac: the address of this machine is the loopback's, and all ports are bound to that.
        ray_constants.ENABLE_RAY_CLUSTER = False
        try:
            yield
        finally:
            ray_constants.ENABLE_RAY_CLUSTER, worker.print_to_stdstream = cluster, tell
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _silence() -> None:
    for name, level in LEVELS.items():
        logging.getLogger(name).setLevel(level)


def _import() -> None:
    try:
        with warnings.catch_warnings():  # importing the simulation changes the filters of the whole process
            warnings.simplefilter("ignore")
            import flwr.simulation
            import ray
    except ImportError as error:
        raise UserError(
            f"federation.engine=flower needs the package {error.name or 'flwr'}",
            hint="pip install subspace-lab[flower]",
        ) from error
    if ray.is_initialized():
        raise UserError(
            "Ray is already running in this process, and Flower would shut it down",
            hint="use federation.engine=inprocess here",
        )
    assert flwr.simulation is not None
