"""What the rest of the project may do with a logger, and the logger that does nothing (`tracking=none`)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.loggers import Logger

Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True)
class SplitInfo:
    """One split of the data of a run.

    Attributes:
        split: train | val | test.
        name: the data configuration's name.
        fingerprint: hash over the rows' content.
        rows: how many rows.
        source: where they come from: a path, an address, or `toyworld`.
    """

    split: str
    name: str
    fingerprint: str
    rows: int
    source: str


class TrackingLogger(Logger):
    """A Lightning logger that keeps more than metrics.

    `finish` ends the run; Lightning's `finalize`, called after each of its loops, does not, because evaluation and
    export of a run come after training.
    """

    @property
    @abstractmethod
    def run_id(self) -> str | None:
        """Id of the tracked run, to be stored for resuming; None when nothing is tracked."""

    @abstractmethod
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; a tag set before is overwritten."""

    @abstractmethod
    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a copy of a file, or of a folder with all it holds, under `folder` of the run's artefacts."""

    @abstractmethod
    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep a text as an artefact."""

    @abstractmethod
    def log_dict(self, dictionary: Mapping[str, Any], artifact_file: str) -> None:
        """Keep a mapping as a YAML or JSON artefact, by the file's ending."""

    @abstractmethod
    def log_datasets(self, splits: Iterable[SplitInfo]) -> None:
        """Record the data as inputs of the run, each with its split as context."""

    @abstractmethod
    def register_model(self, export_folder: str | Path, tags: Mapping[str, Any] | None = None) -> None:
        """Register the export as a new version of `tracking.register_model`; nothing without that name."""

    @abstractmethod
    def flush(self) -> None:
        """Send what is buffered."""

    def save(self) -> None:
        """Lightning's name for the same; called before a checkpoint, which points logged earlier must outlive."""
        self.flush()

    @abstractmethod
    def finish(self, status: Status = "FINISHED") -> None:
        """Send everything, stop the system metrics and end the run; further calls do nothing."""


class NullLogger(TrackingLogger):
    """Accepts everything, keeps nothing: `tracking=none`, and every process but the first."""

    @property
    def name(self) -> str | None:
        """No experiment."""
        return None

    @property
    def version(self) -> str | None:
        """No run."""
        return None

    @property
    def run_id(self) -> str | None:
        """No run."""
        return None

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Keep nothing."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Keep nothing."""

    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Keep nothing."""

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep nothing."""

    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep nothing."""

    def log_dict(self, dictionary: Mapping[str, Any], artifact_file: str) -> None:
        """Keep nothing."""

    def log_datasets(self, splits: Iterable[SplitInfo]) -> None:
        """Keep nothing."""

    def register_model(self, export_folder: str | Path, tags: Mapping[str, Any] | None = None) -> None:
        """Register nothing."""

    def flush(self) -> None:
        """Nothing to send."""

    def finish(self, status: Status = "FINISHED") -> None:
        """Nothing to end."""
