"""A pipeline: stages as normal runs, cached by run identity.

Each stage is composed and checked before anything starts, so a typo in the last stage fails at once. A stage whose run
folder is finished is not run again; one that was killed goes on from its checkpoint: that is nothing but the run's own
rule. The pipeline's own folder, `<output_root>/<name>/<hash10>`, holds its status, the stages' logs and their metrics.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saferlhf.config.arguments import merged
from saferlhf.config.files import read_json, write_json
from saferlhf.config.identity import identity_tree, run_hash
from saferlhf.config.run_folder import FAILED, FINISHED, KILLED, RunFolder
from saferlhf.config.schema import TrainConfig
from saferlhf.errors import UserError
from saferlhf.pipeline.compare import COMPARISON_FILES, SCREEN, compare
from saferlhf.pipeline.launcher import DevicePool, Job, JobResult, cpu_share, last_words, launch
from saferlhf.pipeline.screen import StageScreen
from saferlhf.pipeline.stages import Stage, Stages
from saferlhf.run.screen import metrics_overview
from saferlhf.tracking import ui_command

STAGE = (sys.executable, "-m", "saferlhf.cli", "train")
"""What runs one stage, given its overrides."""


class PipelineFailed(Exception):
    """A stage did not finish; the message is for the screen already, the code is the stage's."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_pipeline(stages: Stages, *, flags: Sequence[str] = ()) -> dict[str, float]:
    """Run all stages that are not finished yet.

    Args:
        stages: what to run.
        flags: Hydra flags to hand on, such as `--config-dir`.

    Returns:
        Metrics of all stages, each name prefixed with `<stage>/`.

    Raises:
        UserError: a stage that is needed was never run, one wants more GPUs than there are, or another process runs
            this pipeline.
        PipelineFailed: a stage did not finish.
        KeyboardInterrupt: a person or the system asked for an end; all stages were stopped.
    """
    started = time.monotonic()
    folders = stages.earlier()
    for stage in stages.asked:
        if not stage.needs:  # files and models that are not there: before anything is written
            stages.locate(stage, {})
    pool = DevicePool()
    for stage in stages.asked:
        pool.check(_devices(stages, stage), f"trainer.devices, stage {stage.name}")
    first = stages.configs[stages.asked[0].name]
    summary = RunFolder(Path(first.output_root) / stages.prefix / _pipeline_hash(stages))
    parent = _Parent(first, stages, summary)
    summary.acquire()
    end = FAILED
    try:
        with StageScreen([stage.name for stage in stages.asked]) as screen:
            jobs = _Jobs(stages, folders, summary, parent, screen, flags)
            results = launch(jobs.all(), at_once=stages.pipeline.parallel, on_poll=screen.poll, pool=pool)
        if any(result.code != 0 for result in results.values()):
            raise _failure(results, summary)
        _check_places(folders)
        own = {stage.name: folders[stage.name] for stage in stages.asked}
        print(metrics_overview(own, time.monotonic() - started))
        metrics = _summary(stages, folders, summary)
        parent.log(metrics)
        end = FINISHED
    except KeyboardInterrupt:
        end = KILLED
        raise
    finally:
        summary.update_status(status=end, stages={name: str(path) for name, path in folders.items()})
        summary.release()
        parent.finish(end)
    if ui := ui_command(first.tracking, Path(first.output_root)):
        print(f"compare: {ui}")
    return metrics


def _summary(stages: Stages, folders: Mapping[str, Path], summary: RunFolder) -> dict[str, float]:
    """The numbers of all stages and of their comparison, which is printed; `metrics.json` of the pipeline's folder."""
    found = {stage.name: read_json(folders[stage.name] / "metrics.json") or {} for stage in stages.asked}
    metrics = {f"{stage}/{name}": value for stage, values in found.items() for name, value in values.items()}
    metrics |= {f"compare/{name}": value for name, value in _compared(stages, folders, summary).items()}
    write_json(summary.metrics, metrics)
    return metrics


def _compared(stages: Stages, folders: Mapping[str, Path], summary: RunFolder) -> dict[str, float]:
    """The comparison of the stages' policies, printed; taken from an earlier call where nothing changed since."""
    places = {name: str(path) for name, path in folders.items()}
    screen, earlier = summary.path / SCREEN, read_json(summary.metrics)
    if earlier is not None and screen.is_file() and summary.status().get("stages") == places:
        print(screen.read_text(), end="")
        return {name.removeprefix("compare/"): v for name, v in earlier.items() if name.startswith("compare/")}
    evaluation = stages.configs[stages.asked[-1].name].evaluation
    return compare(
        stages.pipeline.compare,
        folders,
        summary.path,
        draws=evaluation.bootstrap_draws,
        confidence=evaluation.confidence,
    )


