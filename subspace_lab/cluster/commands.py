"""`subspace-lab sbatch`: the batch script of the very run, or sweep, that the same words would start here."""

from __future__ import annotations

import contextlib
import functools
import itertools
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from subspace_lab import app, schema
from subspace_lab.cluster.script import script
from subspace_lab.cluster.settings import Request, recipe, request
from subspace_lab.composed import without_hydra
from subspace_lab.errors import UserError
from subspace_lab.hydra_errors import CONFIG_ERRORS, explain
from subspace_lab.sweeps import checks
from subspace_lab.sweeps.checks import is_adaptive
from subspace_lab.sweeps.overrides import deferred, split
from subspace_lab.sweeps.prepare import group_name

# Groups whose values change what a job asks for; all tasks of an array ask for the same.
_SHAPING = ("trainer", "cluster", "experiment", "data", "debug")


def main(words: Sequence[str]) -> int:
    """Print the script that `sbatch` is to be given: `subspace-lab sbatch [-m] [KEY=VALUE …] | sbatch`.

    Raises:
        UserError: what the run itself would be refused for.
    """
    multirun = any(word in ("-m", "--multirun") for word in words)
    overrides = [word for word in words if word not in ("-m", "--multirun")]
    flags = [word for word in overrides if word.startswith("-")]
    if flags:
        raise UserError(f"sbatch knows no flag '{flags[0]}'", hint="subspace-lab sbatch [-m] [key=value …] | sbatch")
    command = shlex.join(["subspace-lab", "sbatch", *words])
    print(written(overrides, multirun=multirun, command=command, check=schema.validate), end="")
    if sys.stdout.isatty():
        print("to submit it: the same command | sbatch", file=sys.stderr)
    return 0


def written(
    overrides: Sequence[str],
    *,
    multirun: bool,
    command: str,
    about: Sequence[str] = (),
    job_name: str | None = None,
    check: Callable[[DictConfig], None] = schema.check_subspace,
) -> str:
    """Return the batch script of a run or of a grid, one task of an array for each cell.

    Args:
        overrides: as typed.
        multirun: whether they are a sweep's.
        command: what is typed to write it again.
        about: further comment lines.
        job_name: that of the job, by default the run group's.
        check: is given the configuration of the run, or of the first cell.

    Raises:
        UserError: no such run can be, or not on this cluster.
    """
    kept = [text for text in overrides if not text.startswith(("hydra/launcher=", "hydra.launcher."))]
    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():
            stack.enter_context(initialize_config_module("subspace_lab.conf", version_base="1.3", job_name="run"))
        try:
            cfg, kept = _composed(kept, multirun=multirun)
            if multirun or cfg.hydra.mode == RunMode.MULTIRUN:
                return _sweep_script(_grid(cfg, kept), check, command=command, about=about, job_name=job_name)
            job, words = _with_recipe(without_hydra(cfg), kept)
            check(job)
            return script(job, words, name=job_name or str(job.name), command=command, about=about)
        except CONFIG_ERRORS as error:
            raise explain(error, kept, app.compose_config) from error


def _composed(overrides: list[str], *, multirun: bool) -> tuple[DictConfig, list[str]]:
    """Compose as a run or sweep does, with Hydra's own node; of a sweep the overrides may come back changed."""
    hydra_app = GlobalHydra.instance().hydra
    assert hydra_app is not None
    compose = functools.partial(
        hydra_app.compose_config,
        config_name="config",
        run_mode=RunMode.MULTIRUN if multirun else RunMode.RUN,
        with_log_configuration=False,
        validate_sweep_overrides=not multirun,
    )
    try:
        return compose(overrides=overrides), overrides
    except CONFIG_ERRORS:
        if not multirun:
            raise
    overrides = deferred(overrides)
    return compose(overrides=overrides), overrides


def _with_recipe(cfg: DictConfig, overrides: list[str], cell: Sequence[str] = ()) -> tuple[DictConfig, list[str]]:
    more = recipe(cfg, [*overrides, *cell])
    return (app.compose_config([*overrides, *more, *cell]) if more else cfg), [*overrides, *more]


@dataclass(frozen=True)
class _Grid:
    name: str
    fixed: list[str]
    cells: list[list[str]]


def _grid(cfg: DictConfig, overrides: list[str]) -> _Grid:
    """Return the cells of a sweep in the order of Hydra's own."""
    hydra_app = GlobalHydra.instance().hydra
    assert hydra_app is not None
    sweeper = cfg.hydra.sweeper
    if is_adaptive(sweeper):
        raise UserError(
            "an array is made for a grid, and this sweep chooses later runs by earlier ones",
            hint="subspace-lab -m … hydra/launcher=submitit_slurm",
        )
    lines = [*(f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()), *overrides]
    swept, fixed = split(lines, OverridesParser.create(config_loader=hydra_app.config_loader))
    checks.check(swept, fixed, sweeper, app.compose_config)
    cells = [
        [f"{one.element}={value}" for one, value in zip(swept.values(), values, strict=True)]
        for values in itertools.product(*(one.values for one in swept.values()))
    ]
    return _Grid(group_name(cfg, swept), [*fixed, "hydra.mode=RUN"], cells)


def _sweep_script(
    sweep: _Grid, check: Callable[[DictConfig], None], *, command: str, about: Sequence[str], job_name: str | None
) -> str:
    cfg, words = _with_recipe(app.compose_config([*sweep.fixed, *sweep.cells[0]]), sweep.fixed, sweep.cells[0])
    if cfg.compare == "auto":
        words.append("compare=null")  # no run of a sweep trains the baseline beside it
    shapes: dict[Request, list[str]] = {}
    shaping = any(word.lstrip("+").split("=")[0].split(".")[0] in _SHAPING for word in sweep.cells[0])
    for cell in sweep.cells if shaping else sweep.cells[:1]:
        shapes.setdefault(request(app.compose_config([*words, *cell])), cell)
    if len(shapes) > 1:
        one, other = list(shapes.values())[:2]
        raise UserError(
            f"the tasks of an array ask for the same, and {' '.join(one)} and {' '.join(other)} do not",
            hint="write a script for each",
        )
    check(cfg)
    place = f"{cfg.paths.output_root}/{sweep.name}/sweeps"
    name = job_name or (sweep.name if len(sweep.name) <= 60 else "subspace-lab")
    return script(cfg, words, name=name, command=command, about=about, cells=sweep.cells, cell_dir=place)
