"""One training run of a search: what it is, the configuration it runs with, and the folder it is kept in.

A cell lies in `<output_root>/<name>/cells/<key>/`, where the key is a hash of everything that its figures depend on and
of nothing else. Searches of the same name share these folders: an interrupted one finds what is finished, and a finer
grid trains only the new points.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, open_dict, read_write

from subspace_lab import schema
from subspace_lab.errors import UserError
from subspace_lab.reporting.results import write_text

# Part of every key: raised when the same configuration would train differently than before.
CELL_VERSION = 1
RESULT_FILE = "result.json"
SOLUTION_FILE = "solution.safetensors"  # what training leaves of a subspace run, for a larger d to start from

_FULL = {"_target_": "subspace_lab.methods.full.Full", "name": "none"}
_CSV = {"_target_": "subspace_lab.training.loggers.Loggers", "csv": True, "wandb": False}

# What no figure depends on.
_UNCOUNTED = {
    "": ("name", "tags", "resume", "compare", "estimate", "export", "published", "logger", "paths"),
    "trainer": ("progress", "log_every", "checkpoint_every", "keep_checkpoints"),
    "data": ("cache_dir", "num_workers", "recipe"),  # what others take from a recipe has been put in its place
    "model": ("recipe",),
    "method": ("initial",),
}


@dataclass(frozen=True)
class CellSpec:
    """What one cell is.

    Attributes:
        kind: baseline trains all weights, subspace d numbers.
        seed: of the initial weights, the projection and the order of the data.
        lr_factor: multiplies the learning rate.
        d: trained numbers; None for a baseline.
        parent: key of the cell whose solution this one starts from.
    """

    kind: Literal["baseline", "subspace"]
    seed: int
    lr_factor: float
    d: int | None = None
    parent: str | None = None

    def __str__(self) -> str:
        what = "baseline" if self.d is None else f"d={self.d:,}"
        return f"{what} seed {self.seed} lr×{self.lr_factor:g}"


@dataclass(frozen=True)
class CellTask:
    """A cell with all that a process anywhere needs to run it.

    Attributes:
        spec: what it is.
        key: names it.
        folder: where it is kept.
        config: the whole configuration as plain containers.
        resume_dir: the run folder that `subspace-lab resume` would be given.
    """

    spec: CellSpec
    key: str
    folder: Path
    config: Mapping[str, Any]
    resume_dir: Path


@dataclass(frozen=True)
class CellResult:
    """The figures of a finished cell.

    Attributes:
        spec, key, folder: see `CellTask`.
        metrics: name -> value, NaN where the run diverged.
        seconds: of wall clock.
        reused: it was finished before this search asked for it.
    """

    spec: CellSpec
    key: str
    folder: Path
    metrics: Mapping[str, float]
    seconds: float
    reused: bool = False

    @property
    def diverged(self) -> bool:
        """Whether a figure of the losses or accuracies is not finite."""
        kinds = ("train/", "val/", "test/")
        return any(not math.isfinite(value) for name, value in self.metrics.items() if name.startswith(kinds))

    def value(self, metric: str) -> float:
        """Return one figure; where the run diverged it is 0, below any threshold.

        Raises:
            UserError: runs have no such figure.
        """
        if metric not in self.metrics:
            names = sorted(name for name in self.metrics if name.startswith(("train/", "val/", "test/")))
            raise UserError(f"a run has no figure '{metric}'", hint=f"there are: {', '.join(names) or 'none'}")
        value = self.metrics[metric]
        return value if math.isfinite(value) else 0.0


class CellFactory:
    """Makes the tasks of one search.

    Args:
        cfg: the search's configuration.
        protocol: the node of the protocol that runs a single cell.
        resume_dir: the folder of the search.

    Attributes:
        d_max: columns of the projection that all subspaces of the search are cut from; set once D is known.
    """

    def __init__(self, cfg: DictConfig, *, protocol: Mapping[str, Any], resume_dir: Path) -> None:
        self._cfg, self._protocol, self._resume_dir = cfg, protocol, resume_dir
        self.root = Path(str(cfg.paths.output_root)).absolute() / str(cfg.name) / "cells"
        self.d_max: int | None = None

    def task(self, spec: CellSpec) -> CellTask:
        """Return the task of a cell.

        Raises:
            UserError: a value of the configuration cannot be resolved.
        """
        plain = schema.to_plain(self._config(spec))
        key = key_of(plain, spec)
        plain["paths"]["output_dir"] = str(self.root / key)
        if spec.parent is not None:
            plain["method"]["initial"] = str(self.root / spec.parent / SOLUTION_FILE)
        return CellTask(spec, key, self.root / key, plain, self._resume_dir)

    def _config(self, spec: CellSpec) -> DictConfig:
        cell = deepcopy(self._cfg)
        with read_write(cell), open_dict(cell):
            cell.seed = spec.seed
            cell.paths.output_dir = ""
            cell.protocol = dict(self._protocol)
            cell.logger = dict(_CSV)
            cell.tags = []
            for name, value in (("export", False), ("estimate", False), ("compare", None), ("published", None)):
                cell[name] = value
            cell.resume = None
            cell.trainer.progress = "off"
            if cell.trainer.get("max_epochs") is None and cell.trainer.checkpoint_every >= cell.trainer.max_steps:
                cell.trainer.checkpoint_every = 0  # a short cell is trained again rather than saved; Ctrl-C saves it
            if spec.kind == "baseline":
                cell.optimizer.lr = float(cell.optimizer.lr) * spec.lr_factor
                cell.method, cell.subspace = dict(_FULL), None
            else:
                cell.method.d, cell.method.d_max = spec.d, self.d_max
                cell.method.lr_factor = spec.lr_factor
        return cell


def key_of(plain: Mapping[str, Any], spec: CellSpec) -> str:
    """Return 16 hexadecimal digits that name what a cell computes.

    Args:
        plain: its configuration, resolved.
        spec: what it is.
    """
    counted = {name: value for name, value in plain.items() if name not in _UNCOUNTED[""]}
    for group, names in _UNCOUNTED.items():
        node = counted.get(group)
        if isinstance(node, Mapping):
            counted[group] = {name: value for name, value in node.items() if name not in names}
    text = json.dumps([CELL_VERSION, spec.parent, counted], sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_result(task: CellTask) -> CellResult | None:
    """Return the figures of a cell that is finished, None if it is not (or its file cannot be read)."""
    try:
        found = json.loads((task.folder / RESULT_FILE).read_text(encoding="utf-8"))
        metrics = {name: math.nan if value is None else float(value) for name, value in found["metrics"].items()}
        return CellResult(task.spec, task.key, task.folder, metrics, float(found["seconds"]), reused=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_result(result: CellResult, about: Mapping[str, Any]) -> None:
    """Write a cell's figures, as a whole or not at all.

    Args:
        result: the figures; those that are not finite become null.
        about: further entries: versions, steps.
    """
    metrics = {name: value if math.isfinite(value) else None for name, value in result.metrics.items()}
    content = {"cell_version": CELL_VERSION, "key": result.key, "spec": asdict(result.spec), "metrics": metrics}
    text = json.dumps(content | {"seconds": result.seconds, **about}, indent=2, allow_nan=False)
    write_text(result.folder / RESULT_FILE, text + "\n")
