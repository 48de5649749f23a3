"""Signals: the first is a request, the second an interrupt; other handlers come back afterwards."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import nullcontext
from typing import Any

import pytest

from saferlhf.training.stop import FROM_SYSTEM, SIGNALS, GracefulStop, system_asked, system_interrupts


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
        with GracefulStop() as stop, system_interrupts():
            seen.append((handlers(), stop()))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


@pytest.mark.parametrize("number", FROM_SYSTEM)
def test_what_the_system_sends_interrupts_like_ctrl_c(number: int) -> None:
    before = {other: signal.getsignal(other) for other in FROM_SYSTEM}
    for other in FROM_SYSTEM:
        signal.signal(other, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), system_interrupts():
            os.kill(os.getpid(), number)
        assert {signal.getsignal(other) for other in FROM_SYSTEM} == {signal.SIG_DFL}
        assert system_asked() == signal.Signals(number).name
        # a handler of somebody else stays
        signal.signal(number, signal.SIG_IGN)
        with system_interrupts():
            os.kill(os.getpid(), number)
            assert signal.getsignal(number) == signal.SIG_IGN and system_asked() is None
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)


@pytest.mark.parametrize(
    ("sent", "asked"),
    [
        ([], None),
        ([signal.SIGUSR1], "SIGUSR1"),
        ([signal.SIGUSR1, signal.SIGTERM], "SIGUSR1"),
        ([signal.SIGINT], None),
        # a person insists, or is the first
        ([signal.SIGTERM, signal.SIGINT], None),
        ([signal.SIGINT, signal.SIGTERM], None),
    ],
)
def test_whether_a_person_asked(sent: list[int], asked: str | None) -> None:
    with system_interrupts(), GracefulStop(quiet=True):
        for count, number in enumerate(sent):
            with pytest.raises(KeyboardInterrupt) if count else nullcontext():
                os.kill(os.getpid(), number)
    assert system_asked() == asked
    with system_interrupts():
        assert system_asked() is None, "the next run was not asked"
