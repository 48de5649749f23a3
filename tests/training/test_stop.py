"""Signals: the first is a request, the second an interrupt; other handlers come back afterwards."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from saferlhf.training.stop import SIGNALS, GracefulStop, sigterm_interrupts


def handlers() -> list[Any]:
    return [signal.getsignal(number) for number in SIGNALS]


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_is_noted_and_the_second_interrupts(number: int, capsys: pytest.CaptureFixture[str]) -> None:
    before = handlers()
    with GracefulStop() as stop:
        assert not stop() and handlers() != before
        os.kill(os.getpid(), number)
        assert stop() and stop.requested == signal.Signals(number).name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before
    assert f"{stop.requested}: saving after this step" in capsys.readouterr().err


def test_handlers_come_back_after_an_exception() -> None:
    before = handlers()
    with pytest.raises(RuntimeError), GracefulStop():
        raise RuntimeError
    assert handlers() == before


def test_listening_again_after_somebody_else_took_the_signal() -> None:
    taken: list[int] = []
    with GracefulStop() as stop:
        signal.signal(signal.SIGTERM, lambda number, _: taken.append(number))
        stop.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop() and not taken


def test_outside_of_its_context_it_takes_nothing() -> None:
    before = handlers()
    GracefulStop().listen()
    assert handlers() == before


def test_in_another_thread_signals_are_left_alone() -> None:
    before, seen = handlers(), []

    def body() -> None:
        with GracefulStop() as stop, sigterm_interrupts():
            seen.append((handlers(), stop()))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


def test_sigterm_interrupts_like_ctrl_c() -> None:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), sigterm_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        # a handler of somebody else stays
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with sigterm_interrupts():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
