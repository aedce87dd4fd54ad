"""Signals as a flag: the handler only takes note, the training loop saves at the next step boundary.

Doing work inside a signal handler deadlocks distributed runs (one rank enters a barrier in its handler while another is
still in the backward pass), so nothing happens here but an assignment. Standard library only, and installed before the
heavy imports: a preemption signal that arrives while torch is still loading must not kill the process.

SIGUSR2 (submitit, our SLURM templates) and SIGUSR1 (Lightning's convention) announce preemption; SIGTERM is a polite
kill; SIGINT is Ctrl-C.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from subspace_lab.errors import Interrupted

Handler = Callable[[int, FrameType | None], Any] | int | None

WATCHED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class Flag:
    """What arrived so far.

    Attributes:
        signal: the last signal number received, None if none was.
        armed: True while a training loop is running that looks at `signal` after every step and saves.
        pid: the process the handlers were installed in; forked children (data loader workers) inherit them.
        previous: the handlers found when ours were installed, called by `chain` once everything is saved.
    """

    signal: int | None = None
    armed: bool = False
    pid: int = 0
    previous: dict[int, Handler] = field(default_factory=dict)


request = Flag()


def install() -> None:
    """Install the handlers once per process; in any other thread than the main one this does nothing."""
    if request.pid == os.getpid() or threading.current_thread() is not threading.main_thread():
        return
    request.pid = os.getpid()
    request.signal = None
    request.previous = {}
    for signum in WATCHED:
        request.previous[signum] = signal.getsignal(signum)
        signal.signal(signum, _handle)


def requested() -> int | None:
    """Return the signal that asked the run to stop, or None."""
    return request.signal


def chain() -> None:
    """Hand the signal on to the handler that was there before ours, after the state is saved.

    Submitit installs one that requeues the job and exits; without such a handler this returns.
    """
    if request.signal is None or request.signal == signal.SIGINT:
        return
    previous = request.previous.get(request.signal)
    if callable(previous):
        previous(request.signal, None)


def _handle(signum: int, frame: FrameType | None) -> None:
    if os.getpid() != request.pid:
        # A forked worker: only the parent decides. SIGTERM must still end it, pools rely on that.
        if signum == signal.SIGTERM:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        return
    before = request.signal
    request.signal = signum
    if signum == signal.SIGINT and (before == signal.SIGINT or not request.armed):
        raise KeyboardInterrupt
    # Of several ranks none leaves the others waiting; and what is being saved after a first signal is not cut short.
    if signum == signal.SIGTERM and not request.armed and before is None and not _has_other_ranks():
        raise Interrupted("terminated by SIGTERM before training had begun; nothing to save")


def _has_other_ranks() -> bool:
    counts = [os.environ.get("WORLD_SIZE"), os.environ.get("SLURM_NTASKS") if "SLURM_STEP_ID" in os.environ else None]
    return any(count not in (None, "", "1") for count in counts)
