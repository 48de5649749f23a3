"""The input of a stream of verdicts: lines of a file, a compressed file, a pipe or standard input, read once.

They are numbered and hashed as they come, so that what was judged before can be known again without being kept.
"""

from __future__ import annotations

import gzip
import hashlib
import lzma
import select
import sys
import zlib
from pathlib import Path
from types import TracebackType
from typing import IO, Any, NamedTuple

from saferlhf.data.files import ARCHIVE, format_of, resolve_path
from saferlhf.errors import UserError

STANDARD = "-"
"""The name of standard input and standard output."""

LINE_BYTES = 16 * 2**20
"""Longest line that is read, in bytes; a longer one is passed over in pieces, whatever its length."""

CHUNK_BYTES = 4 * LINE_BYTES
"""Bytes of lines after which no more are read at once."""

PATIENCE_S = 0.05
"""Seconds that the next line of a pipe is waited for before the lines so far are judged."""

_READ_BYTES = 2**16
_NO_LINES = ("csv", "tsv", "parquet", ARCHIVE)


class Line(NamedTuple):
    """One line of the input; `fault` says why it could not be read."""

    number: int
    data: bytes
    fault: str | None = None

    @property
    def blank(self) -> bool:
        """Nothing stands in it."""
        return self.fault is None and not self.data.strip()


class InputLines:
    """The lines of a file (.gz and .xz are unpacked), a pipe or standard input, read once from the beginning.

    Args:
        name: a path, or `-`.

    Attributes:
        where: what to call it in messages.
        number: lines read so far.

    Raises:
        UserError: there is no such file.
    """

    def __init__(self, name: str) -> None:
        self.number = 0
        self._hash = hashlib.sha256()
        self._broken: UserError | None = None
        self._raw: IO[bytes] | None = None  # the file itself, below what unpacks it
        self._size = 0
        self.path: Path | None = None
        if name == STANDARD:
            self.where = "standard input"
            raw = getattr(sys.stdin.buffer, "raw", None)
            self._stream: Any = sys.stdin.buffer if raw is None else _Pipe(raw)
            return
        path = resolve_path(name, None, "input")
        if path.is_dir():
            raise UserError(f"{path} is a folder", "input", "name one file; data=jsonl data.path=FOLDER reads folders")
        if format_of(path) in _NO_LINES:
            mend = "write one JSON object per line, or read it by data=jsonl data.path=FILE"
            raise UserError(f"{path.name} holds no lines of JSON", f"input={name}", mend)
        self.path, self.where = path, str(path)
        if not path.is_file():
            self._raw = path.open("rb", buffering=0)
            self._stream = _Pipe(self._raw)
            return
        self._raw = path.open("rb")
        self._size = path.stat().st_size
        unpack: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix.lower())
        self._stream = unpack(self._raw, "rb") if unpack else self._raw

    def __enter__(self) -> InputLines:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._raw is not None:
            self._raw.close()

    @property
    def digest(self) -> str:
        """SHA-256 over the lines so far, whatever their line ends."""
        return self._hash.copy().hexdigest()

    @property
    def share(self) -> float | None:
        """Share of the file's bytes that were read; None where there is no size."""
        return self._raw.tell() / self._size if self._raw is not None and self._size else None

    def read(self, count: int) -> list[Line]:
        """At most so many of the next lines, blank ones left out; none at the end.

        Of a pipe fewer, where the next one would have to be waited for: whoever writes into it may be waiting for the
        verdicts on the lines so far.

        Raises:
            UserError: the archive is broken; the good lines before that are given first.
        """
        if self._broken is not None:
            raise self._broken
        found: list[Line] = []
        size = 0
        while len(found) < count and size < CHUNK_BYTES:
            if found and isinstance(self._stream, _Pipe) and self._stream.quiet():
                break
            try:
                line = self.next()
            except UserError as error:
                if not found:
                    raise
                self._broken = error
                break
            if line is None:
                break
            if not line.blank:
                found.append(line)
                size += len(line.data)
        return found

    def next(self) -> Line | None:
        """The next line, without its end; None at the end of the input.

        Raises:
            UserError: the archive is broken.
        """
        try:
            data = self._stream.readline(LINE_BYTES)
            too_long = len(data) == LINE_BYTES and not data.endswith(b"\n")
            while too_long and (piece := self._stream.readline(LINE_BYTES)):
                self._hash.update(data)
                data = piece
                if data.endswith(b"\n"):
                    break
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise UserError(f"broken archive: {error}", self.where, "fetch or write the file again") from error
        if not data:
            return None
        self.number += 1
        data = data.rstrip(b"\r\n")
        self._hash.update(data + b"\n")
        if too_long:
            return Line(self.number, b"", f"this line has more than {LINE_BYTES:,} bytes")
        return Line(self.number, data)


class _Pipe:
    """Lines of a pipe or a terminal as they come; unlike Python's own buffer it can tell whether one is there.

    Args:
        raw: unbuffered.
    """

    def __init__(self, raw: Any) -> None:
        self._raw, self._held = raw, bytearray()

    def readline(self, limit: int) -> bytes:
        """The next line with its end, at most so many bytes of it; nothing at the end."""
        looked, end = 0, 0
        while not (end := self._held.find(b"\n", looked, limit) + 1) and len(self._held) < limit:
            looked = len(self._held)
            data = self._raw.read(_READ_BYTES)
            if not data:
                break
            self._held += data
        end = end or min(len(self._held), limit)
        line = bytes(self._held[:end])
        del self._held[:end]
        return line

    def quiet(self) -> bool:
        """Whether no whole line is there, and nothing comes for a while."""
        return b"\n" not in self._held and not select.select([self._raw], [], [], PATIENCE_S)[0]
