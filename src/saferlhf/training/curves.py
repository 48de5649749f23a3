"""Training curves on disk, whatever the tracking: one JSON line per logged step, for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class CurveLogger(Logger):
    """Appends metrics to `curves.jsonl` of the run folder."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        if path.exists() and not path.read_bytes().endswith(b"\n"):  # a killed process left half a line
            with open(path, "a") as file:
                file.write("\n")

    @property
    def name(self) -> str:
        """For Lightning."""
        return "curves"

    @property
    def version(self) -> str:
        """For Lightning."""
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The config has a file of its own."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            file.write(json.dumps({"step": step, **{k: float(v) for k, v in metrics.items()}}) + "\n")


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Metric -> (step, value) in order of steps; of a step repeated after a resume the last value counts."""
    points: dict[str, dict[int, float]] = {}
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:  # the last line of a killed process
                continue
            step = row.pop("step", None)
            for name, value in row.items():
                if step is not None:
                    points.setdefault(name, {})[int(step)] = value
    return {name: sorted(values.items()) for name, values in points.items()}
