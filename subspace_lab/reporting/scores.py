"""By which figure runs are ranked, and whether less of it is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from subspace_lab.errors import UserError, did_you_mean
from subspace_lab.reporting.results import Results

# The first of these that any run has; what a protocol names as its objective comes after them.
PREFERRED = (
    "val/perplexity",
    "val/accuracy",
    "final_accuracy",
    "test/accuracy",
    "merged/accuracy",
    "val/return",
    "val/loss",
)
_MORE_IS_BETTER = (
    "accuracy",
    "return",
    "per_second",
    "transfer",
    "separation",
    "rankme",
    "sparsity",
    "captured_energy",
)


@dataclass(frozen=True)
class Score:
    """A figure to rank by.

    Attributes:
        metric: its name in results.json.
        lower: whether less is better.
    """

    metric: str
    lower: bool

    def of(self, results: Results) -> float | None:
        """Return a run's figure; None if it has none or it is not finite."""
        value = results["metrics"].get(self.metric)
        return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None

    def mean(self, members: Sequence[Results]) -> float | None:
        """Return the mean over runs; None if one of them has diverged, or none has the figure."""
        values = [self.of(run) for run in members if self.metric in run["metrics"]]
        numbers = [value for value in values if value is not None]
        return statistics.fmean(numbers) if numbers and len(numbers) == len(values) else None

    def rank(self, members: Sequence[Results]) -> float:
        """Return a number that is the smaller the better; infinite without a figure."""
        mean = self.mean(members)
        return math.inf if mean is None else mean if self.lower else -mean


def score_named(metric: str) -> Score:
    """Return how to rank by a figure: accuracies, returns and rates are the better the higher, all else the lower."""
    return Score(metric, not any(word in metric for word in _MORE_IS_BETTER))


def choose(runs: Sequence[Results], asked: str | None = None) -> Score | None:
    """Return the figure to rank runs by; None if they have none in common with `PREFERRED` and name no objective.

    Args:
        runs: with `metrics`.
        asked: the figure that the user wants.

    Raises:
        UserError: no run has the figure asked for.
    """
    names = dict.fromkeys(name for run in runs for name, value in run["metrics"].items() if value is not None)
    if asked is not None:
        if asked not in names:
            hint = did_you_mean(asked, names) or f"there are: {', '.join(sorted(names))}"
            raise UserError(f"--metric {asked}: no run has it", hint=hint)
        return score_named(asked)
    objectives = (str(run["objective"]) for run in runs if run.get("objective"))
    return next((score_named(name) for name in (*PREFERRED, *objectives) if name in names), None)
