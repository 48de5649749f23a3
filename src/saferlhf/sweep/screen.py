"""What a person sees while a sweep runs: how many runs have ended, and how far those are that run now."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from saferlhf.config.files import read_json
from saferlhf.sweep.child import Child
from saferlhf.training.display import duration

LINE_S = 10.0


class SweepScreen:
    """A bar for the sweep and one for each run on a terminal, a line per run every ten seconds elsewhere.

    Args:
        total: runs there will be.
    """

    def __init__(self, total: int) -> None:
        self._total, self._ended = total, 0
        self._running: dict[int, Child] = {}
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._whole: TaskID | None = None
        self._last_line = time.monotonic()

    def __enter__(self) -> SweepScreen:
        if sys.stderr.isatty():
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bars.start()
            self._whole = self._bars.add_task("sweep", total=self._total, note=f"of {self._total} runs")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def started(self, child: Child) -> None:
        """A child's process is about to start."""
        self._running[child.number] = child
        if self._bars is not None:
            self._tasks[child.number] = self._bars.add_task(escape(child.label), total=1.0, note="loading")
        else:
            self.say(f"{child.name}: started, {child.folder.path}")

    def ended(self, child: Child, words: str) -> None:
        """A child has ended, or was finished before."""
        self._ended += 1
        self._running.pop(child.number, None)
        if self._bars is not None:
            if child.number in self._tasks:
                self._bars.remove_task(self._tasks.pop(child.number))
            if self._whole is not None:
                self._bars.update(self._whole, completed=self._ended)
        self.say(f"{child.name}: {words} ({self._ended}/{self._total})")

    def poll(self) -> None:
        """Show how far each running child is."""
        if self._bars is None and time.monotonic() - self._last_line < LINE_S:
            return
        self._last_line = time.monotonic()
        for number, child in self._running.items():
            # as it is on disk: `RunFolder.status` would look at the lock too, which the child may be about to take
            status: dict[str, Any] = read_json(child.folder.path / "status.json") or {}
            step, total = status.get("step", 0), status.get("total_steps")
            note = status.get("phase") or status.get("note") or "loading"
            if self._bars is not None:
                self._bars.update(self._tasks[number], completed=step / total if total else 0.0, note=str(note))
            elif total:
                left = duration(status.get("seconds_left") or 0)
                self.say(f"{child.name}: step {step}/{total}, {note}, {left} left")

    def say(self, text: str) -> None:
        """One line of progress."""
        if self._bars is not None:
            self._bars.console.print(f"  {escape(text)}", highlight=False, soft_wrap=True)
        else:
            print(f"  {text}", file=sys.stderr, flush=True)
