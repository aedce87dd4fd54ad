"""A job's part of a configuration that Hydra composed, and what `${hydra:…}` in it means outside a running job."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict, read_write

from subspace_lab import schema


@contextlib.contextmanager
def hydra_config(cfg: DictConfig) -> Iterator[None]:
    """Let `${hydra:…}` mean `cfg.hydra` for a while."""
    holder = HydraConfig.instance()
    before = holder.cfg
    holder.set_config(cfg)
    try:
        yield
    finally:
        holder.cfg = before


def without_hydra(cfg: DictConfig, *, run_dir: Path | None = None) -> DictConfig:
    """Return a job's part of a composed configuration, with the values that need `${hydra:…}` put in.

    Args:
        cfg: the configuration with its `hydra` node.
        run_dir: the job's folder; by default that of a single run, and inside a job none.
    """
    in_job = HydraConfig.initialized()
    with hydra_config(cfg):
        name = schema.read(cfg, "name", "")
        planned = run_dir if run_dir is not None else Path(schema.read(cfg.hydra.run, "dir", "hydra.run"))
    job = cfg.copy()
    with read_write(job), open_dict(job):
        del job["hydra"]
        job.name = name
        if run_dir is not None or not in_job:
            job.paths.output_dir = str(planned.absolute())
    return job
