"""What W&B is told about a run so that dashboards sort themselves: group, tags, and what a sweep varies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from subspace_lab.sweeps import manifest

_LONGEST_TAG = 64  # wandb refuses longer ones, and groups beyond twice that
_TAGGED = ("model", "data", "optimizer", "protocol")


@dataclass(frozen=True)
class RunIdentity:
    """See the module.

    Attributes:
        group: the runs of a sweep, or those with the same `name`.
        method: the method's name.
        tags: what was chosen, then the user's.
        config: the configuration; `choices` and, in a sweep, `sweep` have options and swept keys as plain values.
        in_sweep: whether it is one cell of many.
    """

    group: str
    method: str
    tags: list[str] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    in_sweep: bool = False


def identity(cfg: DictConfig, run_dir: Path, method: str) -> RunIdentity:
    """Return how a run is to be found among others.

    Args:
        cfg: its configuration.
        run_dir: its folder.
        method: its method's name.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    if not HydraConfig.initialized():
        return RunIdentity(str(cfg.name), method, [method, *map(str, cfg.tags)], plain)
    hydra_cfg = HydraConfig.get()
    chosen = {str(group): option for group, option in hydra_cfg.runtime.choices.items()}
    chosen = {group: option for group, option in chosen.items() if not group.startswith("hydra")}
    if run_dir.absolute() != Path(hydra_cfg.runtime.output_dir).absolute():  # what the run is compared with
        chosen = {group: chosen.get(group) for group in ("model", "data")}
        words = ["baseline"]
    else:
        words = []
    chosen["method"] = method
    words = [method, *(str(chosen[group]) for group in _TAGGED if chosen.get(group)), *words, *map(str, cfg.tags)]
    tags = list(dict.fromkeys(word[:_LONGEST_TAG] for word in words if word))
    config = {**plain, "choices": chosen}
    if hydra_cfg.mode != RunMode.MULTIRUN:
        return RunIdentity(str(cfg.name), method, tags, config)
    sweep_dir = Path(str(hydra_cfg.sweep.dir)).absolute()
    known = manifest.read(sweep_dir)
    config["sweep"] = {key: _value(cfg, chosen, key) for key in (known.swept if known is not None else ())}
    return RunIdentity(group_of(sweep_dir), method, tags, config, in_sweep=True)


def group_of(sweep_dir: Path) -> str:
    """Return what a sweep's runs are grouped by: its name and id."""
    name = f"{sweep_dir.parent.parent.name}-" if sweep_dir.parent.name == "sweeps" else ""
    return f"{name}{sweep_dir.name}"[-2 * _LONGEST_TAG :]


def _value(cfg: DictConfig, chosen: Mapping[str, Any], key: str) -> Any:
    if key in chosen:
        return chosen[key]
    found = OmegaConf.select(cfg, key)
    return OmegaConf.to_container(found, resolve=True) if OmegaConf.is_config(found) else found