class _Jobs:
    """From stages to the launcher's jobs; notes each run's folder as it becomes known."""

    def __init__(
        self,
        stages: Stages,
        folders: dict[str, Path],
        summary: RunFolder,
        parent: _Parent,
        screen: StageScreen,
        flags: Sequence[str],
    ) -> None:
        self._stages, self._folders, self._summary = stages, folders, summary
        self._parent, self._screen, self._flags = parent, screen, flags

    def all(self) -> list[Job]:
        return [self._job(stage) for stage in self._stages.asked]

    def _job(self, stage: Stage) -> Job:
        asked = {other.name for other in self._stages.asked}
        log = self._summary.path / f"{stage.name}.log"
        needs = tuple(need for need in stage.needs if need in asked)
        return Job(stage.name, lambda: self._command(stage), log, needs, devices=_devices(self._stages, stage))

    def _command(self, stage: Stage) -> list[str] | None:
        """The process that runs the stage; None when its run is finished."""
        _check_places({need: self._folders[need] for need in stage.needs})
        folder = self._stages.locate(stage, self._folders).folder
        self._folders[stage.name] = folder.path
        self._screen.found(stage.name, folder)
        if folder.status().get("status") == FINISHED:
            return None
        # the stage's own screen is its log file; its lines here come from its status file
        extra = ["trainer.progress=none", *self._parent.overrides()]
        if self._stages.configs[stage.name].trainer.threads is None:
            extra.append(f"trainer.threads={cpu_share(self._width(stage))}")
        overrides = merged(self._stages.overrides(stage, self._stages.inputs(stage, self._folders)), extra)
        return [*STAGE, *self._flags, *overrides]

    def _width(self, stage: Stage) -> int:
        """How many stages may run beside this one: those with the same needs."""
        same = [other for other in self._stages.asked if other.needs == stage.needs]
        return min(self._stages.pipeline.parallel, len(same))


def _devices(stages: Stages, stage: Stage) -> int:
    """GPUs that a stage wants where there are any."""
    trainer = stages.configs[stage.name].trainer
    return 0 if trainer.accelerator == "cpu" else trainer.devices


def _pipeline_hash(stages: Stages) -> str:
    """Of what the stages are and which were asked for; paths enter as they stand, since it only keeps logs apart."""
    trees = {name: identity_tree(config, lambda _, value: value) for name, config in stages.configs.items()}
    inputs = {stage.name: stage.definition.inputs for stage in stages.asked}
    compared = asdict(stages.pipeline.compare)
    return run_hash({"pipeline": stages.pipeline.name, "stages": trees, "inputs": inputs, "compare": compared})


def _failure(results: dict[str, JobResult], summary: RunFolder) -> PipelineFailed:
    """The first failure in one line, and which others there were."""
    bad = {name: result.code for name, result in results.items() if result.code not in (0, None)}
    (name, code), others = next(iter(bad.items())), list(bad)[1:]
    log = summary.path / f"{name}.log"
    assert code is not None
    ended = f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
    reason = last_words(log)
    text = f"stage '{name}' {ended}{f': {reason}' if reason else ''} (log: {log})"
    text += f"; so did {', '.join(others)}" if others else ""
    return PipelineFailed(text, code if code > 0 else 128 - code)


def _check_places(folders: Mapping[str, Path]) -> None:
    """A stage that ended well did so where it was expected, unless its code or data changed after we looked."""
    for name, folder in folders.items():
        if RunFolder(folder).status().get("status") != FINISHED:
            what = f"stage '{name}' ended well, but not in {folder}"
            raise UserError(what, "", "code or data changed meanwhile: type the command again")


class _Parent:
    """The pipeline's own MLflow run, made when the first stage that needs it starts."""

    def __init__(self, config: TrainConfig, stages: Stages, summary: RunFolder) -> None:
        self._config, self._stages, self._summary = config, stages, summary
        self._logger: Any = None

    def overrides(self) -> list[str]:
        """What the stages are told of their parent."""
        if self._config.tracking.name == "none":
            return []
        if self._logger is None:
            from saferlhf.tracking import build_logger

            self._logger = build_logger(
                self._config.tracking,
                output_root=Path(self._config.output_root),
                run_folder=self._summary.path,
                run_name=f"{self._stages.prefix}/{self._summary.path.name}",
                identity=self._summary.path.name,
                tags={"pipeline": self._stages.pipeline.name},
                resume_run_id=self._summary.status().get("mlflow_run_id"),
            )
            self._summary.update_status(mlflow_run_id=self._logger.run_id)
        return [f"tracking.parent_run_id={self._logger.run_id}"]

    def log(self, metrics: Mapping[str, float]) -> None:
        """Keep the comparison of the stages' policies, if the run was begun; each stage has its own numbers itself."""
        if self._logger is None:
            return
        self._logger.log_metrics({name: value for name, value in metrics.items() if name.startswith("compare/")})
        for name in COMPARISON_FILES:
            if (self._summary.path / name).is_file():
                self._logger.log_artifact(self._summary.path / name)

    def finish(self, status: str) -> None:
        """End the run if it was begun."""
        if self._logger is not None:
            self._logger.finish({FINISHED: "FINISHED", KILLED: "KILLED"}.get(status, "FAILED"))
