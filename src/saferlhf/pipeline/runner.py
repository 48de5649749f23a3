"""A pipeline: stages as normal runs, cached by run identity.

Each stage is composed, checked and identified here, before anything starts, so a typo in the last stage fails at once.
A stage whose run folder is finished is not run again; one that was killed goes on from its checkpoint: that is nothing
but the run's own rule. What the user typed on the command line applies to all stages and wins over their definitions.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saferlhf.config.files import read_json, write_json
from saferlhf.config.identity import run_hash
from saferlhf.config.run_folder import FINISHED, RunFolder
from saferlhf.config.schema import PipelineConfig, StageConfig, TrainConfig
from saferlhf.config.validate import suggestion
from saferlhf.errors import UserError
from saferlhf.pipeline.launcher import Job, JobResult, cpu_share, launch
from saferlhf.pipeline.screen import StageScreen
from saferlhf.run.prepare import locate_run
from saferlhf.run.screen import metrics_overview

Compose = Callable[[Sequence[str]], TrainConfig]
"""Overrides -> checked config of one run."""


@dataclass
class Stage:
    """A stage with its place in the order."""

    name: str
    definition: StageConfig

    @property
    def needs(self) -> tuple[str, ...]:
        """Stages whose runs are inputs of this one."""
        return tuple(self.definition.inputs.values())


class PipelineFailed(Exception):
    """A stage did not finish; the message is for the screen already."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


def run_pipeline(
    config: PipelineConfig,
    *,
    compose: Compose,
    overrides: Sequence[str],
    flags: Sequence[str] = (),
    tracked: bool = True,
) -> dict[str, float]:
    """Run all stages that are not finished yet.

    Args:
        config: the stages.
        compose: from overrides to a run's config.
        overrides: what the user typed, without the pipeline's own keys.
        flags: Hydra flags to hand on, such as `--config-dir`.
        tracked: whether the stages get an MLflow parent run.

    Returns:
        Metrics of all stages, each name prefixed with `<stage>/`.

    Raises:
        UserError: a stage is unknown, or its config is wrong.
        PipelineFailed: a stage did not finish.
    """
    stages = _stages(config)
    first = compose(_stage_overrides(stages[0], overrides, {}, config.name))
    summary = RunFolder(Path(first.output_root) / config.name / _pipeline_hash(config, overrides))
    for stage in stages:  # fail at once, not at the last stage
        inputs = dict.fromkeys(stage.definition.inputs, "placeholder")
        compose([o for o in _stage_overrides(stage, overrides, inputs, config.name) if not o.endswith("=placeholder")])
    parent = _Parent(first, config.name, summary) if tracked and first.tracking.name == "mlflow" else None
    summary.acquire()
    folders: dict[str, Path] = {}
    screen = StageScreen([stage.name for stage in stages])
    started = time.monotonic()

    def job_of(stage: Stage) -> Job:
        def resolve() -> tuple[list[str], RunFolder]:
            inputs = {key: str(folders[need]) for key, need in stage.definition.inputs.items()}
            typed = _stage_overrides(stage, overrides, inputs, config.name)
            folder = locate_run(compose(typed)).folder
            folders[stage.name] = folder.path
            screen.found(stage.name, folder)
            return typed, folder

        def command() -> list[str]:
            typed, folder = resolve()
            if folder.status().get("status") == FINISHED:
                return [sys.executable, "-c", ""]
            extra = ["trainer.progress=none"]
            if not any(o.startswith("trainer.threads=") for o in typed):
                extra.append(f"trainer.threads={cpu_share(_width(stages, stage, config.parallel))}")
            if parent is not None:
                extra.append(f"tracking.parent_run_id={parent.run_id()}")
            return [sys.executable, "-m", "saferlhf.cli", "train", *flags, *typed, *extra]

        log = summary.path / f"{stage.name}.log"
        return Job(stage.name, command, log, tuple(n for n in stage.needs if n in {s.name for s in stages}))

    folders.update(_earlier(config, stages, compose, overrides))
    code = "failed"
    try:
        with screen:
            results = launch([job_of(s) for s in stages], at_once=config.parallel, on_poll=screen.poll)
        code = "finished" if all(r.code == 0 for r in results.values()) else "failed"
        if code == "failed":
            raise _failure(results, summary)
    except KeyboardInterrupt:
        code = "killed"
        raise
    finally:
        summary.update_status(status=code, stages={k: str(v) for k, v in folders.items()})
        summary.release()
        if parent is not None:
            parent.finish(code)
    metrics = {f"{s.name}/{k}": v for s in stages for k, v in (read_json(folders[s.name] / "metrics.json") or {}).items()}
    write_json(summary.metrics, metrics)
    print(metrics_overview({s.name: folders[s.name] for s in stages}, time.monotonic() - started))
    return metrics


