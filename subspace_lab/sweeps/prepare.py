"""What a sweep (`-m`) needs before it starts: checks, one folder for all its cells, and what it is written down as."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from subspace_lab import rundir
from subspace_lab.sweeps import checks, manifest
from subspace_lab.sweeps.overrides import Swept, quote, split


def prepare(
    cfg: DictConfig, overrides: list[str], command: str, compose: Callable[[list[str]], DictConfig]
) -> tuple[Path, list[str]]:
    """Check a sweep and choose its folder, `outputs/<name>/sweeps/<id>`, the same for all jobs whatever they vary.

    Args:
        cfg: the composed configuration with its `hydra` node.
        overrides: the command line's overrides; `hydra.sweeper.params` of a search file count too.
        command: the command line as it can be typed again.
        compose: composes the configuration of a single job, to find a wrong value before any job runs.

    Returns:
        The folder and overrides to add. Finished cells are left out when the launcher is handed them.

    Raises:
        UserError: no job at all, a value that does not exist, a search that cannot work, local DDP.
    """
    checks.refuse_local_ddp(cfg, cfg.hydra)
    params = OmegaConf.select(cfg, "hydra.sweeper.params") or {}
    lines = [*(f"{key}={value}" for key, value in params.items()), *overrides]
    hydra_app = GlobalHydra.instance().hydra
    assert hydra_app is not None
    swept, fixed = split(lines, OverridesParser.create(config_loader=hydra_app.config_loader))
    checks.check(swept, fixed, cfg.hydra.sweeper, compose)
    requeued = rundir.restarts() > 0 and cfg.get("resume") is None
    sweep_dir = _folder(cfg, overrides, lines, swept)
    if not cfg.estimate:
        _announce(cfg, sweep_dir, command, list(swept))
        _tell_offline(cfg, sweep_dir)
    added = [f"hydra.sweep.dir={quote(str(sweep_dir))}", *(["resume=auto"] if requeued else [])]
    return sweep_dir, [*added, *_search_settings(cfg, overrides)]


def _folder(cfg: DictConfig, overrides: list[str], lines: list[str], swept: Mapping[str, Swept]) -> Path:
    typed = [text for text in overrides if text.startswith("hydra.sweep.dir=")]
    if typed:
        return Path(str(cfg.hydra.sweep.dir)).absolute()
    group = Path(str(cfg.paths.output_root)).absolute() / group_name(cfg, swept) / "sweeps"
    counted = sorted(line for line in lines if not line.startswith(("resume=", "hydra.", "hydra/", "cluster")))
    wanted = hashlib.sha256(json.dumps(counted).encode()).hexdigest()[:16]
    found = rundir.newest(group, wanted) if cfg.get("resume") == "auto" else None
    sweep_dir = found.path if found is not None else rundir.unused(group / rundir.run_id(), wanted)
    sweep_dir.mkdir(parents=True, exist_ok=True)
    (sweep_dir / rundir.HASH_FILE).write_text(f"{wanted}\n", encoding="utf-8")
    return sweep_dir


def _announce(cfg: DictConfig, sweep_dir: Path, command: str, swept: list[str]) -> None:
    """Write what is known of the sweep."""
    earlier = manifest.read(sweep_dir)
    sweeper = str(cfg.hydra.sweeper._target_).rsplit(".", 1)[-1]
    cells = earlier.cells if earlier is not None else []
    manifest.write(sweep_dir, manifest.Manifest(command, sweeper, swept, cells))


def _tell_offline(cfg: DictConfig, sweep_dir: Path) -> None:
    """Say once, for all cells, that W&B has no key."""
    if not OmegaConf.select(cfg, "logger.wandb"):
        return
    from subspace_lab.training import wandb_server

    if wandb_server.wanted_mode() in (None, "online") and not wandb_server.has_key(wandb_server.address()):
        wandb_server.tell_offline(wandb_server.NO_KEY, sweep_dir / "*")


def _search_settings(cfg: DictConfig, overrides: list[str]) -> list[str]:
    """An adaptive sweep goes on past failed trials and, its sampler seeded, repeats its choices when it is resumed."""
    sweeper: Any = cfg.hydra.sweeper
    settings = []
    if "max_failure_rate" in sweeper and not any(o.startswith("hydra.sweeper.max_failure_rate=") for o in overrides):
        settings.append("hydra.sweeper.max_failure_rate=1.0")
    sampler = sweeper.get("sampler")
    if isinstance(sampler, DictConfig) and "seed" in sampler and sampler.seed is None:
        settings.append(f"hydra.sweeper.sampler.seed={cfg.seed}")
    return settings


def group_name(cfg: DictConfig, swept: Mapping[str, Swept]) -> str:
    """Return the sweep's run group: a single run's, with a swept choice as its values joined (`galore+none_…`)."""
    raw = OmegaConf.to_container(cfg, resolve=False)
    text = raw.get("name") if isinstance(raw, dict) else None
    if isinstance(text, str) and "${" not in text and "," not in text:
        return text
    choices = cfg.hydra.runtime.choices
    words = []
    for group in ("method", "model", "data"):
        values = swept[group].values if group in swept else None
        words.append("+".join(values) if values and len(values) <= 3 else "many" if values else str(choices.get(group)))
    return "_".join(words)
