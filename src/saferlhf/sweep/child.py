"""One run of a sweep: its values, its words, where it lives, and how it ended."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saferlhf.config.files import read_json
from saferlhf.config.hydra_errors import is_trouble
from saferlhf.config.run_folder import FAILED, FINISHED, RUNNING, RunFolder
from saferlhf.config.schema import TrainConfig
from saferlhf.errors import UserError
from saferlhf.run.prepare import LocatedRun, locate_run
from saferlhf.sweep.space import Space, label

Compose = Callable[[Sequence[str]], TrainConfig]
"""Overrides -> checked config of one run."""

NOT_RUN, REFUSED = "not run", "refused"


@dataclass
class Child:
    """A run of a sweep.

    Attributes:
        number: among the runs of this call, from 0.
        values: swept key -> value, as texts.
        words: all overrides that make the run.
        run: its config and folder; None where the values are refused.
        error: why they are.
        trial: of Optuna's study.
        seconds: that its process ran in this call.
        code: its process's exit code, where there was one.
        reason: what its process said last, where it failed.
    """

    number: int
    values: dict[str, str]
    words: list[str]
    run: LocatedRun | None = None
    error: UserError | None = None
    trial: int | None = None
    seconds: float = 0.0
    code: int | None = None
    reason: str = ""

    @property
    def label(self) -> str:
        """Its swept values in short."""
        return label(self.values)

    @property
    def name(self) -> str:
        """What the launcher calls it."""
        return f"run {self.number}: {self.label}"

    @property
    def folder(self) -> RunFolder:
        """Of a run that was not refused."""
        assert self.run is not None
        return self.run.folder

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do for it."""
        return self.status == FINISHED

    @property
    def status(self) -> str:
        """How it stands: finished | failed | killed | running | not run | refused."""
        if self.run is None:
            return REFUSED
        found = str(self.folder.status().get("status", NOT_RUN))
        # a process may fail before it has a folder
        return FAILED if self.reason and found not in (FINISHED, RUNNING) else found

    def metrics(self) -> dict[str, float]:
        """Final numbers of a finished run, else none."""
        if not self.finished:
            return {}
        return read_json(self.folder.metrics) or {}

    def objective(self, key: str | None) -> float | None:
        """The number the sweep is about, where the run has it and it is one."""
        value = self.metrics().get(key or "")
        return value if value is not None and math.isfinite(value) else None

    def is_free(self) -> bool:
        """Whether no process is at work on it: another sweep may have the same run."""
        return self.run is None or self.folder.status().get("status") != RUNNING

    def devices(self) -> int:
        """GPUs it wants where there are any."""
        if self.run is None or self.run.config.trainer.accelerator == "cpu":
            return 0
        return self.run.config.trainer.devices

    def to_dict(self, objective: str | None) -> dict[str, Any]:
        """For `sweep.json`."""
        metrics = self.metrics()
        found: dict[str, Any] = {"number": self.number, "overrides": self.values, "status": self.status}
        if objective is not None:
            found["objective"] = self.objective(objective)
            found |= {end: metrics.get(f"{objective}_{end}") for end in ("low", "high")}
        if self.trial is not None:
            found["trial"] = self.trial
        if self.run is not None:
            found["folder"] = str(self.folder.path)
            found["mlflow_run_id"] = self.folder.status().get("mlflow_run_id")
        reason = str(self.error) if self.error is not None else self.reason
        return found | ({"error": reason} if reason else {})


def make_child(number: int, values: Mapping[str, str], space: Space, compose: Compose) -> Child:
    """Compose, check and locate the run of these values; what the checks say of them is kept in `error`.

    Raises:
        UserError: Hydra cannot compose it: a misspelt word, which is none of these values' alone.
    """
    child = Child(number, dict(values), space.words(values))
    try:
        config = compose(child.words)
        if config.resume not in ("auto", "never"):
            what = "a path names one run, a sweep has several"
            raise UserError(what, f"resume={config.resume}", "resume=auto, or resume=never")
        child.run = locate_run(config)
    except UserError as error:
        if error.__cause__ is not None and is_trouble(error.__cause__):
            raise
        child.error = error
    return child


def refuse_twins(children: Sequence[Child]) -> None:
    """Refuse different values that make the same run.

    Raises:
        UserError: two of the runs have one folder.
    """
    seen: dict[Any, Child] = {}
    for child in children:
        if child.run is None:
            continue
        twin = seen.setdefault(child.folder.path, child)
        if twin is not child:
            differing = [key for key, value in child.values.items() if twin.values.get(key) != value]
            what = f"runs {twin.number} and {child.number} would be the same run"
            mend = "such keys do not change what a run is; sweep over others"
            raise UserError(what, ", ".join(differing), mend)
