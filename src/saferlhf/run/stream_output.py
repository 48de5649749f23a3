"""The output of a stream of verdicts: standard output, or a file that goes on where it was stopped.

Beside `output=FILE` stands `FILE.meta.json`: by which model and settings the verdicts are, with their thresholds, and
`input: {lines, sha256}`, the hash of all lines up to the one that was read last. It is written before the verdicts on
these lines are, so it never knows less than the output holds:

    read lines a..b -> meta says b -> judge -> append verdicts on a..b -> read the next

A later start cuts off a torn last line, looks for the last line M that has a verdict, reads the input up to the line of
the meta file again, compares the hash, and goes on behind M. Lines that were added to the input since are judged too.
"""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from saferlhf.config.files import read_json, write_json
from saferlhf.errors import UserError
from saferlhf.run.stream_input import STANDARD, InputLines, Line


@dataclass
class Tally:
    """What was written so far.

    Attributes:
        last: number of the last line that something was written about; 0: none.
        rows: verdicts.
        unsafe: of these.
        errors: lines that could not be judged.
    """

    last: int = 0
    rows: int = 0
    unsafe: int = 0
    errors: int = 0

    def add(self, line: Mapping[str, Any]) -> None:
        """Count one line of the output."""
        self.last = line["line"]
        if "error" in line:
            self.errors += 1
        else:
            self.rows += 1
            self.unsafe += line["unsafe"]


class VerdictPipe:
    """Standard output, a named pipe or a device: lines go out and are gone.

    Args:
        stream: takes text.
        close: at the end.
    """

    def __init__(self, stream: IO[str], close: bool = False) -> None:
        self.tally = Tally()
        self.meta: dict[str, Any] = {}
        self._stream, self._close = stream, close

    def __enter__(self) -> VerdictPipe:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._close:
            self._stream.close()

    def go_on(self, lines: InputLines, settings: Mapping[str, Any]) -> list[Line]:
        """Nothing was written before."""
        return []

    def note(self, lines: InputLines, meta: Mapping[str, Any]) -> None:
        """Nothing is kept beside a pipe."""

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Send the lines on at once."""
        self._stream.write(_text(lines))
        self._stream.flush()
        for line in lines:
            self.tally.add(line)


class VerdictFile:
    """`output=FILE`, held by one process at a time, with its meta file.

    Args:
        path: of the output.

    Attributes:
        tally: what stands in it.
        meta: what its meta file said before.

    Raises:
        UserError: it cannot be written, or another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.meta_path = path, path.with_name(f"{path.name}.meta.json")
        self.tally = Tally()
        self.meta: dict[str, Any] = {}
        self._new = not path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream = path.open("a+b")
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise UserError(f"cannot write there: {reason}", str(path), "give another output=FILE") from None
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._stream.close()
            raise UserError("another process writes this file", str(path), "wait for it, or stop it first") from None

    def __enter__(self) -> VerdictFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._new and not self.meta_path.exists():
            self.path.unlink(missing_ok=True)  # refused before anything was judged
        self._stream.close()

    @property
    def _mend(self) -> str:
        return f"remove {self.path} to judge all rows anew, or give another output=FILE"

    def go_on(self, lines: InputLines, settings: Mapping[str, Any]) -> list[Line]:
        """Find the place where an earlier start stopped, and read the input up to it.

        Args:
            lines: the input, nothing of it read.
            settings: what the verdicts depend on, as `note` is given it.

        Returns:
            Lines that were read and have no verdict, blank ones left out.

        Raises:
            UserError: the file is not ours, or was made by another model, other settings or of another input.
        """
        if not self._stream.seek(0, os.SEEK_END):
            return []
        self.meta = meta = self._meta()
        self._refuse_others(meta["settings"], settings)
        self._count()
        if not self.tally.last:
            return []
        known, digest = int(meta["input"]["lines"]), str(meta["input"]["sha256"])
        if self.tally.last > known:
            raise UserError("it holds more lines than were judged", str(self.path), self._mend)
        pending = []
        while lines.number < known and (line := lines.next()) is not None:
            if line.number > self.tally.last and not line.blank:
                pending.append(line)
        if lines.number < known or lines.digest != digest:
            what = f"the input is not the one whose first {known:,} lines were judged before"
            raise UserError(what, f"{lines.where}, {self.path}", self._mend)
        return pending

    def _meta(self) -> dict[str, Any]:
        try:
            meta = read_json(self.meta_path)
        except UserError:
            raise UserError("damaged file", str(self.meta_path), self._mend) from None
        if meta is None:
            mend = "remove it, or give another output=FILE"
            raise UserError(f"there is no {self.meta_path.name}: this file is of something else", str(self.path), mend)
        if not isinstance(meta, dict) or not all(isinstance(meta.get(key), dict) for key in ("settings", "input")):
            raise UserError("damaged file", str(self.meta_path), self._mend)
        return meta

    def _refuse_others(self, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        for name, value in now.items():
            if before.get(name) != value:
                what = f"its verdicts are by another {name}: {before.get(name)} instead of {value}"
                raise UserError(what, str(self.path), self._mend)

    def _count(self) -> None:
        """Tell what stands in the file, and cut off a torn last line."""
        self._stream.seek(0)
        whole = 0
        for data in self._stream:
            if not data.endswith(b"\n"):
                break
            try:
                line = json.loads(data)
                if line["line"] <= self.tally.last:
                    raise ValueError("lines out of order")
                self.tally.add(line)
            except (ValueError, KeyError, TypeError):
                where = f"{self.path}, behind the verdict on line {self.tally.last:,}"
                raise UserError("this is no line of verdicts", where, self._mend) from None
            whole += len(data)
        self._stream.truncate(whole)

    def note(self, lines: InputLines, meta: Mapping[str, Any]) -> None:
        """Keep beside the output how far the input was read; `meta` has the `settings`."""
        write_json(self.meta_path, {**meta, "input": {"lines": lines.number, "sha256": lines.digest}})

    def write(self, lines: Sequence[Mapping[str, Any]]) -> None:
        """Append the lines, and have them on the disk."""
        self._stream.write(_text(lines).encode())
        self._stream.flush()
        os.fsync(self._stream.fileno())
        for line in lines:
            self.tally.add(line)


def open_output(name: str | None, lines: InputLines) -> VerdictPipe | VerdictFile:
    """Where verdicts go.

    Args:
        name: a path, or `-` or None for standard output.
        lines: the input, which must be another file.

    Raises:
        UserError: a folder, the input itself, or a file that cannot be written.
    """
    if name is None or name == STANDARD:
        return VerdictPipe(sys.stdout)
    path = Path(name).expanduser()
    if path.is_dir():
        raise UserError(f"{path} is a folder", "output", "name a file: output=verdicts.jsonl")
    if path.suffix.lower() in (".gz", ".xz"):
        mend = f"output={path.with_suffix('')}, or output=- and a pipe into the packer"
        raise UserError("verdicts are not packed", f"output={name}", mend)
    if lines.path is not None and path.exists() and path.samefile(lines.path):
        raise UserError("input and output are one file", f"output={name}", "give another output=FILE")
    if path.exists() and not path.is_file():
        return VerdictPipe(path.open("w"), close=True)
    return VerdictFile(path)


def _text(lines: Sequence[Mapping[str, Any]]) -> str:
    # in ASCII: the same bytes whatever the terminal's encoding, and half characters in an id cannot stop the stream
    return "".join(json.dumps(line) + "\n" for line in lines)
