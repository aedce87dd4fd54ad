"""The words of `subspace-lab report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from subspace_lab.errors import UserError, did_you_mean

USAGE = "subspace-lab report DIR … [--markdown] [--csv FILE] [--metric NAME] [--baseline KEY=VALUE]"


def main(words: Sequence[str]) -> int:
    """Print what `report.main` prints; return the exit code.

    Raises:
        UserError: no folder, an unknown flag, and whatever `report.main` finds.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--metric")
    parser.add_argument("--baseline", action="append", default=[])
    try:
        options, paths = parser.parse_known_args(list(words))
    except argparse.ArgumentError as error:
        raise UserError(f"report: {error}", hint=USAGE) from None
    unknown = [word for word in paths if word.startswith("-")]
    if unknown:
        flags = [flag for action in parser._actions for flag in action.option_strings]
        raise UserError(f"report: unknown flag '{unknown[0]}'", hint=did_you_mean(unknown[0], flags) or USAGE)
    if not paths:
        raise UserError("report needs the folders of one or more runs or sweeps", hint="subspace-lab report outputs/*")
    from subspace_lab.reporting import report

    baseline = [word for text in options.baseline for word in text.split()]
    return report.main(paths, markdown=options.markdown, csv=options.csv, baseline=baseline, metric=options.metric)
