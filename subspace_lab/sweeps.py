"""What a sweep (`-m`) needs before it starts: one folder for all its jobs, and a refusal where it cannot work."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf

from subspace_lab import catalog, rundir
from subspace_lab.errors import UserError
from subspace_lab.hydra_errors import CONFIG_ERRORS, explain

# The launchers that run the jobs of a sweep in the process the user started, or in forks of it.
LOCAL_LAUNCHERS = ("basic_launcher", "joblib_launcher")
# Values of one swept key that are composed beforehand, a tenth of a second each.
MAX_CHECKED = 20


def quote(value: str) -> str:
    """Return a value as Hydra reads it back unchanged, whatever characters it has."""
    return "'" + value.replace("'", "\\'") + "'"


def searchpath(folders: Sequence[str]) -> str:
    """Return the override that adds folders of configuration groups."""
    return f"hydra.searchpath=[{','.join(quote(f'file://{folder}') for folder in folders)}]"


def deferred(overrides: Sequence[str]) -> list[str]:
    """Leave values of groups to the jobs where the groups themselves are swept.

    Hydra composes a sweep once without what is swept. A key of an option that only the swept ones choose
    (`method=fedavg,flag federation.byzantine=1`) would be unknown there, unless it is swept too, over one value.

    Returns:
        The overrides, changed where a group is swept.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if not any(o.is_sweep_override() and o.key_or_group in catalog.groups() for o in parsed):
        return list(overrides)
    told = []
    for text, override in zip(overrides, parsed, strict=True):
        root, dot, _ = override.key_or_group.partition(".")
        waits = dot and root in catalog.groups() and root not in ("hydra", "paths", "trainer")
        key, equals, value = text.partition("=")
        told.append(f"{key}=choice({value})" if waits and equals and not override.is_sweep_override() else text)
    return told


def prepare(cfg: DictConfig, overrides: list[str], compose: Callable[[list[str]], DictConfig]) -> list[str]:
    """Check a sweep and choose its folder, `outputs/<name>/sweeps/<id>`, the same for all jobs whatever they vary.

    Args:
        cfg: the composed configuration with its `hydra` node.
        overrides: the command line's overrides; `hydra.sweeper.params` of a search file count too.
        compose: composes the configuration of a single job, to find a wrong value before any job runs.

    Returns:
        Overrides to add. Jobs already finished are skipped by the jobs themselves.

    Raises:
        UserError: no job at all, or local DDP.
    """
    refuse_local_ddp(cfg, cfg.hydra)
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    lines = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    hydra_app = GlobalHydra.instance().hydra
    assert hydra_app is not None
    parsed = OverridesParser.create(config_loader=hydra_app.config_loader).parse_overrides(lines)
    swept = {override.key_or_group: _values(override) for override in parsed if override.is_sweep_override()}
    intervals = {override.key_or_group for override in parsed if not override.is_discrete_sweep()}
    for key, values in swept.items():
        if not values:
            typed = next(line for line in lines if line.lstrip("+").startswith(f"{key}="))
            names = ", ".join(catalog.options(key))
            raise UserError(
                f"{typed} matches nothing: the sweep has no job", hint=f"{key} is one of: {names}" if names else None
            )
    fixed = [line for line, override in zip(lines, parsed, strict=True) if not override.is_sweep_override()]
    elements = {override.key_or_group: override.get_key_element() for override in parsed}
    for key, values in swept.items():
        others = [
            f"{elements[name]}={choices[0]}" for name, choices in swept.items() if name != key and name not in intervals
        ]
        for value in values[:MAX_CHECKED] if key not in intervals else ():
            job = [*fixed, *others, f"{elements[key]}={value}"]
            try:
                compose(job)
            except CONFIG_ERRORS as error:
                raise explain(error, job, compose) from error
    if any(text.startswith("hydra.sweep.dir=") for text in overrides):
        return []
    group = Path(str(cfg.paths.output_root)) / _name(cfg, swept) / "sweeps"
    counted = sorted(line for line in lines if not line.startswith(("resume=", "hydra.", "hydra/")))
    wanted = hashlib.sha256(json.dumps(counted).encode()).hexdigest()[:16]
    found = rundir.newest(group, wanted) if OmegaConf.select(cfg, "resume") == "auto" else None
    sweep_dir = found.path if found is not None else rundir.unused(group / rundir.run_id(), wanted)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    (sweep_dir / rundir.HASH_FILE).write_text(f"{wanted}\n", encoding="utf-8")
    return [f"hydra.sweep.dir={quote(str(sweep_dir))}"]


def tell(overrides: Sequence[str]) -> None:
    """Print the table of a finished sweep's runs, and draw what is drawn over k, if the overrides name its folder."""
    place = next((text.split("=", 1)[1] for text in reversed(overrides) if text.startswith("hydra.sweep.dir=")), None)
    if place is None:
        return
    from subspace_lab.reporting import report

    with contextlib.suppress(UserError):  # no job has got as far as to write results
        report.main([place.strip("'").replace("\\'", "'")])


def refuse_local_ddp(cfg: DictConfig, hydra_cfg: Any) -> None:
    """Refuse a local sweep of runs that start their ranks as subprocesses: each rank would run the whole sweep again.

    Raises:
        UserError: with the two ways out.
    """
    launcher = str(OmegaConf.select(hydra_cfg, "launcher._target_", default=""))
    strategy = str(OmegaConf.select(cfg, "trainer.strategy", default="auto", throw_on_missing=False))
    devices = OmegaConf.select(cfg, "trainer.devices", default="auto", throw_on_missing=False)
    starts_ranks = strategy.startswith(("ddp", "fsdp", "deepspeed")) and not strategy.endswith(
        ("_spawn", "_fork", "_notebook")
    )
    if not starts_ranks or devices in (1, "1") or not any(name in launcher for name in LOCAL_LAUNCHERS):
        return
    raise UserError(
        f"trainer.strategy={strategy} cannot run in a local sweep: every rank would repeat the whole sweep",
        hint="add hydra/launcher=submitit_slurm hydra.launcher.tasks_per_node=N, or trainer.strategy=ddp_spawn",
    )


def _values(override: Override) -> list[str]:
    if override.is_discrete_sweep():
        return [str(value) for value in override.sweep_string_iterator()]
    return [override.input_line or "interval"]


def _name(cfg: DictConfig, swept: dict[str, list[str]]) -> str:
    """Return the sweep's run group: a single run's, with a swept choice as its values joined (`galore+none_…`)."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    text = raw.get("name") if isinstance(raw, dict) else None
    if isinstance(text, str) and "${" not in text and "," not in text:
        return text
    choices = cfg.hydra.runtime.choices
    words = []
    for group in ("method", "model", "data"):
        values = swept.get(group)
        words.append("+".join(values) if values and len(values) <= 3 else "many" if values else str(choices.get(group)))
    return "_".join(words)
