"""Ctrl-C, SIGTERM and SIGUSR1 end training between two steps, with a checkpoint; a second one ends it at once.

Interrupting in the middle of an optimizer step would leave half-updated weights, so the handler only takes a note.
SIGUSR1 is what batch systems send some minutes before they kill a job (`requeue.py` has them start it again).
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
FROM_SYSTEM = (signal.SIGTERM, signal.SIGUSR1)
"""Those that no terminal sends: the machine is wanted for something else, the run is not."""

_heard: list[str] = []


class StopRequested(Exception):
    """Training ended between two steps because somebody asked for it; the state is on disk."""


class GracefulStop:
    """A context in which the first signal is a request, and the second an interrupt.

    Args:
        quiet: another process says that the request was heard.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.requested: str | None = None
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether training shall end."""
        return self.requested is not None

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in SIGNALS}
            self.listen()
        return self

    def listen(self) -> None:
        """Take the signals (again): a trainer that starts puts handlers of its own before ours.

        Lightning's would end training on SIGTERM after the next validation without saving, and under Slurm save on
        SIGUSR1 in the middle of a step.
        """
        for number in self._previous:
            signal.signal(number, self._note)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        _heard.append(signal.Signals(number).name)
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if not self.quiet:
            print(
                f"\n{self.requested}: saving after this step (once more to stop at once)", file=sys.stderr, flush=True
            )


def system_asked() -> str | None:
    """The signal by which the system alone, and no person, asked for an end since `system_interrupts` was entered."""
    named = {number.name for number in FROM_SYSTEM}
    return _heard[0] if _heard and named.issuperset(_heard) else None


@contextmanager
def system_interrupts() -> Iterator[None]:
    """SIGTERM and SIGUSR1 raise KeyboardInterrupt, so that a run that is loading or evaluating ends as orderly as by
    Ctrl-C: left alone, they end a process at once. Handlers of somebody else stay.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _heard.append(signal.Signals(number).name)
        raise KeyboardInterrupt

    _heard.clear()
    free = [number for number in FROM_SYSTEM if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        free = []
    for number in free:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number in free:
            signal.signal(number, signal.SIG_DFL)
