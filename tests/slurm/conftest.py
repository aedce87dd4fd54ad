"""A real SLURM for this session; its tests are skipped where it cannot be had."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from slurm.cluster_harness import Cluster, load_script, use


@pytest.fixture(scope="session")
def local_slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    module = load_script("local_slurm")
    reason = module.why_not()
    if reason is not None:
        pytest.skip(f"no SLURM here: {reason}")
    cluster = module.LocalSlurm(tmp_path_factory.mktemp("slurm") / "slurm")
    cluster.up()
    yield cluster
    cluster.down()


@pytest.fixture
def slurm(local_slurm: Any, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster, used from an empty folder; what a failed test leaves is printed and cancelled."""
    made = use(local_slurm, tmp_path)
    yield made
    if made.jobs:
        print(made.everything())
        made.run("scancel", *made.jobs, check=False)
        made.wait("empty queue", lambda: not made.run("squeue", "-h").strip(), 60)
