"""Merging: the weights of several fine-tuned models made one, tensor by tensor; no model needed, nor Lightning."""

from __future__ import annotations

from subspace_lab.merging.base import Merge, Stack
from subspace_lab.merging.in_memory import merge_state_dicts

__all__ = ["Merge", "Stack", "merge_state_dicts"]
