"""Which runs are repetitions of one another: those of which the same was typed, but for the seed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from subspace_lab.reporting.results import Results

Key = tuple[object, ...]
Settings = tuple[tuple[str, str], ...]

# What says where and how a run is kept and shown, not what it computes.
_ASIDE = ("seed", "name", "tags", "resume", "compare", "estimate", "export", "published", "paths", "hydra", "logger")
_ASIDE_KEYS = (
    "trainer.progress",
    "trainer.checkpoint_every",
    "trainer.keep_checkpoints",
    "trainer.log_every",
    "data.data_dir",
    "data.cache_dir",
)
_OF_THE_TASK = ("data.", "model.", "scenario.", "merge.family")
COLUMNS = ("method", "optimizer", "model", "data", "steps", "status")
# What these say as it came out.
_OUTCOME = ("method", "optimizer", "model", "data", "protocol", "trainer.max_steps", "trainer.max_epochs")


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but the seed.

    Attributes:
        columns: the values of `COLUMNS`.
        settings: (key, value) of everything else that was typed, by key.
    """

    columns: tuple[str, ...]
    settings: Settings

    @property
    def task(self) -> Key:
        """What is to be learnt, on what, for how long: methods are compared within it."""
        settings = tuple(entry for entry in self.settings if entry[0].startswith(_OF_THE_TASK))
        return (*self.columns[2:5], settings)


def group_of(results: Results) -> Group:
    """Return the group of a run; results.json files without `overrides` differ in the columns only."""
    choices = results.get("choices", {})
    columns = (
        str(results.get("method", "?")),
        str(choices.get("optimizer", "?")),
        str(choices.get("model", "?")),
        str(choices.get("data", "?")),
        str(results.get("timing", {}).get("steps", "?")),
        str(results.get("status", "?")),
    )
    settings = dict(settings_of(results.get("overrides") or ()))
    protocol = choices.get("protocol")
    if protocol not in (None, "fit", "transfer"):  # these two train alike
        settings["protocol"] = str(protocol)
    if "merge" in results:  # experts of another family are another task
        settings["merge.family"] = str(results["merge"]["family"])
    if "continual" in results:
        settings["scenario.head"] = str(results["continual"]["head"])
    return Group(columns, tuple(sorted(settings.items())))


def grouped(runs: Sequence[Results]) -> dict[Group, list[Results]]:
    """Return the runs of each group, in the order in which they are first met."""
    groups: dict[Group, list[Results]] = defaultdict(list)
    for results in runs:
        groups[group_of(results)].append(results)
    return dict(groups)


def settings_of(overrides: Sequence[str]) -> Settings:
    """Return what was typed as (key, value) by key, without what does not change a run's figures.

    The last of several values of a key counts; numbers are compared as numbers (`1e-3` is `0.001`).
    """
    found = {}
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key.split(".", 1)[0].split("/", 1)[0] not in _ASIDE and key not in (*_ASIDE_KEYS, *_OUTCOME):
            found[key] = plain(value)
    return tuple(sorted(found.items()))


def differences(groups: Sequence[Group]) -> list[str]:
    """Return for each group the settings in which not all groups agree, in short: `k=4, lr=0.01`.

    A key loses what stands before its last dot, unless two keys would then read alike.
    """
    typed = [dict(group.settings) for group in groups]
    keys = sorted({key for settings in typed for key in settings})
    differing = [key for key in keys if len({settings.get(key) for settings in typed}) > 1]
    short = {key: key.rsplit(".", 1)[-1] for key in differing}
    names = list(short.values())
    short = {key: name if names.count(name) == 1 else key for key, name in short.items()}
    return [", ".join(_word(short[key], own[key]) for key in differing if key in own) for own in typed]


def _word(key: str, value: str) -> str:
    return f"{key}={value}" if value else key


def plain(value: str) -> str:
    """Return a value as it is compared: numbers alike however they are written, no spaces."""
    text = value.replace(" ", "")
    try:
        return f"{float(text):.12g}"
    except ValueError:
        return text


def words(groups: Sequence[Group]) -> dict[Group, str]:
    """Return for each group the overrides that make it, where not all groups agree: `method=galore optimizer.lr=0.1`.

    What all groups share is left out, unless there is one group alone: that is called by its method.
    """
    typed = {group: dict(group.settings) for group in groups}
    columns = [i for i in range(4) if len({group.columns[i] for group in groups}) > 1]
    keys = sorted({key for settings in typed.values() for key in settings})
    keys = [key for key in keys if len({settings.get(key) for settings in typed.values()}) > 1]
    told = {}
    for group in groups:
        parts = [f"{COLUMNS[i]}={group.columns[i]}" for i in columns]
        parts += [_word(key, typed[group][key]) for key in keys if key in typed[group]]
        told[group] = " ".join(parts) or f"method={group.columns[0]}"
    return told
