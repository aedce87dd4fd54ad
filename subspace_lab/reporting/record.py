"""The record of one run while it happens: its files at the start, its results.json whatever the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from subspace_lab.errors import Interrupted
from subspace_lab.reporting import results
from subspace_lab.rundir import RESULTS_FILE

if TYPE_CHECKING:
    from subspace_lab.protocols.outcome import Outcome


class RunRecord:
    """Writes a run folder's results.json; on other ranks than the first it does nothing.

    Args:
        run_dir: the run folder.
        about: what is known before training: name, method, seed, config_hash, choices, overrides, command, environment.
        writes: whether this process writes files.
    """

    def __init__(self, run_dir: Path, about: Mapping[str, Any], *, writes: bool) -> None:
        self.run_dir = run_dir
        self.about = dict(about)
        self.writes = writes

    def start(self, config: Mapping[str, Any]) -> None:
        """Write the configuration, command and environment files."""
        if self.writes:
            about = self.about
            results.start(self.run_dir, config, about["config_hash"], about["environment"], about["command"])

    def finished(self) -> results.Results | None:
        """Return the results of an earlier life of this very run whose training had finished, else None."""
        file = self.run_dir / RESULTS_FILE
        if not file.is_file():
            return None
        earlier = results.read(file)
        same = earlier.get("config_hash") == self.about["config_hash"]
        return earlier if same and earlier.get("trained") else None

    def write(self, status: str, outcome: Outcome | None = None, **more: Any) -> results.Results:
        """Write results.json and return it.

        Args:
            status: completed, interrupted, failed or out_of_memory.
            outcome: the figures, if training finished.
            more: further entries.
        """
        found: results.Results = {"status": status, **self.about, "curves": results.CURVES_FILE}
        if outcome is not None:
            found |= {"trained": True, "objective": outcome.objective, "metrics": outcome.metrics}
            found |= {"timing": outcome.timing, "memory": outcome.memory, "data": outcome.data, **outcome.sections}
        else:
            found |= {"trained": False, "metrics": {}, "timing": {}, "memory": {}, "data": {}}
        return self.rewrite(found | more, status)

    def rewrite(self, found: results.Results, status: str) -> results.Results:
        """Write results that were written before once more, with another status."""
        found = found | {"status": status}
        if self.writes:
            results.write(self.run_dir, found)
        return found


def status_of(error: BaseException) -> str:
    """Return the `status` with which an exception ends a run."""
    if isinstance(error, (Interrupted, KeyboardInterrupt)):
        return "interrupted"
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "out_of_memory"
    return "failed"


def baseline_overrides(overrides: Sequence[str], name: str, optimizers: Sequence[str]) -> list[str]:
    """Return the overrides of a run's baseline: the same task, budget and seed, another way to train.

    Args:
        overrides: the run's own.
        name: an optimizer (then without a subspace method) or a method.
        optimizers: the names of the `optimizer` group.
    """
    own = ("method", "subspace", "optimizer", "compare", "export", "resume", "published")
    kept = [text for text in overrides if text.lstrip("+~").split("=", 1)[0].split(".", 1)[0] not in own]
    kept = [text for text in kept if not text.startswith("hydra.")]
    chosen = ["method=none", f"optimizer={name}"] if name in optimizers else [f"method={name}"]
    return [*kept, *chosen, "compare=null", "export=false"]
