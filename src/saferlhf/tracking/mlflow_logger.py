"""The MLflow logger of a run, and `build_logger`, which makes it.

Thin, and our own: Lightning's writes to a store MLflow no longer takes, cuts params at 250 characters, ends runs that
are not over and knows neither system metrics nor data sets. It uses MLflow's client, no global state, so that a parent
run and its children can be open side by side. Metrics are buffered and sent in batches.

Resuming continues the same MLflow run. The steps since the last checkpoint are computed again, to the same values;
points the store already has are not sent twice. A process may be killed between the store's making the run and the
folder's noting its id; a token written before, and set as a tag, finds that run again, so that none stays RUNNING.

A store that fails at the start is the user's to mend (`UserError`). A store lost later never stops the run: see
`records`.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from lightning.fabric.utilities.rank_zero import rank_zero_only

from saferlhf import __version__
from saferlhf.config.schema import TrackingConfig
from saferlhf.tracking import params as config_params
from saferlhf.tracking.base import NullLogger, SplitInfo, Status, TrackingLogger
from saferlhf.tracking.records import Backlog, Record, first_line, is_refusal, send, text_values
from saferlhf.tracking.store import connect, prepare_store, retry_when_busy, store_uri, unusable, without_password

if TYPE_CHECKING:
    from mlflow.entities import Run

log = logging.getLogger("saferlhf.tracking")

TOKEN = "tracking_token"
"""File in the run folder, from before the run is made until its id is known to be noted; and the tag beside it."""

BUFFER_POINTS = 1000
FLUSH_SECONDS = 5.0
FIRST_RETRY_SECONDS, LONGEST_RETRY_SECONDS = 30.0, 600.0
SYSTEM_METRICS_SECONDS = 10.0


def build_logger(
    cfg: TrackingConfig,
    *,
    output_root: Path,
    run_folder: Path,
    run_name: str,
    identity: str,
    tags: Mapping[str, Any] | None = None,
    resume_run_id: str | None = None,
) -> TrackingLogger:
    """The logger the configuration asks for; does nothing on every process but the first.

    Args:
        cfg: the tracking configuration.
        output_root: the default store lies here.
        run_folder: the run's folder; records wait here while the store is lost.
        run_name: name of the run unless `cfg.run_name` is given.
        identity: the run's hash.
        tags: task, data, backbone and whatever else names the run.
        resume_run_id: the MLflow run to continue; when the store has it no more, a new one is started, with a line.

    Raises:
        UserError: the store cannot be reached or used.
    """
    if cfg.name == "none" or getattr(rank_zero_only, "rank", 0) != 0:
        return NullLogger()
    about = {
        **_about_the_code(),
        "run_identity": identity,
        "run_folder": str(run_folder.resolve()),
        "export_folder": str(run_folder.resolve() / "export"),
        "parent": cfg.parent_run_id,
        "mlflow.parentRunId": cfg.parent_run_id,
        **(tags or {}),
        **cfg.tags,
    }
    return MLflowLogger(
        cfg,
        uri=store_uri(cfg, output_root),
        artifact_root=output_root / "mlartifacts",
        run_folder=run_folder,
        run_name=cfg.run_name or run_name,
        tags=text_values(about),
        resume_run_id=resume_run_id,
    )


class MLflowLogger(TrackingLogger):
    """One MLflow run. See the module's docstring; `build_logger` for the arguments."""

    def __init__(
        self,
        cfg: TrackingConfig,
        *,
        uri: str,
        artifact_root: Path,
        run_folder: Path,
        run_name: str,
        tags: Mapping[str, str],
        resume_run_id: str | None = None,
    ) -> None:
        super().__init__()
        self._cfg, self._uri, self._run_folder = cfg, uri, run_folder
        experiment_id = prepare_store(uri, cfg.experiment, artifact_root)
        self._client = connect(uri)
        self._backlog = Backlog(run_folder)
        self._points: list[tuple[str, float, int, int]] = []
        self._last_flush = time.monotonic()
        self._lost, self._next_try, self._wait = False, 0.0, FIRST_RETRY_SECONDS
        self._finished = False
        self._config: dict[str, Any] = {}

        # first of all what an earlier attempt could not send, so that what the store knows is up to date
        if self._backlog:
            self._send_backlog()
        try:
            run = self._find(resume_run_id) if resume_run_id else self._begun_before(experiment_id)
            resumed = run is not None
            if run is None:
                about = {**tags, TOKEN: self._new_token()}
                create = partial(self._client.create_run, experiment_id, tags=about, run_name=run_name)
                run = retry_when_busy(create)
        except Exception as error:
            raise unusable(uri, error) from error
        self._run_id: str = run.info.run_id
        self._known_params: dict[str, str] = dict(run.data.params)
        self._known_steps: dict[str, int] = {m.key: m.step for m in getattr(run.data, "_metric_objs", None) or []}
        if resumed:
            self._send(Record("status", {"status": "RUNNING"}))
            self.set_tags(tags)
        self._monitor = self._start_system_metrics() if cfg.system_metrics else None

    # ------------------------------------------------------------------------------------ Lightning's side
    @property
    def name(self) -> str:
        """The experiment."""
        return self._cfg.experiment

    @property
    def version(self) -> str:
        """The run's id."""
        return self._run_id

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._run_folder)

    @property
    def run_id(self) -> str:
        """The run's id, to be stored for resuming."""
        return self._run_id

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Buffer numbers under a step; sent after some seconds or many points.

        Args:
            metrics: name -> number or tensor of one element. Names may hold slashes.
            step: the task's own counter; None is 0.
        """
        now, at = int(time.time() * 1000), step or 0
        for name, value in metrics.items():
            key = config_params.safe_name(name)
            if 0 < at <= self._known_steps.get(key, -1):
                continue
            self._points.append((key, float(value), now, at))
        if len(self._points) >= BUFFER_POINTS or time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Log a configuration: every value as a param, the whole as the artefact `config.yaml`.

        A mapping, OmegaConf node, dataclass or namespace. On resume new names are logged, changed values become tags.
        """
        self._forget_token()  # whoever logs has been given the run's id before, and noted it
        config = config_params.as_mapping(params)
        self._config.update(config)
        new, changed = config_params.new_and_changed(config_params.flatten(config), self._known_params)
        if new:
            self._send(Record("params", new))
            self._known_params.update(new)
        if changed:
            self.set_tags(changed)
        self.log_dict(self._config, "config.yaml")

    def finalize(self, status: str) -> None:
        """Send what is buffered. Lightning calls this after each loop; the run goes on until `finish`."""
        self.flush()

    # ------------------------------------------------------------------------------------ our side
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Set tags; None values are left out."""
        values = {config_params.safe_name(key): value for key, value in text_values(tags).items()}
        if values:
            self._send(Record("tags", {key: value[: config_params.TAG_LENGTH] for key, value in values.items()}))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Keep a copy of a file or folder.

        Raises:
            FileNotFoundError: there is nothing at `path`.
        """
        path = Path(path).resolve()
        if not path.exists():
            raise FileNotFoundError(path)
        self._send(Record("artifact", {"path": str(path), "folder": folder}))

    def log_text(self, text: str, artifact_file: str) -> None:
        """Keep a text."""
        self._send(Record("text", {"text": text, "artifact_file": artifact_file}))

    def log_dict(self, dictionary: Mapping[str, Any], artifact_file: str) -> None:
        """Keep a mapping as YAML or JSON, in the order of its keys."""
        plain = config_params.as_mapping(dictionary)
        if artifact_file.endswith((".yaml", ".yml")):
            text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        else:
            text = json.dumps(plain, indent=2, ensure_ascii=False)
        self.log_text(text, artifact_file)

    def log_datasets(self, splits: Iterable[SplitInfo]) -> None:
        """Record the splits as inputs."""
        self._send(Record("datasets", {"splits": [asdict(split) for split in splits]}))

    def register_model(self, export_folder: str | Path, tags: Mapping[str, Any] | None = None) -> None:
        """Copy the export into the store and register it as the next version of `tracking.register_model`."""
        if not self._cfg.register_model:
            return
        body = {"name": self._cfg.register_model, "folder": str(Path(export_folder).resolve())}
        self._send(Record("model", {**body, "tags": text_values(tags or {})}))

    def flush(self) -> None:
        """Send the buffered metrics."""
        points = self._points[:]
        if points:
            self._send(Record("metrics", {"points": points}))
            del self._points[: len(points)]
        self._last_flush = time.monotonic()

    def finish(self, status: Status = "FINISHED") -> None:
        """End the run; what could not be sent stays in the run folder, and a line says where."""
        if self._finished:
            return
        self._finished = True
        self._forget_token()
        if self._monitor is not None:
            self._monitor.finish()
        self.flush()
        self._send(Record("status", {"status": status, "end_time": int(time.time() * 1000)}))
        if self._lost:
            self._send_backlog()
        if self._backlog:
            log.warning(
                "tracking: what %s did not take waits in %s; typing the run's command again sends it",
                without_password(self._uri),
                self._backlog.path,
            )

    # ------------------------------------------------------------------------------------ inside
    def _find(self, run_id: str) -> Run | None:
        """The run to continue; None, with a line on the screen, when the store has it no more."""
        from mlflow.exceptions import MlflowException

        try:
            run = retry_when_busy(lambda: self._client.get_run(run_id))
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            run = None
        if run is None or run.info.lifecycle_stage == "deleted":
            log.warning("tracking: the run %s is not in the store any more; a new one is started", run_id)
            return None
        return run

    def _new_token(self) -> str:
        token = uuid.uuid4().hex
        self._run_folder.mkdir(parents=True, exist_ok=True)
        (self._run_folder / TOKEN).write_text(f"{token} {os.getpid()}")
        return token

    def _forget_token(self) -> None:
        (self._run_folder / TOKEN).unlink(missing_ok=True)

    def _begun_before(self, experiment_id: str) -> Run | None:
        """The run that an earlier process of this folder made and did not live to note."""
        try:
            token, pid = (self._run_folder / TOKEN).read_text().split()
        except (OSError, ValueError):
            return None
        if pid == str(os.getpid()):
            return None  # it lives: another logger of this process
        wanted = f"tags.{TOKEN} = '{token}'"
        found = retry_when_busy(lambda: self._client.search_runs([experiment_id], wanted, max_results=1))
        return found[0] if found else None

    def _send(self, record: Record) -> None:
        """Send, or write down when the store is lost; a refused record is named and dropped."""
        if self._lost:
            self._backlog.add(self._run_id, record)
            if time.monotonic() >= self._next_try:
                self._send_backlog()
            return
        try:
            send(self._client, self._run_id, record)
        except Exception as error:
            if is_refusal(error):
                log.warning("tracking: the store does not take %s: %s", record.kind, first_line(error))
                return
            self._backlog.add(self._run_id, record)
            self._lose(error)

    def _lose(self, error: Exception) -> None:
        if not self._lost:
            log.warning(
                "tracking: %s is lost (%s); the run goes on and keeps its records in %s",
                without_password(self._uri),
                without_password(first_line(error)),
                self._backlog.path,
            )
        else:
            self._wait = min(2 * self._wait, LONGEST_RETRY_SECONDS)
        self._lost, self._next_try = True, time.monotonic() + self._wait

    def _send_backlog(self) -> None:
        """Send what waits; stays lost when that fails."""
        try:
            refused = self._backlog.send_all(self._client)
        except Exception as error:
            self._lose(error)
            return
        for line in refused:
            log.warning("tracking: the store does not take %s", line)
        if self._lost:
            log.warning("tracking: %s is back; everything kept meanwhile has been sent", without_password(self._uri))
        self._lost, self._wait = False, FIRST_RETRY_SECONDS

    def _start_system_metrics(self) -> Any:
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        monitor = SystemMetricsMonitor(
            self._run_id, sampling_interval=SYSTEM_METRICS_SECONDS, resume_logging=True, tracking_uri=self._uri
        )
        monitor.start()
        return monitor


def _about_the_code() -> dict[str, str | None]:
    """Version and, when this package is run from its own repository, the commit (`-dirty` with local changes)."""
    here = Path(__file__).resolve()
    commit = None
    try:
        # an installed copy inside somebody else's repository must not take that repository's commit for its own
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name], cwd=here.parent, capture_output=True, check=True
        )
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(command, cwd=here.parent, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return {"saferlhf_version": __version__, "git_commit": commit, "mlflow.source.git.commit": commit}
