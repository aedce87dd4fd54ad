"""What continual methods are compared with: fine-tuning that forgets, and training on all tasks at once."""

from __future__ import annotations

from typing import ClassVar, Literal

from subspace_lab.methods.continual.base import ContinualMethod


class Naive(ContinualMethod):
    """Fine-tuning: each task is trained after the other and nothing is protected. The lower bound."""

    name: ClassVar[str] = "naive"


class Joint(ContinualMethod):
    """All tasks at once, in the steps of the whole sequence: the upper bound, of which only the end is defined."""

    name: ClassVar[str] = "joint"
    schedule: ClassVar[Literal["sequence", "joint"]] = "joint"
