"""The command line in the test's process, in an empty folder, with nothing of it left behind: what conftests share."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from subspace_lab import interrupt


@contextlib.contextmanager
def signals_as_before() -> Iterator[None]:
    """Afterwards signals go to whom they went to, and none is asked for."""
    handlers = {number: signal.getsignal(number) for number in interrupt.WATCHED}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    interrupt.request.__init__()  # type: ignore[misc]


@pytest.fixture
def signals_installed() -> Iterator[None]:
    """Our handlers, as in a run."""
    with signals_as_before():
        interrupt.request.__init__()  # type: ignore[misc]
        interrupt.install()
        yield


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

    def run(*words: str) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["subspace-lab", *words])
        code = cli.main(list(words))
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    with signals_as_before():
        yield run
    for handler in root.handlers[:]:
        if handler not in before[0]:
            handler.close()
    root.handlers[:], root.level = before
