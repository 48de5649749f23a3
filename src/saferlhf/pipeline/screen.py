"""One line per stage: waiting, how far it is, or how it ended."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from saferlhf.config.run_folder import FINISHED, RunFolder
from saferlhf.pipeline.launcher import JobResult
from saferlhf.training.display import duration

LINE_S = 10.0


class StageScreen:
    """Bars on a terminal, a line per stage every ten seconds elsewhere; fed by the stages' `status.json`."""

    def __init__(self, names: list[str]) -> None:
        self._names = names
        self._folders: dict[str, RunFolder] = {}
        self._cached: set[str] = set()
        self._ended: set[str] = set()
        self._last_line = 0.0
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> StageScreen:
        if sys.stderr.isatty():
            self._bars = Progress(
                TextColumn("{task.description:<8}"),
                BarColumn(bar_width=30),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bars.start()
            self._tasks = {n: self._bars.add_task(n, total=1.0, note="waiting", start=False) for n in self._names}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def found(self, name: str, folder: RunFolder) -> None:
        """A stage's folder is known; it is about to start, or finished before."""
        self._folders[name] = folder
        if folder.status().get("status") == FINISHED:
            self._cached.add(name)
        if self._bars is not None:
            self._bars.start_task(self._tasks[name])
        elif name not in self._cached:
            self._say(f"{name}: started, {folder.path}")

    def poll(self, known: dict[str, JobResult | None]) -> None:
        """Show what is known of each stage."""
        line_due = time.monotonic() - self._last_line >= LINE_S
        for name, result in known.items():
            if name in self._ended:
                continue
            if result is not None:
                self._ended.add(name)
                self._end(name, result)
            elif name in self._folders and (self._bars is not None or line_due):
                self._progress(name)
        if line_due:
            self._last_line = time.monotonic()

    def _progress(self, name: str) -> None:
        status = self._folders[name].status()
        step, total = status.get("step", 0), status.get("total_steps")
        note = status.get("phase") or status.get("note") or "loading"
        if self._bars is not None:
            self._bars.update(self._tasks[name], completed=step / total if total else 0.0, note=note)
        elif total:
            left = duration(status.get("seconds_left") or 0)
            self._say(f"{name}: step {step}/{total}, {note}, {left} left")

    def _end(self, name: str, result: JobResult) -> None:
        if result.code == 0:
            text = "finished before" if name in self._cached else f"finished in {duration(result.seconds)}"
        elif result.code is None:
            text = "not run: a stage it needs did not finish"
        else:
            text = f"did not finish (exit code {result.code})"
        if self._bars is not None:
            self._bars.update(self._tasks[name], completed=1.0 if result.code == 0 else 0.0, note=text)
            self._bars.stop_task(self._tasks[name])
        else:
            self._say(f"{name}: {text}")

    @staticmethod
    def _say(text: str) -> None:
        print(f"  {text}", file=sys.stderr, flush=True)
