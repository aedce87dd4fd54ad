"""What there is to choose: the groups of conf/, their options, and what each file says about itself.

A file's leading comment lines are its description; a line `# paper: …` is its citation. Standard library only: `list`,
shell completion and error messages read this before Hydra is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import util
from pathlib import Path

from subspace_lab.errors import UserError, nearest

# The words people use, for the folder's name. Every folder also answers to its own name.
PLURALS = {
    "methods": "method",
    "subspaces": "subspace",
    "optimizers": "optimizer",
    "schedulers": "scheduler",
    "models": "model",
    "datasets": "data",
    "trainers": "trainer",
    "loggers": "logger",
    "clusters": "cluster",
    "protocols": "protocol",
    "scenarios": "scenario",
    "federations": "federation",
    "merges": "merge",
    "experiments": "experiment",
    "searches": "hparams_search",
}
# What `list` shows without an argument, in this order.
MAIN_GROUPS = (
    "method",
    "subspace",
    "optimizer",
    "scheduler",
    "model",
    "data",
    "scenario",
    "federation",
    "merge",
    "protocol",
    "trainer",
    "logger",
    "cluster",
    "experiment",
)

# An entry of a defaults list that is another file of the same group.
_BUILDS_ON = re.compile(r"^ +- (?!override |_self_|/)(\w+)$", re.MULTILINE)
_SIZE = re.compile(r"(\D+|(?<=\d)$|^)(\d*)([kmb]?(?![a-z]))")
_KEY = re.compile(r"^( *)([A-Za-z_]\w*):(.*)$")


@dataclass(frozen=True)
class Entry:
    """One file of a group: the option's name, its description and its citation (each "" if the file has none)."""

    name: str
    description: str
    paper: str


@cache
def conf_root() -> Path:
    """Return the folder of the configuration package, wherever it is installed.

    Raises:
        UserError: the package is not installed (a bare checkout).
    """
    spec = util.find_spec("subspace_lab.conf")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the package 'subspace_lab.conf' is not installed", hint="pip install -e . in the checkout, or make run"
        )
    return Path(spec.submodule_search_locations[0])


def groups() -> list[str]:
    """Return the groups that have at least one option; hydra/ is Hydra's own and left out."""
    root = conf_root()
    return sorted(
        path.name
        for path in root.iterdir()
        if path.is_dir() and path.name not in ("hydra", "local") and options(path.name)
    )


def options(group: str) -> list[str]:
    """Return the options of a group, by name and size (`60m` before `1b`); empty if there is no such group."""
    return sorted((path.stem for path in (conf_root() / group).glob("*.yaml")), key=_natural)


def entries(group: str) -> list[Entry]:
    """Return the options of a group with what their files say about themselves."""
    return [_entry(conf_root() / group / f"{name}.yaml") for name in options(group)]


def group_named(word: str) -> str:
    """Return the group that `word` means (`methods` and `method` alike).

    Raises:
        UserError: no group is called so.
    """
    known = groups()
    group = PLURALS.get(word, word)
    if group in known:
        return group
    near = nearest(word, [*known, *(plural for plural, name in PLURALS.items() if name in known)])
    listing = ", ".join(known)
    hint = f"did you mean '{near}'? (groups: {listing})" if near else f"groups: {listing}"
    raise UserError(f"nothing to list under '{word}'", hint=hint)


def keys(group: str, option: str | None = None) -> list[str]:
    """Return the dotted keys below a group's node, of one option or of all, read off the YAML's indentation.

    A file with `# @package _global_` names the groups itself, so its keys come from below `<group>:`.
    """
    names = [option] if option is not None else options(group)
    found: dict[str, None] = {}
    for name in names:
        path = conf_root() / group / f"{name}.yaml"
        if path.is_file():
            found.update(dict.fromkeys(_file_keys(path, group)))
            if option is not None:
                for base in _BUILDS_ON.findall(path.read_text(encoding="utf-8")):
                    found.update(dict.fromkeys(keys(group, base)))
    return list(found)


def root_keys() -> list[str]:
    """Return the plain keys of conf/config.yaml (`seed`, `resume`, …)."""
    return [key for key in _dotted(conf_root() / "config.yaml") if key != "defaults" and "." not in key]


def _natural(name: str) -> list[tuple[str, float]]:
    scale = {"k": 1e3, "m": 1e6, "b": 1e9}
    return [(word, float(number or 0) * scale.get(unit, 1)) for word, number, unit in _SIZE.findall(name)]


def _file_keys(path: Path, group: str) -> Iterator[str]:
    is_global = "@package _global_" in path.read_text(encoding="utf-8")
    for key in _dotted(path):
        if key.split(".", 1)[0] == "defaults" or key.rsplit(".", 1)[-1].startswith("_"):
            continue
        if not is_global:
            yield key
        elif key.startswith(f"{group}."):
            yield key.removeprefix(f"{group}.")


def _dotted(path: Path) -> Iterator[str]:
    stack: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _KEY.match(line)
        if match is None:
            continue
        indent = len(match[1])
        while stack and stack[-1][0] >= indent:
            stack.pop()
        stack.append((indent, match[2]))
        yield ".".join(name for _, name in stack)


def _entry(path: Path) -> Entry:
    text: list[str] = []
    paper = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words = line.lstrip("#").strip()
        if words.startswith("@package"):
            continue
        if words.lower().startswith("paper:"):
            paper = words.split(":", 1)[1].strip()
        elif words and not paper:
            text.append(words)
    return Entry(path.stem, " ".join(text), paper)
