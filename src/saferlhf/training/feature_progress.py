"""What a person sees while features are computed: a bar on a terminal, a line every ten seconds elsewhere.

Like a training run it beats once a second into `status.json`, rows taking the place of steps.
"""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from saferlhf.config.run_folder import RunFolder
from saferlhf.evaluation.features import Progress
from saferlhf.training.display import duration
from saferlhf.training.progress import HEARTBEAT_S, LINE_S, resolve_mode


class FeatureProgress:
    """A context; call it with each `Progress`.

    Args:
        folder: of the run.
        name: what is shown, as "features of train".
        mode: auto | bar | lines | none.
    """

    def __init__(self, folder: RunFolder, name: str, mode: str) -> None:
        self.folder, self.name, self.mode = folder, name, resolve_mode(mode)
        self._bar: Bar | None = None
        self._beat = self._line = time.monotonic()

    def __enter__(self) -> FeatureProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, now: Progress) -> None:
        """Show it; at most one heartbeat a second."""
        done = now.rows == now.total_rows
        note = f"{now.tokens_per_s:,.0f} tokens/s"
        if self.mode == "bar":
            self._draw(now, note)
        moment = time.monotonic()
        if moment - self._beat >= HEARTBEAT_S or done:
            self._beat = moment
            left = round(now.seconds_left, 1)
            self.folder.update_status(step=now.rows, total_steps=now.total_rows, note=note, seconds_left=left)
        if self.mode == "lines" and (moment - self._line >= LINE_S or done):
            self._line = moment
            text = f"  {self.name}: {now.rows:,} of {now.total_rows:,} rows, {note}, {duration(now.seconds_left)} left"
            print(text, file=sys.stderr, flush=True)

    def _draw(self, now: Progress, note: str) -> None:
        if self._bar is None:
            columns = [
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            ]
            self._bar = Bar(*columns, console=Console(stderr=True))
            self._bar.start()
            self._bar.add_task(self.name, total=now.total_rows, note="")
        self._bar.update(self._bar.task_ids[0], completed=now.rows, note=note)
