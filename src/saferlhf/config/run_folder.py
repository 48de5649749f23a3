"""A run's folder on disk: `<output_root>/<name>/<hash10>`, its status and the lock that keeps a second process out.

`status.json` says running | finished | failed | killed, with the step, the MLflow run and what went wrong. The lock is
the operating system's, so it goes with the process however that dies; a status `running` without a lock holder is
therefore a run that was killed.
"""

from __future__ import annotations

import fcntl
import os
import socket
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from saferlhf.config.files import read_json, write_json
from saferlhf.errors import UserError

RUNNING, FINISHED, FAILED, KILLED = "running", "finished", "failed", "killed"


@dataclass
class RunFolder:
    """Paths and status of one run."""

    path: Path
    _lock: IO[str] | None = field(default=None, repr=False)

    @property
    def checkpoints(self) -> Path:
        """Training states."""
        return self.path / "checkpoints"

    @property
    def export(self) -> Path:
        """The finished model."""
        return self.path / "export"

    @property
    def metrics(self) -> Path:
        """Final metrics."""
        return self.path / "metrics.json"

    def status(self) -> dict[str, Any]:
        """The status file's content; empty for a folder without one. A dead `running` is told as `killed`."""
        status = read_json(self.path / "status.json") or {}
        if status.get("status") == RUNNING and self._lock is None and not self._is_locked():
            status["status"] = KILLED
        return status

    def update_status(self, **values: Any) -> None:
        """Merge values into the status file."""
        old = read_json(self.path / "status.json") or {}
        write_json(self.path / "status.json", {**old, **values, "updated": time.time()})

    def acquire(self) -> None:
        """Take the folder for this process.

        Raises:
            UserError: another process holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - held for the life of the run
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserError(f"cannot write there: {reason}", str(self.path), "output_root=FOLDER") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            pid = (read_json(self.path / "status.json") or {}).get("pid", "?")
            raise UserError(
                f"this run is in progress in process {pid}", str(self.path), "wait for it, or stop that process first"
            ) from None
        self._lock = lock
        self.update_status(status=RUNNING, pid=os.getpid(), host=socket.gethostname(), error=None)

    def release(self) -> None:
        """Give the folder back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _is_locked(self) -> bool:
        try:
            with open(self.path / ".lock", "a+") as probe:
                fcntl.flock(probe, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # a folder we may not write in: nobody here can hold its lock either
            return False
        return False


def latest_folder(base: Path) -> Path:
    """The newest folder of one identity: `<hash10>`, or `<hash10>-2`, `-3`, ... made by `resume=never`."""
    newest, number = base, 2
    while (candidate := base.with_name(f"{base.name}-{number}")).exists():
        newest, number = candidate, number + 1
    return newest


def fresh_folder(base: Path) -> Path:
    """A folder of this identity that does not exist yet; nothing is ever overwritten."""
    if not base.exists():
        return base
    number = 2
    while (candidate := base.with_name(f"{base.name}-{number}")).exists():
        number += 1
    return candidate
