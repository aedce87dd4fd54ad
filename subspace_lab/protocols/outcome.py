"""What a protocol hands back to `run`: figures only, ready for results.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Outcome:
    """The result of one experiment.

    Attributes:
        metrics: flat name -> number; what tables and sweeps look at.
        timing: steps, tokens, seconds.
        memory: bytes.
        data: what was trained on.
        objective: the metric a sweep minimises.
        sections: further entries of results.json, for what is no flat figure.
    """

    metrics: dict[str, float]
    timing: dict[str, float] = field(default_factory=dict)
    memory: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    objective: str = "val/loss"
    sections: dict[str, Any] = field(default_factory=dict)
