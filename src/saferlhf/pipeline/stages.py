"""The stages of a pipeline: their order, the overrides of each, and where their runs are.

A stage is a normal run, so it has a folder by its identity, which is known once the runs it starts from are finished.
What the user typed applies to every stage and wins over the stages' definitions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saferlhf.config.arguments import assign, key_of, merged
from saferlhf.config.rollout_schema import SignalConfig
from saferlhf.config.run_folder import FINISHED
from saferlhf.config.schema import PipelineConfig, StageConfig, TrainConfig
from saferlhf.config.validate import suggestion
from saferlhf.errors import UserError
from saferlhf.pipeline.compare import check_compare
from saferlhf.run.prepare import LocatedRun, locate_run

Compose = Callable[[Sequence[str]], TrainConfig]
"""Overrides -> checked config of one run."""

NOT_THERE_YET = "a run that is not there yet"


@dataclass(frozen=True)
class Stage:
    """A stage with its place in the order."""

    name: str
    definition: StageConfig

    @property
    def needs(self) -> tuple[str, ...]:
        """Stages whose runs are inputs of this one."""
        return tuple(dict.fromkeys(self.definition.inputs.values()))


class Stages:
    """The stages that were asked for, in order.

    Args:
        config: the pipeline.
        compose: from overrides to a run's config.
        overrides: what the user typed, without the pipeline's own keys and without a name.
        prefix: a stage's run is named `<prefix>-<stage>`.

    Attributes:
        pipeline: the pipeline's config.
        asked: the stages to run, each after those it needs.
        configs: stage -> checked config; what comes from another stage's run is `NOT_THERE_YET`.

    Raises:
        UserError: stages that do not exist or need each other, or a stage whose config is wrong.
    """

    def __init__(self, config: PipelineConfig, *, compose: Compose, overrides: Sequence[str], prefix: str) -> None:
        self.pipeline, self.prefix = config, prefix
        self._compose, self._overrides = compose, overrides
        self._all = {name: Stage(name, definition) for name, definition in config.definitions.items()}
        self._check_names()
        check_compare(config.compare, list(self._all))
        self.asked = [self._all[name] for name in self._in_order() if name in config.stages]
        self._check_inputs()
        # all of them now: fail at once, not at the last stage
        self.configs = {stage.name: self._composed(stage) for stage in self.asked}
        self._check_resume()

    def overrides(self, stage: Stage, inputs: dict[str, str]) -> list[str]:
        """Overrides of train.yaml that make the stage's run, given the values of its inputs."""
        return merged(
            ["~pipeline"],  # an experiment may have chosen one
            stage.definition.overrides,
            self._overrides,
            [f"name={self.prefix}-{stage.name}"],
            [assign(key, value) for key, value in inputs.items()],
        )

    def run_config(self, stage: Stage, inputs: Mapping[str, str | None]) -> TrainConfig:
        """The stage's checked config with the values of its inputs."""
        config = deepcopy(self.configs[stage.name] if stage.name in self.configs else self._composed(stage))
        for key, value in inputs.items():
            _set(config, key, value)
        return config

    def locate(self, stage: Stage, folders: Mapping[str, Path]) -> LocatedRun:
        """The stage's run, given the folders of the runs it starts from."""
        return locate_run(self.run_config(stage, self.inputs(stage, folders)))

    def inputs(self, stage: Stage, folders: Mapping[str, Path]) -> dict[str, str]:
        """Config key -> folder."""
        return {key: str(folders[need]) for key, need in stage.definition.inputs.items()}

    def earlier(self) -> dict[str, Path]:
        """Folders of finished runs of stages that are needed but not asked for.

        Raises:
            UserError: there is none.
        """
        asked, found = {stage.name for stage in self.asked}, dict[str, Path]()
        for need in dict.fromkeys(need for stage in self.asked for need in stage.needs if need not in asked):
            folder = self.finished(self._all[need])
            if folder is None:
                raise UserError(f"stage '{need}' has no finished run yet", "pipeline.stages", f"add {need} to the list")
            found[need] = folder
        return found

    def finished(self, stage: Stage) -> Path | None:
        """The folder of a stage's finished run, if it and all before it are finished."""
        folders: dict[str, Path] = {}
        for need in stage.needs:
            folder = self.finished(self._all[need])
            if folder is None:
                return None
            folders[need] = folder
        config = self.run_config(stage, self.inputs(stage, folders))
        # `resume=never` asks for fresh runs of the stages asked for; this one is only looked for
        run = locate_run(replace(config, resume="auto")).folder
        return run.path if run.status().get("status") == FINISHED else None

    def _composed(self, stage: Stage) -> TrainConfig:
        """The stage's checked config, before the runs it starts from are known; a `UserError` names the stage."""
        try:
            return self._compose(self.overrides(stage, dict.fromkeys(stage.definition.inputs, NOT_THERE_YET)))
        except UserError as error:
            where = f"{error.where}, stage {stage.name}" if error.where else f"stage {stage.name}"
            raise UserError(error.what, where, error.mend) from None

    # -------------------------------------------------------------------------------------------- checks
    def _check_names(self) -> None:
        config, known = self.pipeline, list(self.pipeline.definitions)
        if config.parallel < 1:
            raise UserError(f"{config.parallel} stages at once", "pipeline.parallel", "give a whole number from 1 up")
        if not config.stages:
            raise UserError("no stage is named", "pipeline.stages", f"choose from: {', '.join(known)}")
        for name in config.stages:
            if name not in known:
                raise UserError(f"unknown stage '{name}'", "pipeline.stages", suggestion(name, known))
        for stage in self._all.values():
            for need in stage.needs:
                if need not in known:
                    where = f"pipeline.definitions.{stage.name}.inputs"
                    raise UserError(f"unknown stage '{need}'", where, suggestion(need, known))

    def _in_order(self) -> list[str]:
        """All stages, each after those it needs, else as they are defined."""
        order: list[str] = []
        left = list(self._all.values())
        while left:
            ready = next((stage for stage in left if all(need in order for need in stage.needs)), None)
            if ready is None:
                names = ", ".join(stage.name for stage in left)
                raise UserError(
                    f"stages need each other: {names}", "pipeline.definitions", "take one of the inputs out"
                )
            order.append(ready.name)
            left.remove(ready)
        return order

    def _check_inputs(self) -> None:
        typed = {key_of(override) for override in self._overrides}
        for stage in self.asked:
            for key, need in stage.definition.inputs.items():
                if key in typed:
                    mend = f"run the task alone, or change pipeline.definitions.{stage.name}.inputs"
                    raise UserError(f"stage '{stage.name}' takes {key} from stage '{need}'", key, mend)

    def _check_resume(self) -> None:
        for config in self.configs.values():
            if config.resume not in ("auto", "never"):
                what = "a path names one run, a pipeline has several"
                raise UserError(what, f"resume={config.resume}", "resume=auto, resume=never, or run the task alone")


def _set(config: TrainConfig, key: str, value: str | None) -> None:
    """Give a key of the checked config a value; what a scorer is asked with stands in its judge."""
    node: Any = config
    *parents, leaf = key.split(".")
    for parent in parents:
        node = node[parent] if isinstance(node, Mapping) else getattr(node, parent)
        node = node.judge if isinstance(node, SignalConfig) else node
    setattr(node, leaf, value)
