"""How much better than the baseline, seed by seed: the mean difference of pairs, and a paired t-test.

Runs with one seed share their data order and first weights, so that what varies between seeds alike cancels out.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.reporting import grouping
from subspace_lab.reporting.grouping import Group
from subspace_lab.reporting.results import Results
from subspace_lab.reporting.scores import Score

if TYPE_CHECKING:
    from rich.table import Table

#: the methods that are what the others are compared with, the first that is there
BASELINES = ("none", "naive", "fedavg", "softmax")

Groups = Mapping[Group, Sequence[Results]]


@dataclass(frozen=True)
class Difference:
    """A group of runs against another one.

    Attributes:
        against: the baseline.
        mean: of a run's figure minus that of the baseline's run with the same seed.
        sd: their sample standard deviation; None for one pair.
        pairs: how many seeds both have.
        wins: in how many of them the baseline is worse.
        p: of a two-sided paired t-test that there is no difference; None for one pair or differences without spread.
    """

    against: Group
    mean: float
    sd: float | None
    pairs: int
    wins: int
    p: float | None


def baselines(groups: Groups, asked: Sequence[str] = ()) -> list[Group]:
    """Return the groups to compare with.

    Args:
        groups: all of them.
        asked: `key=value` words a baseline must have, as typed; else the first of `BASELINES` that is there.

    Raises:
        UserError: no group is what was asked for.
    """
    if not asked:
        present = {group.columns[0] for group in groups}
        method = next((name for name in BASELINES if name in present), None)
        return [group for group in groups if group.columns[0] == method]
    wanted = dict(_word(text) for text in asked)
    for key, value in wanted.items():
        values = sorted({found for group in groups if (found := _value(group, key)) is not None})
        if not values:
            names = sorted({key for group in groups for key, _ in group.settings} | set(grouping.COLUMNS[:4]))
            raise UserError(f"--baseline {key}={value}: no run says {key}", hint=f"they say: {', '.join(names)}")
        if value not in values:
            hint = did_you_mean(value, values) or f"{key} is one of: {', '.join(values)}"
            raise UserError(f"--baseline {key}={value}: no run has it", hint=hint)
    having = [group for group in groups if all(_value(group, key) == value for key, value in wanted.items())]
    if not having:
        raise UserError(f"--baseline {' '.join(asked)}: no run has all of these")
    return having


def differences(groups: Groups, score: Score, bases: Sequence[Group]) -> dict[Group, Difference]:
    """Return how groups differ from the baseline of the same task that is otherwise most like them, the best first."""
    found = {}
    for group in sorted(groups, key=lambda group: score.rank(groups[group])):
        rivals = [base for base in bases if base.task == group.task]
        if group in bases or not rivals:
            continue
        base = min(rivals, key=lambda base: (-_likeness(group, base), score.rank(groups[base])))
        difference = compare(groups[group], groups[base], base, score)
        if difference is not None:
            found[group] = difference
    return found


def compare(ours: Sequence[Results], theirs: Sequence[Results], base: Group, score: Score) -> Difference | None:
    """Return the paired difference of two groups; None if they have no seed in common."""
    left, right = _by_seed(ours, score), _by_seed(theirs, score)
    gaps = [left[seed] - right[seed] for seed in left if seed in right]
    if not gaps:
        return None
    wins = sum(gap < 0 if score.lower else gap > 0 for gap in gaps)
    sd = statistics.stdev(gaps) if len(gaps) > 1 else None
    p = None
    if sd:
        from scipy.stats import ttest_1samp  # type: ignore[import-untyped]

        found = float(ttest_1samp(gaps, 0.0).pvalue)
        p = found if math.isfinite(found) else None
    return Difference(base, statistics.fmean(gaps), sd, len(gaps), wins, p)


def table(told: Mapping[Group, Difference], names: Mapping[Group, str], score: Score) -> Table:
    """Return one row per group that was compared.

    Args:
        told: the differences.
        names: what each group is called.
        score: the figure.
    """
    from rich import box
    from rich.table import Table

    shown = Table(box=box.SIMPLE_HEAD, title_justify="left", title_style="")
    for column in ("this", "minus this", score.metric, "pairs", "better in", "p"):
        ours = column.endswith("this")
        shown.add_column(column, justify="left" if ours else "right", overflow="fold", no_wrap=not ours)
    for group, one in told.items():
        spread = "" if one.sd is None else f" ± {one.sd:.3g}"
        p = "—" if one.p is None else "<0.001" if one.p < 0.001 else f"{one.p:.3f}"
        cells = [f"{one.mean:+.3g}{spread}", str(one.pairs), str(one.wins), p]
        shown.add_row(names[group], names[one.against], *cells)
    return shown


def _by_seed(members: Sequence[Results], score: Score) -> dict[object, float]:
    return {run.get("seed"): value for run in members if (value := score.of(run)) is not None}


def _likeness(group: Group, base: Group) -> int:
    return len(set(group.settings) & set(base.settings)) + (group.columns[1] == base.columns[1])


def _word(text: str) -> tuple[str, str]:
    key, equals, value = text.lstrip("+").partition("=")
    if not equals:
        raise UserError(f"--baseline {text}: expected key=value", hint="for example --baseline method=none")
    return key, grouping.plain(value)


def _value(group: Group, key: str) -> str | None:
    if key in grouping.COLUMNS:
        return group.columns[grouping.COLUMNS.index(key)]
    return dict(group.settings).get(key)
