"""Ctrl-C and SIGTERM end training between two steps, with a checkpoint; a second Ctrl-C ends it at once.

Interrupting in the middle of an optimizer step would leave half-updated weights, so the handler only takes a note.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class GracefulStop:
    """A context in which the first SIGINT or SIGTERM is a request, and the second an interrupt."""

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, Any] = {}

    def __call__(self) -> bool:
        """Whether training shall end."""
        return self.requested is not None

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested is not None:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        print(f"\n{self.requested}: saving after this step (once more to stop at once)", file=sys.stderr, flush=True)
