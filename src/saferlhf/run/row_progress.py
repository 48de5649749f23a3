"""What a person sees while rows are judged: a bar on a terminal, a line every ten seconds elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from saferlhf.run.screen import say
from saferlhf.training.display import duration
from saferlhf.training.progress import LINE_S, resolve_mode


class RowProgress:
    """Counts rows; call it with the number of rows done so far.

    Args:
        name: what is going on.
        total: rows in all.
        mode: auto | bar | lines | none.
        done: rows that were done before.
    """

    def __init__(self, name: str, total: int, mode: str, done: int = 0) -> None:
        self.name, self.total, self.before = name, total, done
        self.mode = resolve_mode(mode)
        self._bar: Any = None
        self._started = self._line = time.monotonic()

    def __enter__(self) -> RowProgress:
        if self.mode == "bar":
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar.start()
            self._bar.add_task(self.name, total=self.total, completed=self.before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int) -> None:
        """So many rows are done now, those before included."""
        if self._bar is not None:
            self._bar.update(self._bar.tasks[0].id, completed=done)
        now = time.monotonic()
        if self.mode == "lines" and now - self._line >= LINE_S:
            self._line = now
            rate = (done - self.before) / max(now - self._started, 1e-9)
            left = duration((self.total - done) / rate) if rate else "?"
            say(f"{self.name}: {done:,} of {self.total:,} rows, {rate:,.0f} rows/s, {left} left")
