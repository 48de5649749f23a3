"""Processes that the first one starts end with it from their first moment on, while they are still importing too.

`processes.py` sees to it that no process outlives the first once they have met. One that is on its way to that meeting
when the first is killed would wait there for half an hour; so the first leaves its number in the environment that the
others inherit, and they ask the system (Linux) to be killed with it before they load anything heavy.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

FIRST_PID = "SAFERLHF_FIRST_PID"
"""Variable that tells a process which one started it."""
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h


@contextmanager
def leading() -> Iterator[None]:
    """Processes that are started in this context are told who is the first."""
    before = os.environ.get(FIRST_PID)
    os.environ[FIRST_PID] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(FIRST_PID) if before is None else os.environ.__setitem__(FIRST_PID, before)


def follow_first() -> None:
    """Of a process that is not the first: be killed when the first is gone, whatever it died of.

    One that somebody else started (`torchrun`, SLURM) is left to whoever did.
    """
    first = os.environ.get(FIRST_PID)
    if first is None or not sys.platform.startswith("linux"):
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if first != str(os.getppid()):  # it died before this was asked for
            os.kill(os.getpid(), signal.SIGKILL)
