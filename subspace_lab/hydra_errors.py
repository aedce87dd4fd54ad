"""Hydra's and OmegaConf's exceptions in one line: what was typed, what is wrong with it, the nearest that exists."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from subspace_lab import catalog
from subspace_lab.errors import UserError, nearest
from subspace_lab.schema import unknown_key
from subspace_lab.signatures import locate, schema_of

Compose = Callable[[list[str]], DictConfig]
# What other packages bring, with the extra that installs them.
_PLUGINS = {"hydra/sweeper/optuna": "optuna"}
CONFIG_ERRORS = (HydraException, OmegaConfBaseException)


def explain(error: Exception, overrides: Sequence[str], compose: Compose) -> UserError:
    """Turn an exception raised while composing into a `UserError`.

    Args:
        error: what Hydra or OmegaConf raised.
        overrides: the command line's overrides.
        compose: composes a list of overrides into a configuration; used to search the tree for what was meant.
    """
    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, UserError):
            return link
        if isinstance(link, OverrideParseException):
            return _syntax_error(link)
        if isinstance(link, MissingConfigException):
            return _missing_option(link, overrides)
    for link in chain:
        if isinstance(link, (ConfigAttributeError, ConfigKeyError)) and link.full_key:
            return _unknown(str(link.full_key), overrides, compose)
    return _plain(error, chain, overrides, compose)


def explain_null(error: ValueError, overrides: Sequence[str]) -> Exception:
    """Turn the ValueError with which Hydra meets `GROUP=null` into a `UserError`; any other comes back as it is."""
    words = [text.lstrip("+").split("=", 1)[0] for text in overrides if text.endswith(("=null", ",null"))]
    group = next((word for word in words if word in catalog.groups()), None)
    if group is None or "Config group override must be" not in str(error):
        return error
    names = ", ".join(catalog.options(group))
    return UserError(f"{group}=null: a run needs one", hint=f"{group} is one of: {names}")


def _syntax_error(error: OverrideParseException) -> UserError:
    text = error.override
    if "." in text and "=" not in text:
        return UserError(f"'{text}': expected key=value", hint=f"write {text}=…")
    if "=" not in text:
        if text in (catalog.PLURALS | dict.fromkeys(catalog.groups())):
            group = catalog.PLURALS.get(text, text)
            return UserError(
                f"'{text}': expected key=value", hint=f"write {group}=… ({', '.join(catalog.options(group))})"
            )
        near = nearest(text, ("list", "doctor", "resume", "report", "completion"))
        hint = f"did you mean 'subspace-lab {near}'?" if near else "see subspace-lab --help"
        return UserError(f"'{text}' is neither a command nor key=value", hint=hint)
    value = text.split("=", 1)[1]
    return UserError(f"cannot read '{text}'", hint=f"quote the value: {text.split('=', 1)[0]}='\"{value}\"'")


def _missing_option(error: MissingConfigException, overrides: Sequence[str]) -> UserError:
    missing = str(error.missing_cfg_file or "").removesuffix(".yaml")
    group, _, name = missing.rpartition("/")
    options = [option for option in error.options or () if not option.endswith("_schema")]
    if missing in _PLUGINS:
        return UserError(
            f"{group}={name} needs a plugin that is not installed",
            hint=f"pip install 'subspace-lab[{_PLUGINS[missing]}]'",
        )
    if not group:
        return UserError(
            f"no configuration file named '{missing}'", hint="--config-name takes a file of the search path"
        )
    near = nearest(name, options)
    listing = f"{group} is one of: {', '.join(options)}" if options else f"there is no {group} to choose"
    typed = next((text for text in overrides if text.lstrip("+").startswith(f"{group}=")), f"{group}={name}")
    hint = f"did you mean '{near}'? ({listing})" if near else listing
    return UserError(f"{typed.lstrip('+')}: there is no {group} '{name}'", hint=hint)


def _unknown(full_key: str, overrides: Sequence[str], compose: Compose) -> UserError:
    key = full_key.rsplit(".", 1)[-1]
    if full_key.startswith("hydra."):
        return UserError(f"unknown key '{full_key}'", hint="see subspace-lab --cfg hydra")
    cfg = _without(full_key, overrides, compose)
    if cfg is None:
        return UserError(f"unknown key '{full_key}'", hint="see subspace-lab --cfg job")
    if "." not in full_key:
        typed = next((text.split("=", 1)[1] for text in overrides if text.startswith(f"{full_key}=")), "")
        group = nearest(full_key, [*catalog.groups(), *catalog.PLURALS])
        group = catalog.PLURALS.get(group or "", group or "")
        if group and typed in catalog.options(group):
            return UserError(f"unknown key '{full_key}'", hint=f"did you mean '{group}={typed}'?")
        return unknown_key(full_key, key, _names([*map(str, cfg), *catalog.groups()]), cfg)
    parent_name = full_key.rpartition(".")[0]
    parent: object = cfg
    for part in parent_name.split("."):
        if not isinstance(parent, DictConfig) or part not in parent:
            return _unknown(parent_name, [*overrides, f"{parent_name}={{}}"], compose)
        parent = parent[part]
    if not isinstance(parent, DictConfig):
        return UserError(f"'{full_key}': {parent_name} is {parent}, it has no keys")
    group, _, rest = full_key.partition(".")
    having = [option for option in catalog.options(group) if rest in catalog.keys(group, option)]
    if "_target_" in parent:
        parameters, open_ended = schema_of(locate(parent["_target_"], parent_name))
        if key in parameters or open_ended:
            # The target takes it, the file just does not list it.
            others = f", or choose {', '.join(f'{group}={option}' for option in having[:4])}" if having else ""
            return UserError(
                f"'{full_key}' is not in the configuration, but can be added", hint=f"write +{full_key}=…{others}"
            )
    if having:
        only = " and ".join(f"{group}={option}" for option in having[:4])
        return UserError(f"unknown key '{full_key}'", hint=f"only {only} {'have' if len(having) > 1 else 'has'} it")
    return unknown_key(full_key, key, _names(list(map(str, parent))), cfg)


def _plain(error: Exception, chain: list[BaseException], overrides: Sequence[str], compose: Compose) -> UserError:
    text = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
    match = re.search(r"Could not override '([^']+)'. No match in the defaults list", text)
    if match:
        return _unknown(match[1], overrides, compose)
    match = re.search(r"Override (\S+) looks like a config group", text)
    if match:
        group = match[1].split("=", 1)[0].lstrip("+~")
        near = nearest(group, catalog.groups())
        return UserError(f"{match[1]}: there is no group '{group}'", hint=f"did you mean '{near}'?" if near else None)
    if "Ambiguous value for argument" in text or "requires --multirun" in text:
        typed = (re.search(r"'([^']*)'", text) or ["", "the value"])[1]
        key, _, values = typed.partition("=")
        return UserError(
            f"'{typed}' has several values", hint=f"add -m to run them all, or write {key}=[{values}] for a list"
        )
    match = re.search(r"An item is already at '([^']+)'", text)
    if match:
        return UserError(f"+{match[1]}=…: '{match[1]}' already exists", hint=f"leave out the +: {match[1]}=…")
    for link in reversed(chain):
        if isinstance(link, OmegaConfBaseException) and link.full_key:
            return UserError(f"{link.full_key}: {str(link).splitlines()[0]}")
    return UserError(text or f"{type(error).__name__} while composing the configuration")


def _without(full_key: str, overrides: Sequence[str], compose: Compose) -> DictConfig | None:
    """Compose again without the override at fault, falling back to the defaults."""
    head = full_key.split(".", 1)[0]
    kept = [
        text
        for text in overrides
        if re.split(r"[.=]", text.lstrip("+~"), maxsplit=1)[0] != head or text.startswith(f"{head}=")
    ]
    for attempt in (kept, [text for text in kept if not text.startswith(f"{full_key}=")], []):
        try:
            return compose(list(attempt))
        except CONFIG_ERRORS:
            continue
    return None


def _names(names: list[str]) -> list[str]:
    return [name for name in names if not name.startswith("_")]


def _chain(error: BaseException | None) -> Sequence[BaseException]:
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return links
