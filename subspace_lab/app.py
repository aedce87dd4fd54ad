"""Where Hydra comes in: compose, choose the run folder, hand the configuration to `subspace_lab.run`.

Imports Hydra and nothing heavier. Before Hydra creates a folder the configuration is composed once here (`_prepare`),
so that mistakes leave nothing behind, `resume=auto` can point Hydra at an earlier folder, and a sweep that cannot work
is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra import initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from subspace_lab import catalog, interrupt, rundir, schema, sweeps
from subspace_lab.cluster import launchers, ranks, requeue, settings
from subspace_lab.composed import without_hydra
from subspace_lab.errors import Interrupted, UserError, did_you_mean
from subspace_lab.hydra_errors import CONFIG_ERRORS, explain, explain_null
from subspace_lab.reporting.results import command_line
from subspace_lab.sweeps.cell import run_cell, write_traceback
from subspace_lab.sweeps.ending import conduct
from subspace_lab.training.environment import is_main_process, quiet_lightning

NO_CHOICE = (
    "subspace",
    "scenario",
    "federation",
    "merge",
    "experiment",
    "hparams_search",
    "debug",
)  # null in conf/config.yaml
INFO = ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")

# Cached, so that every use in a run and every job of a sweep sees one id.
OmegaConf.register_new_resolver("run_id", rundir.run_id, use_cache=True, replace=True)
OmegaConf.register_new_resolver("run_name", lambda usual, *, _root_: rundir.run_name(usual, _root_), replace=True)
OmegaConf.register_new_resolver("slurm", lambda name, *, _root_: settings.launcher_value(name, _root_), replace=True)
launchers.use_own_files()


class Stop(BaseException):
    """Carries an exception out of a single run past Hydra, which would print it in its own words."""


def main(argv: Sequence[str]) -> int:
    """Run what the command line asks for and return the exit code.

    Args:
        argv: Hydra's flags and overrides, without the program's name.

    Raises:
        UserError, Interrupted: see `subspace_lab.errors`; anything else is a bug.
    """
    options, overrides = _parse(argv)
    # Said of a group without a default choice this changes nothing, and Hydra cannot read it.
    overrides = [text for text in overrides if text not in [f"{group}=null" for group in NO_CHOICE]]
    stopped: Stop | None = None
    try:
        if not options.shows_only:
            extra = _prepare(options, overrides)
            if extra is None:
                return 0
            overrides += extra
        # Lightning starts the other ranks of a run with this very command line.
        sys.argv = [sys.argv[0], *options.flags, *overrides]
        if options.sweep_dir is not None:
            return conduct(_sweep, options.sweep_dir)
        _hydra_main()
    except Stop as stop:
        stopped = stop
    except CONFIG_ERRORS as error:
        raise explain(error, overrides, compose_config) from error
    except OSError as error:  # from Hydra or us, making the folder; what goes wrong inside a run comes as Stop
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"cannot write to {error.filename}: {error.strerror}", hint="choose another place with paths.output_root="
        ) from error
    except ValueError as error:
        raise explain_null(error, overrides) from error
    if stopped is not None:
        assert stopped.__cause__ is not None
        raise stopped.__cause__  # out here, where its own causes stay as they are: out of memory may be among them
    return 0


def resume(argv: Sequence[str]) -> int:
    """Continue the run in a folder: `resume RUN_DIR [overrides]`, with its own overrides and where it was started.

    Raises:
        UserError: the folder holds no run.
    """
    if not argv or argv[0].startswith("-") or "=" in argv[0]:
        raise UserError("resume needs a run folder", hint="subspace-lab resume outputs/NAME/RUN_ID [key=value …]")
    run_dir = Path(argv[0]).resolve()
    saved = run_dir / ".hydra" / "overrides.yaml"
    if not saved.is_file():
        near = sorted(path.parent.parent for path in run_dir.glob("**/.hydra/overrides.yaml"))
        hint = f"did you mean {near[-1]}?" if near else "a run folder has .hydra/overrides.yaml in it"
        raise UserError(f"{argv[0]} is no run folder", hint=hint)
    if rundir.status(run_dir) == "completed" and len(argv) == 1:
        print(f"{run_dir} is already finished; to train it further give a larger trainer.max_steps", file=sys.stderr)
        return 0
    overrides = [str(text) for text in OmegaConf.load(saved)]
    kept = [text for text in overrides if not text.lstrip("+").startswith(("resume=", "hydra."))]
    about = run_dir / ".hydra" / "hydra.yaml"
    if about.is_file():
        origin = OmegaConf.load(about)
        # Relative paths in the overrides are meant from where the run was started.
        with contextlib.suppress(OSError):
            os.chdir(str(OmegaConf.select(origin, "hydra.runtime.cwd", default=".")))
        sources = OmegaConf.select(origin, "hydra.runtime.config_sources", default=[])
        folders = [str(source.path) for source in sources if source.provider == "command-line"]
        kept += [sweeps.searchpath(folders)] if folders else []
    place = sweeps.quote(str(run_dir))
    return main([*kept, f"resume={place}", f"hydra.run.dir={place}", *argv[1:]])


def compose_config(overrides: Sequence[str]) -> DictConfig:
    """Compose a configuration (without its `hydra` node), inside a running Hydra job or outside one.

    `name` is put in as text, from the choices of these overrides.
    """
    with _initialized():
        cfg = _compose(list(overrides), multirun=False)
    return without_hydra(cfg)


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Split Hydra's flags from the overrides; `flags` are kept as typed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--multirun", "-m", action="store_true")
    parser.add_argument("--run", "-r", action="store_true")
    parser.add_argument("--config-dir", "-cd")
    parser.add_argument("--config-name", "-cn", default="config")
    shows = [
        parser.add_argument("--cfg", "-c", choices=["job", "hydra", "all"]),
        parser.add_argument("--package", "-p"),
        parser.add_argument("--info", "-i", nargs="?", const="all", choices=INFO),
        parser.add_argument("--experimental-rerun"),
        parser.add_argument("--resolve", action="store_true"),
        parser.add_argument("--hydra-help", action="store_true"),
        parser.add_argument("--shell-completion", "-sc", action="store_true"),
    ]
    try:
        options, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error), hint="see subspace-lab --help") from None
    unknown = [word for word in rest if word.startswith("-")]
    if unknown:
        known = [flag for action in parser._actions for flag in action.option_strings]
        hint = did_you_mean(unknown[0], [*known, "--help", "--version", "--debug"]) or "see subspace-lab --help"
        raise UserError(f"unknown flag '{unknown[0]}'", hint=hint)
    chosen = set(rest)
    options.flags = [word for word in argv if word not in chosen]
    options.shows_only = any(getattr(options, action.dest) for action in shows)
    options.sweep_dir = None
    # `+experiment=x` is what other Hydra projects need; here every group is in the defaults list already.
    known_groups = tuple(f"+{group}=" for group in catalog.groups())
    return options, [word[1:] if word.startswith(known_groups) else word for word in rest]


def _prepare(options: argparse.Namespace, overrides: list[str]) -> list[str] | None:
    """Compose once, before Hydra runs; return overrides to add, or None if there is nothing left to do."""
    searchpath = [sweeps.searchpath([str(Path(options.config_dir).resolve())])] if options.config_dir else []
    choices = {"multirun": options.multirun, "config_name": options.config_name}
    with _initialized():
        try:
            cfg = _compose([*overrides, *searchpath], **choices)
        except CONFIG_ERRORS:
            if not options.multirun:
                raise
            overrides[:] = sweeps.deferred(overrides)
            cfg = _compose([*overrides, *searchpath], **choices)
        if cfg.hydra.mode == RunMode.MULTIRUN or options.multirun:
            command = command_line([sys.argv[0], *options.flags, *overrides])
            overrides += launchers.prepare(cfg, overrides)
            options.sweep_dir, extra = sweeps.prepare(
                cfg, overrides, command, lambda single: _compose([*single, *searchpath], multirun=False)
            )
            return extra
        job = without_hydra(cfg)
        chosen = ranks.agreed(lambda: _choose_run_dir(job, overrides))
        if chosen is not None:
            schema.validate(job)
        return chosen


def _choose_run_dir(job: DictConfig, overrides: list[str]) -> list[str] | None:
    """Return the overrides that put a single run into its folder, or None if it is already finished."""
    schema.check_subspace(job)
    planned = Path(job.paths.output_dir)
    if any(text.startswith("hydra.run.dir=") for text in overrides):
        rundir.check_free(planned)
        return []
    wanted = schema.config_hash(job)
    again = job.resume == "auto" or (job.resume is None and ranks.under_torchrun() and rundir.restarts() > 0)
    found = rundir.newest(planned.parent, wanted) if again else None
    if found is not None and found.completed:
        _tell(f"already finished, nothing to do: {found.path}")
        return None
    if found is not None:
        rundir.check_free(found.path)
        _tell(f"continuing {found.path}")
        return [f"hydra.run.dir={sweeps.quote(str(found.path))}"]
    if rundir.slurm_id() is not None:  # a requeued job comes back with its id, to its folder
        planned = rundir.unused(planned, wanted)
    elif not ranks.under_torchrun():
        return []
    return [f"hydra.run.dir={sweeps.quote(str(planned))}"]


def _tell(line: str) -> None:
    if is_main_process():
        print(line, file=sys.stderr)


@hydra.main(config_path="pkg://subspace_lab.conf", config_name="config", version_base="1.3")
def _hydra_main(cfg: DictConfig) -> float | None:
    return task(cfg)


def _sweep() -> None:
    """Let Hydra run a sweep; what ended it comes out as itself."""
    stopped: Stop | None = None
    try:
        _hydra_main()
    except Stop as stop:
        stopped = stop
    if stopped is not None:
        assert stopped.__cause__ is not None
        raise stopped.__cause__


def task(cfg: DictConfig) -> float | None:
    """Run one job inside Hydra: validate, lock the folder, train.

    Under submitit this is the first of our code to run in the remote process. In a sweep nothing but a signal gets out:
    how a cell ended is read from its folder.
    """
    interrupt.install()
    hydra_cfg = HydraConfig.get()
    output_dir = Path(hydra_cfg.runtime.output_dir)
    try:
        if hydra_cfg.mode == RunMode.MULTIRUN:
            return run_cell(cfg, hydra_cfg, output_dir, lambda: _work(cfg, output_dir, hydra_cfg))
        value = _work(cfg, output_dir)
        if cfg.estimate:
            rundir.discard_unstarted(output_dir)
        return value
    except Interrupted as stopped:
        interrupt.chain()  # where submitit started us, this ends here
        requeue.after_saving(interrupt.requested(), settings.ClusterPlan.of(cfg))
        raise Stop from stopped
    except Exception as error:
        if not (isinstance(error, UserError) and rundir.discard_unstarted(output_dir)):
            write_traceback(output_dir, error)
        raise Stop from error


def _work(cfg: DictConfig, output_dir: Path, sweep: Any = None) -> float | None:
    quiet_lightning()  # before anything warns: importing some optimizers does
    if cfg.resume is None and rundir.restarts():
        cfg.resume = "auto"  # asked to or not
    schema.validate(cfg)
    ranks.check(cfg)
    if sweep is not None:
        sweeps.refuse_local_ddp(cfg, sweep)
    from subspace_lab.run import run

    with rundir.locked(output_dir):
        return run(cfg)


@contextlib.contextmanager
def _initialized() -> Iterator[None]:
    if GlobalHydra.instance().is_initialized():
        yield
        return
    with initialize_config_module("subspace_lab.conf", version_base="1.3", job_name="run"):
        yield


def _compose(overrides: list[str], *, multirun: bool, config_name: str = "config") -> DictConfig:
    hydra_app = GlobalHydra.instance().hydra
    assert hydra_app is not None
    return hydra_app.compose_config(
        config_name=config_name,
        overrides=overrides,
        run_mode=RunMode.MULTIRUN if multirun else RunMode.RUN,
        with_log_configuration=False,
        validate_sweep_overrides=not multirun,
    )
