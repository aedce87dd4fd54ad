"""Does a configuration value fit a type annotation? One line if it does not, with what was expected."""

from __future__ import annotations

import collections.abc
import inspect
import os
import types
import typing
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Literal, Union, get_args, get_origin

from subspace_lab.errors import UserError, did_you_mean

_SEQUENCES = (list, tuple, set, frozenset, Sequence, collections.abc.Iterable, collections.abc.Collection)
_MAPPINGS = (dict, Mapping, collections.abc.MutableMapping)
_PLAIN = (bool, int, float, str)


def check_value(value: Any, annotation: Any, key: str) -> None:
    """Check one value of a configuration (a scalar, a list or a mapping, None for null) against an annotation.

    An int counts as a float, a list as any sequence, a string as a path, and a mapping with a `_target_` as whatever
    it builds. A bool is never an int, and nothing but a string is a string.

    Args:
        value: the resolved value.
        annotation: a resolved annotation (not a string).
        key: the value's full key, for the message.

    Raises:
        UserError: the value does not fit; the message says what would.
    """
    if fits(value, annotation):
        return
    expected = describe(annotation)
    raise UserError(f"{key}={_show(value)}: expected {expected}", hint=_hint(value, annotation, key))


def fits(value: Any, annotation: Any) -> bool:
    """Return whether a value fits an annotation; see `check_value` for the rules."""
    origin = get_origin(annotation)
    if annotation is Any or annotation is inspect.Parameter.empty or isinstance(annotation, typing.TypeVar):
        return True
    if origin is typing.Annotated or isinstance(annotation, typing.NewType):
        return fits(value, get_args(annotation)[0] if origin is typing.Annotated else annotation.__supertype__)
    if origin in (Union, types.UnionType):
        return any(fits(value, member) for member in get_args(annotation))
    if annotation is None or annotation is type(None):
        return value is None
    if value is None:
        return False
    if origin is Literal:
        return any(value == choice and type(value) is type(choice) for choice in get_args(annotation))
    kind = origin or annotation
    if not isinstance(kind, type):
        return True  # a form this module does not know: the target itself must judge
    if kind in _SEQUENCES:
        return _fits_sequence(value, kind, get_args(annotation))
    if kind in _MAPPINGS:
        return _fits_mapping(value, get_args(annotation))
    if _is_mapping(value):
        # Built by Hydra into an object of that class; a plain type cannot come from a mapping.
        return kind not in _PLAIN and not issubclass(kind, os.PathLike)
    return _fits_class(value, kind)


def describe(annotation: Any) -> str:
    """Return an annotation in words a user of the command line knows: `int, float or null`."""
    origin, members = get_origin(annotation), get_args(annotation)
    if annotation is None or annotation is type(None):
        return "null"
    if origin is typing.Annotated:
        return describe(members[0])
    if origin is Literal:
        return ("one of " if len(members) > 1 else "") + ", ".join(_show(choice) for choice in members)
    if origin in (Union, types.UnionType):
        wanted = [member for member in members if not (member is int and float in members)]
        words = list(dict.fromkeys(describe(member) for member in wanted))
        return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
    kind = origin or annotation
    if kind in _SEQUENCES:
        inner = [describe(member) for member in members if member is not Ellipsis]
        if kind is tuple and inner and Ellipsis not in members:
            return f"a list of {len(inner)} ({', '.join(inner)})"
        return f"a list of {inner[0]}" if inner and inner[0] != "anything" else "a list"
    if kind in _MAPPINGS:
        return "a mapping"
    if isinstance(kind, type) and issubclass(kind, os.PathLike):
        return "a path"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    return {bool: "true or false", int: "an integer", float: "a number", str: "text", Any: "anything"}.get(
        kind, getattr(kind, "__name__", str(kind))
    )


def _fits_class(value: Any, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if issubclass(kind, os.PathLike):
        return isinstance(value, (str, os.PathLike))
    if issubclass(kind, Enum):
        return isinstance(value, kind) or value in kind.__members__
    return isinstance(value, kind)


def _fits_sequence(value: Any, kind: type, members: tuple[Any, ...]) -> bool:
    if isinstance(value, str) or not isinstance(value, Sequence):
        return False
    if not members:
        return True
    if kind is tuple and Ellipsis not in members:
        return len(value) == len(members) and all(
            fits(item, member) for item, member in zip(value, members, strict=True)
        )
    return all(fits(item, members[0]) for item in value)


def _fits_mapping(value: Any, members: tuple[Any, ...]) -> bool:
    if not _is_mapping(value):
        return False
    return len(members) != 2 or all(fits(item, members[1]) for item in value.values())


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _hint(value: Any, annotation: Any, key: str) -> str | None:
    choices = [
        choice for member in _members(annotation) for choice in get_args(member) if get_origin(member) is Literal
    ]
    if isinstance(value, str):
        return did_you_mean(value, [choice for choice in choices if isinstance(choice, str)]) or None
    kinds = _members(annotation)
    if isinstance(value, float) and value.is_integer() and int in kinds:
        return f"write {key}={int(value)}"
    if isinstance(value, (int, float)) and str in kinds:
        return f"quote it: {key}='\"{_show(value)}\"'"
    return None


def _members(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _show(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
