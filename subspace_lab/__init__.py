"""Subspace Lab: a subspace method says in which directions parameters may move; the rest is an ordinary training run.

Importing the package imports nothing else: the command line answers before torch is loaded.
"""

from __future__ import annotations

from subspace_lab._version import __version__

__all__ = ["__version__"]
