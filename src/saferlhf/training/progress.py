"""What a person sees while a run trains: a bar on a terminal, a line every ten seconds elsewhere.

Whatever is shown, the run's `status.json` gets a heartbeat each second (step, total, loss, time left), which is what a
pipeline reads to draw the bars of its stages.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from saferlhf.config.run_folder import RunFolder
from saferlhf.training.display import duration

HEARTBEAT_S = 1.0
LINE_S = 10.0


def resolve_mode(mode: str) -> str:
    """`auto` is a bar on a terminal and lines elsewhere."""
    if mode != "auto":
        return mode
    return "bar" if sys.stderr.isatty() else "lines"


class RunProgress(L.Callback):
    """Shows and records how far training is."""

    def __init__(self, folder: RunFolder, name: str, total_steps: int, mode: str) -> None:
        self.folder, self.name, self.total = folder, name, total_steps
        self.mode = resolve_mode(mode)
        self._bar: Progress | None = None
        self._started = self._beat = self._line = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock, and the bar where there is one."""
        self._started = self._beat = self._line = time.monotonic()
        self._first_step = trainer.global_step
        if self.mode == "bar":
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._bar.add_task(self.name, total=self.total, completed=trainer.global_step, note="")

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Show the step; at most one heartbeat a second."""
        step, now = trainer.global_step, time.monotonic()
        note = self._note(pl_module)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, note=note)
        left = (now - self._started) / max(1, step - self._first_step) * (self.total - step)
        if now - self._beat >= HEARTBEAT_S or step == self.total:
            self._beat = now
            self.folder.update_status(step=step, total_steps=self.total, note=note, seconds_left=round(left, 1))
        if self.mode == "lines" and (now - self._line >= LINE_S or step == self.total):
            self._line = now
            print(
                f"  {self.name}: step {step}/{self.total}, {note}, {duration(left)} left", file=sys.stderr, flush=True
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Put the bar away."""
        self._close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Put the bar away before anything is printed; note where training ended."""
        self._close()
        if self._started:
            with suppress(OSError):  # a full disk is reported by what it stopped
                self.folder.update_status(step=trainer.global_step, total_steps=self.total)

    def _note(self, pl_module: L.LightningModule) -> str:
        own = getattr(pl_module, "note", None)
        if own is not None:
            return str(own)
        stats: Mapping[str, float] = getattr(pl_module, "last_stats", {})
        validation: Mapping[str, float] = getattr(pl_module, "last_validation", {})
        parts = [f"loss {stats['loss']:.4f}"] if "loss" in stats else []
        parts += [f"{name.removeprefix('val/')} {value:.3f}" for name, value in validation.items() if "/" in name[4:]][
            :1
        ]
        return ", ".join(parts)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