def _stages(config: PipelineConfig) -> list[Stage]:
    unknown = [name for name in config.stages if name not in config.definitions]
    if unknown:
        raise UserError(f"unknown stage '{unknown[0]}'", "pipeline.stages", suggestion(unknown[0], config.definitions))
    if not config.stages:
        raise UserError("no stage is named", "pipeline.stages", f"choose from {list(config.definitions)}")
    stages = [Stage(name, config.definitions[name]) for name in config.definitions if name in config.stages]
    for stage in stages:
        for need in stage.needs:
            if need not in config.definitions:
                where = f"pipeline.definitions.{stage.name}.inputs"
                raise UserError(f"unknown stage '{need}'", where, suggestion(need, config.definitions))
    return stages


def _stage_overrides(stage: Stage, overrides: Sequence[str], inputs: dict[str, str], pipeline: str) -> list[str]:
    named = [] if any(o.startswith("name=") for o in overrides) else [f"name={pipeline}-{stage.name}"]
    given = [f"{key}={value}" for key, value in inputs.items()]
    return [*stage.definition.overrides, *named, *overrides, *given]


def _earlier(config: PipelineConfig, stages: list[Stage], compose: Compose, overrides: Sequence[str]) -> dict[str, Path]:
    """Finished runs of stages that are needed but not asked for."""
    asked, found = {stage.name for stage in stages}, {}
    for need in dict.fromkeys(need for stage in stages for need in stage.needs if need not in asked):
        stage = Stage(need, config.definitions[need])
        if stage.needs:
            raise UserError(f"stage '{need}' is needed but not asked for", "pipeline.stages", f"add {need} to the list")
        run = locate_run(compose(_stage_overrides(stage, overrides, {}, config.name)))
        if run.folder.status().get("status") != FINISHED:
            raise UserError(f"stage '{need}' has no finished run yet", "pipeline.stages", f"add {need} to the list")
        found[need] = run.folder.path
    return found


def _width(stages: Sequence[Stage], stage: Stage, parallel: int) -> int:
    """How many stages may run beside this one: those with the same needs."""
    return min(parallel, sum(1 for other in stages if other.needs == stage.needs))


def _pipeline_hash(config: PipelineConfig, overrides: Sequence[str]) -> str:
    return run_hash({"pipeline": config.name, "overrides": sorted(overrides)})


def _failure(results: dict[str, JobResult], summary: RunFolder) -> PipelineFailed:
    bad = [(name, r.code) for name, r in results.items() if r.code not in (0, None)]
    name, code = bad[0]
    log = summary.path / f"{name}.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    tail = next((line for line in reversed(lines) if line.startswith("error:")), lines[-1] if lines else "")
    return PipelineFailed(f"stage '{name}' did not finish: {tail.removeprefix('error: ')} (log: {log})", int(code or 1))


class _Parent:
    """The pipeline's own MLflow run, made when the first stage that needs it starts."""

    def __init__(self, config: TrainConfig, name: str, summary: RunFolder) -> None:
        self._config, self._name, self._summary = config, name, summary
        self._logger: Any = None

    def run_id(self) -> str:
        """The id that the stages name as their parent."""
        if self._logger is None:
            from saferlhf.tracking import build_logger

            self._logger = build_logger(
                self._config.tracking,
                output_root=Path(self._config.output_root),
                run_folder=self._summary.path,
                run_name=self._name,
                identity=self._summary.path.name,
                resume_run_id=self._summary.status().get("mlflow_run_id"),
            )
            self._summary.update_status(mlflow_run_id=self._logger.run_id)
        return str(self._logger.run_id)

    def finish(self, status: str) -> None:
        """End the run if it was begun."""
        if self._logger is not None:
            self._logger.finish({"finished": "FINISHED", "killed": "KILLED"}.get(status, "FAILED"))
