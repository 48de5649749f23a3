"""Feature store: numbers that a model computed of rows, on disk, found again by content.

    <cache>/features/<key>/about.json   what the numbers are: model, layers, pooling, precision; the shape of a row
                           states.bin   rows end to end, to be memory-mapped
                           index.bin    for each row: key of the row, checksum of its numbers, checksum of this record
                           .lock        held by the process that writes

The folder's key is taken over everything the numbers depend on but the row, the row's over its tokens. Rows are only
ever appended, first the numbers, then the record. So a process that is killed leaves at worst numbers without a record,
which the next writer cuts off; readers never wait; of two processes that want the same rows the second waits for the
first and then finds them. Every row is checked against its checksum when it is read: what is damaged is computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from saferlhf.errors import UserError
from saferlhf.models.content import cache_root

FORMAT = 1
KEY_BYTES = 16
_RECORD = struct.Struct(f"<{KEY_BYTES}sII")
_SYNC_BYTES = 64 << 20

Ints = NDArray[np.int64]


def row_key(tokens: NDArray[Any], prompt_tokens: int) -> bytes:
    """Identity of an encoded row: its token ids and where the response begins."""
    content = np.ascontiguousarray(tokens, dtype=np.int32).tobytes() + int(prompt_tokens).to_bytes(4, "little")
    return hashlib.blake2b(content, digest_size=KEY_BYTES).digest()


def stored_features(cache_dir: str | Path | None = None) -> Iterator[dict[str, Any]]:
    """What the stores in a cache folder hold: the `about` of each, in the order of their names."""
    for note in sorted((cache_root(cache_dir) / "features").glob("*/about.json")):
        try:
            about = json.loads(note.read_text())
        except (OSError, ValueError):
            continue
        if isinstance(about, dict):
            yield about


class FeatureStore:
    """Arrays of one shape by row key.

    Args:
        about: everything the numbers depend on; plain JSON.
        shape: of one row.
        dtype: float16 or float32, as stored.
        cache_dir: the project's cache folder; None: the default one.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(
        self, about: Mapping[str, Any], shape: Sequence[int], dtype: str, cache_dir: str | Path | None = None
    ) -> None:
        self.shape, self.dtype = tuple(int(n) for n in shape), np.dtype(dtype)
        self.about = {**about, "shape": list(self.shape), "dtype": self.dtype.name, "format": FORMAT}
        name = hashlib.sha256(json.dumps(self.about, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = cache_root(cache_dir) / "features" / name
        self.row_bytes = int(np.prod(self.shape)) * self.dtype.itemsize
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self._records: dict[bytes, tuple[int, int]] = {}  # key -> (place, checksum)
        self._count = 0
        self.refresh()

    # -------------------------------------------------------------------------------------------- reading
    def refresh(self) -> None:
        """Look at the disk again: another process may have written."""
        self._records, self._count = {}, 0
        for key, checksum in self._read_index():
            self._records[key] = (self._count, checksum)  # a row computed again: the last one counts
            self._count += 1

    def __len__(self) -> int:
        """Rows that can be asked for."""
        return len(self._records)

    def __contains__(self, key: bytes) -> bool:
        return key in self._records

    @property
    def size_bytes(self) -> int:
        """On disk."""
        return sum(file.stat().st_size for file in self.folder.iterdir() if file.is_file())

    def states(self) -> NDArray[Any]:
        """All rows as they lie, memory-mapped: (rows, *shape)."""
        if not self._count:
            return np.zeros((0, *self.shape), self.dtype)
        return np.memmap(self.folder / "states.bin", self.dtype, "r", shape=(self._count, *self.shape))

    def places(self, keys: Sequence[bytes]) -> Ints:
        """Where these rows lie in `states()`; KeyError for one that is not there."""
        return np.array([self._records[key][0] for key in keys], dtype=np.int64)

    def drop_damaged(self, keys: Sequence[bytes]) -> int:
        """Forget those of these rows whose numbers do not fit their checksum; how many."""
        states = self.states()
        known = {key: self._records[key] for key in keys if key in self._records}
        # by place: reads the file once from front to end
        bad = [k for k, (place, checksum) in sorted(known.items(), key=_by_place) if _sum(states[place]) != checksum]
        for key in bad:
            del self._records[key]
        return len(bad)

    def _read_index(self) -> Iterator[tuple[bytes, int]]:
        """Whole records, up to the first that is torn or has no numbers."""
        try:
            index = (self.folder / "index.bin").read_bytes()
            room = (self.folder / "states.bin").stat().st_size // self.row_bytes
        except FileNotFoundError:
            return
        whole = min(len(index) // _RECORD.size, room)
        for key, checksum, own in _RECORD.iter_unpack(index[: whole * _RECORD.size]):
            if own != _record_sum(key, checksum):
                return
            yield key, checksum

    # -------------------------------------------------------------------------------------------- writing
    @contextmanager
    def writing(self, waiting: Callable[[], None] = lambda: None) -> Iterator[Callable[[Sequence[bytes], Any], None]]:
        """Hold the store for this process; gives `append(keys, rows)`.

        Args:
            waiting: called once when another process is writing and must be waited for.
        """
        lock = FileLock(str(self.folder / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            waiting()
            lock.acquire()
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        try:
            self._mend()
            with open(self.folder / "states.bin", "ab") as states, open(self.folder / "index.bin", "ab") as index:
                unsynced = 0

                def append(keys: Sequence[bytes], rows: Any) -> None:
                    nonlocal unsynced
                    self._append(states, index, keys, rows)
                    unsynced += len(keys) * self.row_bytes
                    if unsynced >= _SYNC_BYTES:
                        unsynced = 0
                        os.fsync(states.fileno())
                        os.fsync(index.fileno())

                yield append
                os.fsync(states.fileno())
                os.fsync(index.fileno())
        finally:
            lock.release()

    def add(self, keys: Sequence[bytes], rows: Any) -> None:
        """Append those rows that are not there, holding the store no longer than that: for several that share work."""
        with self.writing() as append:
            fresh = [place for place, key in enumerate(keys) if key not in self]
            append([keys[place] for place in fresh], rows[fresh])

    def _mend(self) -> None:
        """Begin anew if the folder is of something else; cut off what a killed process left behind."""
        note = self.folder / "about.json"
        try:
            known = json.loads(note.read_text()) == self.about
        except (OSError, ValueError):
            known = False
        if not known:
            for name in ("index.bin", "states.bin"):
                (self.folder / name).unlink(missing_ok=True)
            draft = note.with_suffix(f".{os.getpid()}.tmp")
            draft.write_text(json.dumps(self.about, indent=2, sort_keys=True) + "\n")
            draft.replace(note)
        self.refresh()
        for name, size in (("index.bin", _RECORD.size), ("states.bin", self.row_bytes)):
            file = self.folder / name
            if file.exists() and file.stat().st_size != self._count * size:
                os.truncate(file, self._count * size)

    def _append(self, states: IO[bytes], index: IO[bytes], keys: Sequence[bytes], rows: Any) -> None:
        stored = np.ascontiguousarray(rows, dtype=np.float32)
        with np.errstate(over="ignore"):
            stored = stored.astype(self.dtype, copy=False)
        if stored.shape != (len(keys), *self.shape):
            raise ValueError(f"rows of shape {stored.shape}, not {(len(keys), *self.shape)}")
        if not np.isfinite(stored).all():
            whole = np.isfinite(np.asarray(rows, dtype=np.float32)).all()
            what = f"hidden states do not fit into {self.dtype.name}" if whole else "hidden states are not finite"
            mend = "task.feature_dtype=float32" if whole else "use a backbone that computes numbers, or float32"
            raise UserError(what, "features", mend)
        sums = [_sum(row) for row in stored]
        states.write(stored.tobytes())
        states.flush()
        for key, checksum in zip(keys, sums, strict=True):
            index.write(_RECORD.pack(key, checksum, _record_sum(key, checksum)))
            self._records[key] = (self._count, checksum)
            self._count += 1
        index.flush()


def _by_place(item: tuple[bytes, tuple[int, int]]) -> int:
    return item[1][0]


def _sum(row: NDArray[Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(row).view(np.uint8).reshape(-1))  # type: ignore[arg-type]


def _record_sum(key: bytes, checksum: int) -> int:
    return zlib.crc32(key + checksum.to_bytes(4, "little"))


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot keep features there: {error.strerror or error}", str(folder), "cache_dir=FOLDER")
