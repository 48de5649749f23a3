"""The command line in this process, and configs composed as it composes them: no process start, nothing trained."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from saferlhf import cli
from saferlhf.config.paths import conf_dir
from saferlhf.config.run_folder import FINISHED, RunFolder
from saferlhf.config.schema import TrainConfig
from saferlhf.config.validate import train_config
from saferlhf.models.metadata import ExportMetadata
from saferlhf.run.prepare import LocatedRun, checked, locate_run

# a run of seconds
FAST = [
    "debug=fast",
    "trainer.max_steps=2",
    "trainer.threads=1",
    "data.train_rows=64",
    "data.val_rows=16",
    "data.test_rows=16",
    "evaluation.bootstrap_draws=100",
    "tracking=none",
]

MODELS = ["init=given", "roles.reward.model=given"]
NEEDED = {"ppo": MODELS, "ppo_lag": [*MODELS, "roles.cost.model=given"]}
"""What a task cannot do without, beside its name."""


@dataclass
class Answer:
    """What a command said: exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error; fails when there is more, or less."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")


def call(command: str, *words: str) -> Answer:
    """`python <command>.py words...`, in this process."""
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with (
        mock.patch.object(sys, "argv", [f"{command}.py", *words]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            getattr(cli, command)()
        except SystemExit as end:
            code = int(end.code or 0)
    return Answer(code, out.getvalue(), err.getvalue())


@contextlib.contextmanager
def training_stubbed() -> Iterator[list[LocatedRun]]:
    """Runs are located and noted instead of trained."""
    reached: list[LocatedRun] = []

    def locate(config: TrainConfig) -> Any:
        from saferlhf.run.train import RunResult

        reached.append(locate_run(checked(config)))
        return RunResult(reached[-1].folder.path, {})

    with mock.patch("saferlhf.run.train.train", locate):
        yield reached


def composed(*overrides: str, command: str = "train") -> DictConfig:
    """What Hydra makes of the overrides; inside a command, with the config folders of that command."""
    if GlobalHydra.instance().is_initialized():
        return compose(command, list(overrides))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(command, list(overrides))


def config(*overrides: str) -> TrainConfig:
    """A checked config."""
    return checked(train_config(composed(*overrides)))


def finish(run: LocatedRun, metrics: dict[str, float] | None = None, weight: bytes = b"w") -> Path:
    """Leave in the run's folder what a finished run leaves, as far as other runs look at it."""
    folder: RunFolder = run.folder
    folder.acquire()
    (folder.export).mkdir(exist_ok=True)
    (folder.export / "model.safetensors").write_bytes(weight)
    (folder.export / "config.json").write_text("{}")
    ExportMetadata(kind=run.config.task.name).write(folder.export)
    (folder.path / "identity.json").write_text(json.dumps(run.identity))
    folder.metrics.write_text(json.dumps({"test/reward/pair_accuracy": 0.75} if metrics is None else metrics))
    folder.update_status(status=FINISHED)
    folder.release()
    return folder.path
