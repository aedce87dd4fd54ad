"""Hydra's launchers: is what one needs installed, and what it adds to every job of a sweep."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import util
from typing import TYPE_CHECKING

from hydra.core.config_store import ConfigStore
from hydra.core.plugins import Plugins

from subspace_lab import catalog
from subspace_lab.cluster.settings import recipe, request
from subspace_lab.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

# The module of a launcher's plugin, and the package it comes in.
_PACKAGES = {
    "hydra_plugins.hydra_submitit_launcher": "hydra-submitit-launcher",
    "hydra_plugins.hydra_joblib_launcher": "hydra-joblib-launcher",
}


def use_own_files() -> None:
    """Let conf/hydra/launcher/ stand for the launchers that plugins register under the same names.

    Hydra would check a file against the registered one, with a warning at every start; that one knows no interpolation.
    """
    Plugins.instance()  # finds them, and they register
    registered = ConfigStore.instance().repo.get("hydra", {}).get("launcher", {})
    for name in catalog.options("hydra/launcher"):
        registered.pop(f"{name}.yaml", None)


def prepare(cfg: DictConfig, overrides: Sequence[str]) -> list[str]:
    """Return the overrides that a sweep's launcher adds: on a cluster, the GPUs an experiment was published with.

    Args:
        cfg: the composed configuration with its `hydra` node.
        overrides: the command line's.

    Raises:
        UserError: the launcher's package or SLURM is not here, or no such job can be asked for.
    """
    target = str(cfg.hydra.launcher._target_)
    module = next((name for name in _PACKAGES if target.startswith(name)), None)
    if module is not None and not _installed(module):
        name = cfg.hydra.runtime.choices["hydra/launcher"]
        package = _PACKAGES[module]
        raise UserError(f"hydra/launcher={name} needs the package '{package}'", hint=f"pip install {package}")
    if not target.endswith("SlurmLauncher"):
        return []
    if shutil.which("srun") is None or shutil.which("sbatch") is None:
        raise UserError(
            "hydra/launcher=submitit_slurm needs SLURM, and srun is not here",
            hint="start the sweep on a login node, or use hydra/launcher=joblib",
        )
    more = recipe(cfg, overrides)
    if not more:
        request(cfg)
    return more


def _installed(module: str) -> bool:
    package, _, _ = module.partition(".")
    return util.find_spec(package) is not None and util.find_spec(module) is not None
