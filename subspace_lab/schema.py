"""Checks a composed configuration before anything is built: unknown keys, wrong types, unresolvable values.

The signature of each `_target_` is the schema of its node: Hydra checks neither keys added with `+` nor types, so a
typo would otherwise run silently. Values are resolved leaf by leaf, so that an error names the full key.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write
from omegaconf import Node as OmegaNode
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from subspace_lab import catalog
from subspace_lab.annotations import check_value
from subspace_lab.errors import UserError, did_you_mean, nearest
from subspace_lab.signatures import locate, schema_of

# Keys of a node that its target does not take: Hydra's own, a display name, and a model's published training recipe.
RESERVED = frozenset({"_target_", "_partial_", "_recursive_", "_convert_", "_args_", "name", "recipe"})

# Where a bare word is most likely meant.
_LIKELY = (
    "method",
    "optimizer",
    "trainer",
    "data",
    "model",
    "scheduler",
    "subspace",
    "logger",
    "protocol",
    "scenario",
    "federation",
    "merge",
)
_ALIAS = re.compile(r"\$\{([\w.]+)\}$")

Node = Mapping[str, Any] | None


@dataclass
class Root:
    """The keys a configuration may have at its root; conf/config.yaml explains them."""

    name: str
    seed: int
    tags: Sequence[str]
    resume: str | None
    compare: str | None
    estimate: bool
    export: bool
    published: str | None
    protocol: Node
    scenario: Node
    federation: Node
    merge: Node
    model: Node
    data: Node
    optimizer: Node
    scheduler: Node
    subspace: Node
    method: Node
    trainer: Node
    callbacks: Node
    logger: Node
    paths: Node
    cluster: Node


def validate(cfg: DictConfig) -> None:
    """Check a composed configuration (without its `hydra` node) against the signatures of its targets.

    Imports the modules of the targets, which the run needs anyway.

    Raises:
        UserError: an unknown key, a value of the wrong type or that cannot be resolved, choices that do not fit.
    """
    check_subspace(cfg)
    hints = get_type_hints(Root)
    for key in map(str, cfg):
        if key not in hints:
            raise unknown_key(key, key, hints, cfg)
        check_value(read(cfg, key, ""), hints[key], key)
    _check_root(cfg)
    for key in map(str, cfg):
        if isinstance(cfg[key], DictConfig):
            _check_node(cfg[key], key)
    _check_protocol(cfg)


def check_subspace(cfg: DictConfig) -> None:
    """Refuse a subspace beside a method that has none; its rank would be nobody's.

    Raises:
        UserError: see above.
    """
    method = cfg.get("method")
    if isinstance(method, DictConfig) and cfg.get("subspace") is not None and "subspace" not in method:
        name = method.get("name", "this one")
        raise UserError(
            f"method={name} does not work in a subspace", hint="choose method=galore, or leave out subspace="
        )


def unknown_key(full_key: str, key: str, options: Iterable[str], cfg: DictConfig | None) -> UserError:
    """Return the error for a key that does not exist: the nearest sibling, else the same word elsewhere in the tree."""
    prefix = full_key[: -len(key)]
    near = nearest(key, options)
    elsewhere = find_key(cfg, key) if cfg is not None else []
    exact = [path for path in elsewhere if path.rsplit(".", 1)[-1] == key]
    if exact and near != key:
        hint = f"did you mean {' or '.join(repr(path) for path in exact[:3])}?"
    elif near is not None:
        hint = f"did you mean '{prefix}{near}'?"
    elif elsewhere:
        hint = f"did you mean '{elsewhere[0]}'?"
    else:
        hint = f"there are: {', '.join(sorted(set(options) - RESERVED))}"
    return UserError(f"unknown key '{full_key}'", hint=hint)


def find_key(cfg: DictConfig, key: str) -> list[str]:
    """Return the full names of the keys called `key` anywhere below the root; failing that, of the one most like it.

    A group's own node comes first (`method.rank` before `model.recipe.rank`).
    """
    paths = sorted((path for path in _key_paths(cfg, "") if "." in path and ".recipe." not in path), key=_nearness)
    exact = [path for path in paths if path.rsplit(".", 1)[-1] == key]
    if exact:
        return exact
    by_word = {path.rsplit(".", 1)[-1]: path for path in reversed(paths)}
    match = nearest(key, by_word)
    return [by_word[match]] if match is not None else []


def read(node: DictConfig | ListConfig, key: str | int, prefix: str) -> Any:
    """Return one value of a node, resolved; `prefix` is the node's own full key, for the message.

    Raises:
        UserError: the value is required and missing, or its interpolation cannot be resolved.
    """
    full_key = f"{prefix}.{key}" if prefix else str(key)
    try:
        return node[key]  # type: ignore[index]
    except MissingMandatoryValue:
        raise UserError(f"{full_key} has no value and needs one", hint=f"write {full_key}=…") from None
    except OmegaConfBaseException as error:
        raw: Any = OmegaConf.to_container(node, resolve=False)
        text = raw[key]
        reason = str(error).splitlines()[0]
        raise UserError(f"{full_key}={text} cannot be resolved: {reason}") from error


def to_plain(cfg: Any, prefix: str = "") -> Any:
    """Return a configuration as plain dicts, lists and scalars, resolved leaf by leaf.

    Raises:
        UserError: a leaf is missing or cannot be resolved; the message has its full key.
    """
    if isinstance(cfg, DictConfig):
        if cfg._is_none():
            return None
        return {str(key): to_plain(read(cfg, key, prefix), _join(prefix, key)) for key in cfg}  # type: ignore[arg-type]
    if isinstance(cfg, ListConfig):
        return [to_plain(read(cfg, index, prefix), _join(prefix, index)) for index in range(len(cfg))]
    return cfg


def config_hash(cfg: DictConfig) -> str:
    """Return 16 hexadecimal digits that name what a configuration computes, wherever and whenever it runs.

    `resume`, `hydra`, `paths` and `cluster` do not count, nor does a value that mentions the run folder. The caller
    sees to it that `name` resolves (inside a Hydra job it does; `compose_config` has put its value in).
    """
    counted = deepcopy(cfg)
    with read_write(counted), open_dict(counted):
        if "paths" in counted and counted.paths is not None and "output_dir" in counted.paths:
            counted.paths.output_dir = "<run folder>"
    plain = {
        str(key): to_plain(read(counted, str(key), ""), str(key))
        for key in counted
        if key not in ("resume", "hydra", "paths", "cluster")
    }
    text = json.dumps(plain, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_node(node: DictConfig, path: str) -> None:
    target = read(node, "_target_", path) if "_target_" in node else None
    parameters: dict[str, Any] = {}
    open_ended = target is None
    if path == "paths":
        parameters, open_ended = dict.fromkeys(catalog.keys("paths"), str), False
    if target is not None:
        if not isinstance(target, str):
            raise UserError(f"{path}._target_: expected the dotted path of a class or function, got {target!r}")
        parameters, open_ended = schema_of(locate(target, path))
    for key in node:  # of a table that was typed, a number too
        value = read(node, key, path)  # type: ignore[arg-type]
        key = str(key)
        full_key = f"{path}.{key}"
        if key in parameters:
            check_value(value, parameters[key], _original(node, key) or full_key)
        elif key not in RESERVED and not open_ended:
            raise unknown_key(full_key, key, parameters, None)
        if isinstance(value, DictConfig):
            _check_node(value, full_key)
        elif isinstance(value, ListConfig):
            to_plain(value, full_key)


def _check_root(cfg: DictConfig) -> None:
    # A group without a choice (`subspace: null`) leaves no key; without these nothing can be said about a run.
    absent = [name for name in ("name", "protocol", "method", "paths") if name not in cfg]
    if absent:
        raise UserError(f"the configuration has no '{absent[0]}'", hint=f"leave out ~{absent[0]}")
    name = Path(str(cfg.name))
    if not name.parts or name.is_absolute() or ".." in name.parts:
        raise UserError(f"name={cfg.name}: expected a folder below paths.output_root ({cfg.paths.output_root})")
    if "seed" in cfg and cfg.seed < 0:
        raise UserError(f"seed={cfg.seed}: expected 0 or more")
    resume = cfg.get("resume")
    if resume not in (None, "auto") and not Path(resume).exists():
        raise UserError(
            f"resume={resume}: no such run folder or checkpoint", hint="null, auto, a run folder or a .ckpt file"
        )
    compare = cfg.get("compare")
    if compare in (None, "auto"):
        return
    known = [*catalog.options("optimizer"), *catalog.options("method")]
    if compare not in known:
        near = did_you_mean(compare, known) or f"expected auto, null or one of {', '.join(known)}"
        raise UserError(f"compare={compare}: no such optimizer or method", hint=near)


def _check_protocol(cfg: DictConfig) -> None:
    method, protocol = cfg.get("method"), cfg.get("protocol")
    if method is None or protocol is None or "_target_" not in method or "_target_" not in protocol:
        return
    allowed = getattr(locate(method._target_, "method"), "protocols", None)
    chosen = str(protocol._target_).split(".")[-2]
    if allowed is not None and chosen not in allowed:
        raise UserError(
            f"this method runs with protocol={' or '.join(allowed)}, not with protocol={chosen}",
            hint=f"write protocol={allowed[0]}",
        )


def check_companions(cfg: DictConfig) -> None:
    """Refuse clients or checkpoints to merge without a protocol for them, and such a protocol without them.

    Raises:
        UserError: see above.
    """
    chosen = str(cfg.protocol._target_).split(".")[-2]
    if chosen == "federated" and cfg.get("federation") is None:
        raise UserError("protocol=federated needs clients", hint="federation=clients_10")
    if chosen != "federated" and cfg.get("federation") is not None:
        raise UserError(
            f"federation is for protocol=federated, and this method runs with protocol={chosen}",
            hint="method=fedavg, method=fot, or no federation=",
        )
    if (chosen == "merge") != (cfg.get("merge") is not None):
        if chosen == "merge":
            raise UserError("protocol=merge needs to know what is merged", hint="merge=default")
        raise UserError(
            f"merge is for protocol=merge, and this method runs with protocol={chosen}",
            hint="method=task_arithmetic, ties, iso_c …, or no merge=",
        )


def _nearness(path: str) -> tuple[int, int, str]:
    group = path.split(".", 1)[0]
    return path.count("."), _LIKELY.index(group) if group in _LIKELY else len(_LIKELY), path


def _original(node: DictConfig, key: str) -> str | None:
    """Return the key that is the one to set, where a value only repeats it (`subspace.rank: ${method.rank}`)."""
    raw = node._get_node(key)
    match = _ALIAS.match(str(raw._value())) if isinstance(raw, OmegaNode) else None
    return match[1] if match else None


def _key_paths(node: DictConfig, prefix: str) -> list[str]:
    found = []
    for key in map(str, node):
        if _original(node, key) is not None:
            continue
        found.append(_join(prefix, key))
        if not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
            child = node.get(key)
            if isinstance(child, DictConfig):
                found.extend(_key_paths(child, _join(prefix, key)))
    return found


def _join(prefix: str, key: Any) -> str:
    return f"{prefix}.{key}" if prefix else str(key)
