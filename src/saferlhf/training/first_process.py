"""Processes that the first one starts end with it from their first moment on, while they are still importing too.

One that is on its way to the place where they meet when the first is killed would wait there for half an hour; one that
trains would wait for its part of a sum. So the first leaves its number in the environment that the
others inherit, and they ask the system (Linux) to be killed with it before they load anything heavy.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from saferlhf.training.parent import end_with_parent

FIRST_PID = "SAFERLHF_FIRST_PID"
"""Variable that tells a process which one started it."""


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
    if first is not None:
        end_with_parent(first, signal.SIGKILL)
