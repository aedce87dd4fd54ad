"""No subspace: every parameter may move in every direction."""

from __future__ import annotations

from subspace_lab.methods.base import Method


class Full(Method):
    """The baseline of every comparison: the configured optimizer on all parameters."""

    name = "none"
