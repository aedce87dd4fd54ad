"""Sweeps (`-m`): checked before they start, launched cell by cell, continued and told from files on disk alone."""

from __future__ import annotations

from subspace_lab.sweeps.checks import refuse_local_ddp
from subspace_lab.sweeps.overrides import deferred, quote, searchpath
from subspace_lab.sweeps.prepare import prepare

__all__ = ["deferred", "prepare", "quote", "refuse_local_ddp", "searchpath"]
