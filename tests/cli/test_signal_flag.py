"""The signal handler takes note and nothing else; outside training Ctrl-C acts at once."""

from __future__ import annotations

import os
import signal

import pytest
from in_process import signals_installed  # noqa: F401 - a fixture

from subspace_lab import interrupt
from subspace_lab.errors import Interrupted

pytestmark = pytest.mark.usefixtures("signals_installed")


def test_ctrl_c_acts_at_once_while_nothing_is_training() -> None:
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_in_training_is_noted_and_the_second_acts() -> None:
    interrupt.request.armed = True
    signal.raise_signal(signal.SIGINT)
    assert interrupt.requested() == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_other_signals_in_training_are_noted_however_often(number: int) -> None:
    interrupt.request.armed = True
    for _ in range(3):
        signal.raise_signal(number)
    assert interrupt.requested() == number


def test_a_preemption_notice_before_training_waits_for_its_first_step() -> None:
    signal.raise_signal(signal.SIGUSR2)
    assert interrupt.requested() == signal.SIGUSR2


def test_sigterm_before_training_ends_the_program() -> None:
    with pytest.raises(Interrupted):
        signal.raise_signal(signal.SIGTERM)


def test_ctrl_c_after_a_preemption_notice_is_the_first_ctrl_c() -> None:
    interrupt.request.armed = True
    signal.raise_signal(signal.SIGUSR2)
    signal.raise_signal(signal.SIGINT)
    assert interrupt.requested() == signal.SIGINT


def test_the_handler_found_before_is_called_after_saving() -> None:
    seen: list[int] = []
    signal.signal(signal.SIGUSR2, lambda number, frame: seen.append(number))
    interrupt.request.__init__()  # type: ignore[misc]
    interrupt.install()
    interrupt.request.armed = True
    signal.raise_signal(signal.SIGUSR2)
    assert not seen, "not inside the handler"
    interrupt.chain()
    assert seen == [signal.SIGUSR2]


def test_installing_twice_keeps_what_was_noted() -> None:
    signal.raise_signal(signal.SIGUSR2)
    interrupt.install()
    assert interrupt.requested() == signal.SIGUSR2


def test_forked_workers_leave_ctrl_c_to_the_parent_but_can_be_terminated() -> None:
    child = os.fork()
    if child == 0:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGUSR2)
        if interrupt.requested() is None:
            signal.raise_signal(signal.SIGTERM)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGTERM
