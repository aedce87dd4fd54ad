"""The command line inside the test's process, in an empty folder, with nothing of it left behind."""

from __future__ import annotations

import logging
import signal
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from subspace_lab import interrupt


@dataclass
class Answer:
    code: int
    out: str
    err: str


Command = Callable[..., Answer]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Command]:
    from subspace_lab import cli

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["subspace-lab"])
    root = logging.getLogger()
    before = root.handlers[:], root.level
    handlers = {number: signal.getsignal(number) for number in interrupt.WATCHED}

    def run(*words: str) -> Answer:
        capsys.readouterr()
        code = cli.main(list(words))
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    yield run
    for handler in root.handlers[:]:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before
    for number, handler in handlers.items():
        signal.signal(number, handler)
    interrupt.request.__init__()  # type: ignore[misc]


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
