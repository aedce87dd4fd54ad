"""What a `_target_` is and what it takes: importing it by its dotted path, and the annotations of its parameters."""

from __future__ import annotations

import importlib
import inspect
from typing import Any, get_type_hints

from subspace_lab.errors import UserError, did_you_mean


def locate(path: str, key: str) -> Any:
    """Import what a `_target_` names.

    Args:
        path: dotted path of a class or function.
        key: the full key of the node, for the message.

    Raises:
        UserError: there is no such thing, or a package it needs is not installed.
    """
    parts = path.split(".")
    for end in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:end])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if module_name == missing or module_name.startswith(f"{missing}."):
                continue
            raise UserError(
                f"{key} needs the package '{missing}'", hint=f"pip install {missing.split('.')[0]}"
            ) from error
        return _attributes(found, parts[end:], f"{key}._target_={path}")
    if parts[0] != "subspace_lab":
        raise UserError(f"{key} needs the package '{parts[0]}'", hint=f"pip install {parts[0]}")
    raise UserError(f"{key}._target_={path}: no such class or function")


def _attributes(found: Any, names: list[str], what: str) -> Any:
    for name in names:
        if not hasattr(found, name):
            public = [word for word in dir(found) if not word.startswith("_")]
            raise UserError(f"{what}: no such class or function", hint=did_you_mean(name, public) or None)
        found = getattr(found, name)
    return found


def schema_of(target: Any) -> tuple[dict[str, Any], bool]:
    """Return the annotation of every parameter of a class or function (Any if none), and whether it takes others too.

    A parameter whose default is None also takes None, whatever its annotation says.
    """
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return {}, True
    function = target.__init__ if inspect.isclass(target) else target
    try:
        hints = get_type_hints(function)
    except Exception:
        hints = _hints_one_by_one(function)
    parameters: dict[str, Any] = {}
    open_ended = False
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            open_ended = True
        elif parameter.kind is not parameter.VAR_POSITIONAL:
            hint = hints.get(name, Any)
            parameters[name] = hint | None if parameter.default is None and _can_be_optional(hint) else hint
    return parameters, open_ended


def _can_be_optional(hint: Any) -> bool:
    try:
        hint | None
    except TypeError:
        return False
    return hint is not Any


def _hints_one_by_one(function: Any) -> dict[str, Any]:
    # One name imported for type checkers only makes get_type_hints fail; the other parameters still have types.
    scope = getattr(inspect.unwrap(function), "__globals__", {})
    hints: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        try:
            hints[name] = eval(annotation, scope) if isinstance(annotation, str) else annotation
        except Exception:
            hints[name] = Any
    return hints
