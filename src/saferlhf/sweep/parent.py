"""A sweep's own MLflow run, the parent of its children.

It is begun before the first child is started, which also makes the database and the experiment once: children that come
together would otherwise trip over each other there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from saferlhf.config.arguments import assign
from saferlhf.config.run_folder import FINISHED, KILLED, RunFolder
from saferlhf.config.schema import TrainConfig


class Parent:
    """The parent run; nothing with `tracking=none`.

    Args:
        config: of any of the runs: where they are tracked.
        folder: the sweep's; it remembers the run's id, so that a repeated command goes on with the same one.
        tags: what the sweep is about.
        params: likewise, as parameters.
    """

    def __init__(
        self, config: TrainConfig, folder: RunFolder, *, tags: Mapping[str, Any], params: Mapping[str, Any]
    ) -> None:
        self._config, self._folder, self._tags, self._params = config, folder, tags, params
        self._logger: Any = None

    def begin(self) -> None:
        """Begin the run, or go on with the one this folder began before.

        Raises:
            UserError: the store cannot be reached or used.
        """
        if self._logger is not None or self._config.tracking.name == "none":
            return
        from saferlhf.tracking import build_logger

        self._logger = build_logger(
            self._config.tracking,
            output_root=Path(self._config.output_root),
            run_folder=self._folder.path,
            run_name=f"sweep {self._config.name}/{self._folder.path.name}",
            identity=self._folder.path.name,
            tags=self._tags,
            resume_run_id=self._folder.status().get("mlflow_run_id"),
        )
        self._folder.update_status(mlflow_run_id=self._logger.run_id)
        self._logger.log_hyperparams(dict(self._params))

    def is_open(self) -> bool:
        """Whether an earlier call began the run and did not see the sweep's end."""
        status = self._folder.status()
        return status.get("mlflow_run_id") is not None and status.get("ended") != FINISHED

    def words(self, label: str | None = None) -> list[str]:
        """What a child is told of its parent, and of its own name."""
        if self._logger is None or self._logger.run_id is None:
            return []
        named = [] if label is None else [assign("tracking.run_name", label)]
        return [f"tracking.parent_run_id={self._logger.run_id}", *named]

    def log(self, metrics: Mapping[str, float], tags: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Keep the best run's number, what it was, and the sweep's files."""
        if self._logger is None:
            return
        self._logger.log_metrics(metrics)
        self._logger.set_tags(tags)
        for file in files:
            self._logger.log_artifact(file)

    def finish(self, status: str) -> None:
        """End the run if it was begun."""
        if self._logger is not None:
            self._logger.finish({FINISHED: "FINISHED", KILLED: "KILLED"}.get(status, "FAILED"))
