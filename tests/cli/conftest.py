"""The command line inside the test's process, in an empty folder, with nothing of it left behind."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest
from in_process import Answer, Command, command

__all__ = ["Answer", "Command", "command"]


@pytest.fixture
def fake_run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable], None]:
    """Put a function in the place of `subspace_lab.run.run`, and let every configuration pass as valid."""
    from subspace_lab import schema

    def install(function: Callable) -> None:
        module = types.ModuleType("subspace_lab.run")
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "subspace_lab.run", module)
        monkeypatch.setattr(schema, "validate", lambda cfg: None)

    return install
