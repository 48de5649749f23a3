"""States of rows, token by token, on disk: one array (T, H) per row, found again by content.

    <cache>/states/<key>.sqlite    rows(key, tokens, sum, states); about(text)

One database file per backbone, block and precision, written by any number of processes: SQLite locks and recovers. A
row's bytes are checked against their checksum when they are read; what is damaged counts as missing.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import zlib
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.errors import UserError
from saferlhf.models.content import cache_root

FORMAT = 1
BUSY_S = 60.0
"""How long one process waits for another's write."""


class StateStore:
    """Arrays (T, H) by row key.

    Args:
        about: everything the numbers depend on but the row; plain JSON.
        width: H.
        dtype: float16 or float32, as stored.
        cache_dir: the project's cache folder; None: the default one.

    Raises:
        UserError: the folder cannot be written, or the file is no such store.
    """

    def __init__(self, about: Mapping[str, Any], width: int, dtype: str, cache_dir: str | Path | None = None) -> None:
        self.width, self.dtype = width, np.dtype(dtype)
        text = json.dumps({**about, "width": width, "dtype": self.dtype.name, "format": FORMAT}, sort_keys=True)
        self.file = cache_root(cache_dir) / "states" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.sqlite"
        with self._guarded():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with closing(self._connect()) as connection, connection:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("CREATE TABLE IF NOT EXISTS about (text TEXT PRIMARY KEY)")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS rows (key BLOB PRIMARY KEY, tokens INTEGER, sum INTEGER, states BLOB)"
                )
                connection.execute("INSERT OR IGNORE INTO about VALUES (?)", (text,))

    def get(self, keys: Sequence[bytes]) -> list[NDArray[Any] | None]:
        """(T, H) of each row; None where it is missing or damaged."""
        found: list[NDArray[Any] | None] = []
        with self._guarded(), closing(self._connect()) as connection:
            for key in keys:
                query = "SELECT tokens, sum, states FROM rows WHERE key = ?"
                found.append(self._checked(connection.execute(query, (key,)).fetchone()))
        return found

    def put(self, rows: Mapping[bytes, NDArray[Any]]) -> None:
        """Keep rows, (T, H) each; one that is there already is replaced.

        Raises:
            UserError: numbers that do not fit the stored precision.
        """
        records = []
        for key, states in rows.items():
            with np.errstate(over="ignore"):
                stored = np.ascontiguousarray(states, dtype=self.dtype)
            if not np.isfinite(stored).all():
                what = f"hidden states do not fit into {self.dtype.name}"
                raise UserError(what, "adapter.cache_frozen", "adapter.cache_frozen=false")
            data = stored.tobytes()
            records.append((key, len(stored), zlib.crc32(data), data))
        with self._guarded(), closing(self._connect()) as connection, connection:
            connection.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?, ?, ?)", records)

    def __len__(self) -> int:
        with self._guarded(), closing(self._connect()) as connection:
            return int(connection.execute("SELECT COUNT(*) FROM rows").fetchone()[0])

    def _checked(self, record: tuple[int, int, bytes] | None) -> NDArray[Any] | None:
        if record is None:
            return None
        tokens, checksum, data = record
        whole = len(data) == tokens * self.width * self.dtype.itemsize and zlib.crc32(data) == checksum
        return np.frombuffer(data, dtype=self.dtype).reshape(tokens, self.width) if whole else None

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.file, timeout=BUSY_S)

    def _guarded(self) -> Any:
        return _Guarded(self.file)


class _Guarded:
    """Turns what the disk or SQLite has to say into one line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError):
            what = f"cannot keep hidden states there: {error.strerror or error}"
            raise UserError(what, str(self.file), "cache_dir=FOLDER") from error
        if isinstance(error, sqlite3.Error):
            what = f"the store of hidden states cannot be used: {error}"
            raise UserError(what, str(self.file), "remove this file, or cache_dir=FOLDER") from error
