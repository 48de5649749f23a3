"""A process that ends when the one that started it does, whatever that one died of (Linux)."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from contextlib import suppress

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def end_with_parent(pid: str, number: signal.Signals) -> None:
    """Have the system send this process a signal when its parent is gone; at once if it is gone already.

    Args:
        pid: of the process that started this one.
        number: the signal.
    """
    if not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
        if pid != str(os.getppid()):  # it died before this was asked for
            signal.raise_signal(number)
