"""The two exceptions that end a run on purpose, and the nearest-name hints every error message uses.

Exit codes (rendered by `subspace_lab.cli`): 2 for `UserError` and for running out of memory, 130 for `Interrupted`,
1 for anything else, which is a bug of ours. Standard library only: the command line imports this before torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something the user can mend, told in one line and without a traceback.

    Args:
        message: one clear line: what was wrong and what was expected.
        hint: the nearest valid name, or what to type instead.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def __reduce__(self) -> tuple[object, ...]:
        # The default would forget the keyword-only hint; launchers send exceptions between processes.
        return (_rebuild, (self.message, self.hint))


class Interrupted(Exception):
    """A run stopped by a signal after everything was saved; the message says how to continue."""


def _rebuild(message: str, hint: str | None) -> UserError:
    return UserError(message, hint=hint)


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option most like `name`, or None if nothing is close.

    A shared beginning counts as close (`cosine` for `cosine_warmup`), a difference of case or of `-` and `_` as none.
    """
    by_folded = {_fold(option): option for option in options}
    folded = _fold(name)
    if folded in by_folded:
        return by_folded[folded]
    close = difflib.get_close_matches(folded, by_folded, n=5, cutoff=0.6)
    # Of equally close ones, the one with more of the beginning: `gpn` is gpm rather than sgp.
    close.sort(key=lambda option: (_likeness(option, folded), _shared_beginning(option, folded)), reverse=True)
    if not close and len(folded) >= 3:
        close = sorted((option for option in by_folded if option.startswith(folded)), key=len)[:1]
    return by_folded[close[0]] if close else None


def _shared_beginning(option: str, name: str) -> int:
    pairs = enumerate(zip(option, name, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(option), len(name)))


def _likeness(option: str, name: str) -> float:
    return round(difflib.SequenceMatcher(None, option, name).ratio(), 9)


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return `did you mean 'x'?`, or the empty string if no option is close to `name`."""
    match = nearest(name, options)
    return f"did you mean '{match}'?" if match is not None else ""


def _fold(name: str) -> str:
    return name.lower().replace("-", "_")
