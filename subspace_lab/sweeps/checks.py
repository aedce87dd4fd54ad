"""What a sweep is refused for before it starts: no job, values that cannot be composed, ranks that would repeat it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from subspace_lab import catalog
from subspace_lab.errors import UserError
from subspace_lab.hydra_errors import CONFIG_ERRORS, explain
from subspace_lab.sweeps.overrides import Swept

# The launchers that run the jobs of a sweep in the process the user started, or in forks of it.
LOCAL_LAUNCHERS = ("basic_launcher", "joblib_launcher")
# Values of one swept key that are composed beforehand, a tenth of a second each.
MAX_CHECKED = 20


def check(
    swept: Mapping[str, Swept], fixed: Sequence[str], sweeper: DictConfig, compose: Callable[[list[str]], DictConfig]
) -> None:
    """Refuse a sweep that cannot work.

    Args:
        swept: the keys that vary.
        fixed: the lines that do not.
        sweeper: Hydra's `sweeper` node.
        compose: composes the configuration of a single job, to find a wrong value before any job runs.

    Raises:
        UserError: see the module.
    """
    adaptive = is_adaptive(sweeper)
    for key, one in swept.items():
        if not one.values:
            names = ", ".join(catalog.options(key))
            raise UserError(
                f"{one.line} matches nothing: the sweep has no job", hint=f"{key} is one of: {names}" if names else None
            )
        if one.interval and not adaptive:
            raise UserError(
                f"{one.line}: a grid has no values from an interval",
                hint="add hydra/sweeper=optuna, or list values: 0.001,0.01",
            )
    if adaptive:
        _check_adaptive(swept, sweeper)
    for key, one in swept.items():
        others = [f"{other.element}={other.values[0]}" for name, other in swept.items() if name != key]
        for value in one.values[:MAX_CHECKED]:
            job = [*fixed, *others, f"{one.element}={value}"]
            try:
                compose(job)
            except CONFIG_ERRORS as error:
                raise explain(error, job, compose) from error


def is_adaptive(sweeper: DictConfig) -> bool:
    """Return whether the sweeper chooses later jobs by what earlier ones returned."""
    return "direction" in sweeper


def _check_adaptive(swept: Mapping[str, Swept], sweeper: DictConfig) -> None:
    if not swept:
        raise UserError(
            "a search needs a key to vary", hint="for example 'optimizer.lr=tag(log, interval(0.0001, 0.1))'"
        )
    direction = str(getattr(sweeper.direction, "name", sweeper.direction))
    if direction != "minimize":
        raise UserError(
            f"hydra.sweeper.direction={direction}: expected minimize, since a run returns a loss or an error",
            hint="the report ranks by any figure: subspace-lab report DIR --metric val/accuracy",
        )


def refuse_local_ddp(cfg: DictConfig, hydra_cfg: Any) -> None:
    """Refuse a local sweep of runs that start their ranks as subprocesses: each rank would run the whole sweep again.

    Raises:
        UserError: with the two ways out.
    """
    launcher = str(OmegaConf.select(hydra_cfg, "launcher._target_", default=""))
    strategy = str(OmegaConf.select(cfg, "trainer.strategy", default="auto", throw_on_missing=False))
    devices = OmegaConf.select(cfg, "trainer.devices", default="auto", throw_on_missing=False)
    nodes = OmegaConf.select(cfg, "trainer.num_nodes", default=1, throw_on_missing=False)
    one = nodes in (1, "1") and (devices in (1, "1") or devices == strategy == "auto")
    if one or not any(name in launcher for name in LOCAL_LAUNCHERS):
        return
    raise UserError(
        "a run of several processes cannot be part of a local sweep: every process would repeat the whole sweep",
        hint="add hydra/launcher=submitit_slurm, which starts the ranks itself, or sweep with trainer.devices=1",
    )
