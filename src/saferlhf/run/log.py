"""`run.log`: what the screen showed, kept in the run folder; lines that a progress bar draws over are left out."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class _Tee:
    """A text stream that writes to two places."""

    def __init__(self, stream: Any, log: IO[str]) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        written = self._stream.write(text)
        plain = _ESCAPES.sub("", text)
        # a bar redraws itself with escapes and carriage returns; the lines callback writes none
        if plain and "\r" not in plain and (plain == text or plain.strip()):
            with suppress(OSError):  # a full disk must not take the screen away
                self._log.write(plain)
        return written if written is not None else len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class RunLog:
    """A context in which everything printed goes to `run.log` as well; a resumed run appends."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._log: IO[str] | None = None
        self._streams: tuple[Any, Any] = (sys.stdout, sys.stderr)

    def __enter__(self) -> RunLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._log = open(self.path, "a", buffering=1, encoding="utf-8")
        self._streams = (sys.stdout, sys.stderr)
        sys.stdout, sys.stderr = _Tee(sys.stdout, self._log), _Tee(sys.stderr, self._log)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout, sys.stderr = self._streams
        if self._log is not None:
            with suppress(OSError):
                if error is not None:
                    self._log.write(f"{kind.__name__ if kind else 'error'}: {error}\n")
                self._log.close()
            self._log = None
