"""What is sent to a store, as plain records: written down as JSON when the store is lost, sent later from there.

One record is one call to the store. A run that loses its tracking server goes on; its records wait in
`tracking_backlog.jsonl` in the run folder and are sent when the server is back, in this run or the next that continues
it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saferlhf.tracking.store import retry_when_busy

if TYPE_CHECKING:
    from mlflow import MlflowClient

BACKLOG = "tracking_backlog.jsonl"

METRICS_PER_CALL = 1000  # MLflow's limit
NAMES_PER_CALL = 100  # MLflow's limit for params and for tags
DIGEST_LENGTH = 36  # MLflow's limit for a data set's fingerprint

REFUSED = frozenset({"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE"})
"""Error codes of a store that is there but does not take a record: no use in keeping it."""


@dataclass(frozen=True)
class Record:
    """One call to the store.

    Attributes:
        kind: metrics | params | tags | text | artifact | datasets | model | status.
        body: what the kind needs, as JSON values.
    """

    kind: str
    body: dict[str, Any]


def send(client: MlflowClient, run_id: str, record: Record) -> None:
    """Send one record; tried again while the database is busy.

    Raises:
        Exception: whatever the store raised; `is_refusal` tells whether keeping the record is of use.
    """
    retry_when_busy(lambda: _SENDERS[record.kind](client, run_id, record.body))


def is_refusal(error: Exception) -> bool:
    """Whether the store answered and said no, as opposed to not answering."""
    return getattr(error, "error_code", None) in REFUSED


def _send_metrics(client: MlflowClient, run_id: str, body: dict[str, Any]) -> None:
    from mlflow.entities import Metric

    points = [Metric(key, value, timestamp, step) for key, value, timestamp, step in body["points"]]
    for some in _chunks(points, METRICS_PER_CALL):
        client.log_batch(run_id, metrics=some)


def _send_params(client: MlflowClient, run_id: str, body: dict[str, Any]) -> None:
    from mlflow.entities import Param

    for some in _chunks([Param(key, value) for key, value in body.items()], NAMES_PER_CALL):
        client.log_batch(run_id, params=some)


def _send_tags(client: MlflowClient, run_id: str, body: dict[str, Any]) -> None:
    from mlflow.entities import RunTag

    for some in _chunks([RunTag(key, value) for key, value in body.items()], NAMES_PER_CALL):
        client.log_batch(run_id, tags=some)


def _send_text(client: MlflowClient, run_id: str, body: dict[str, Any]) -> None:
    client.log_text(run_id, body["text"], body["artifact_file"])


def _send_artifact(client: MlflowClient, run_id: str, body: dict[str, Any]) -> None:
    if os.path.isdir(body["path"]):
        client.log_artifacts(run_id, body["path"], body["folder"])
    else:
        client.log_artifact(run_id, body["path"], body["folder"])


def _send_datasets(client: MlflowClient, run_id: str, body: dict[str, Any]) -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    inputs = []
    for split in body["splits"]:
        dataset = Dataset(
            name=split["name"],
            digest=split["fingerprint"][:DIGEST_LENGTH],
            source_type="local",
            source=json.dumps({"uri": split["source"]}),
            profile=json.dumps({"num_rows": split["rows"], "fingerprint": split["fingerprint"]}),
        )
        inputs.append(DatasetInput(dataset, tags=[InputTag("mlflow.data.context", split["split"])]))
    client.log_inputs(run_id, inputs)


def _send_model(client: MlflowClient, run_id: str, body: dict[str, Any]) -> None:
    from mlflow.exceptions import MlflowException

    name, tags = body["name"], body["tags"]
    client.log_artifacts(run_id, body["folder"], "export")
    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    source = f"{client.get_run(run_id).info.artifact_uri}/export"
    client.create_model_version(name, source, run_id=run_id, tags=tags, await_creation_for=0)


def _send_status(client: MlflowClient, run_id: str, body: dict[str, Any]) -> None:
    if body["status"] == "RUNNING":
        client.update_run(run_id, status="RUNNING")
    else:
        client.set_terminated(run_id, body["status"], body["end_time"])


_SENDERS = {
    "metrics": _send_metrics,
    "params": _send_params,
    "tags": _send_tags,
    "text": _send_text,
    "artifact": _send_artifact,
    "datasets": _send_datasets,
    "model": _send_model,
    "status": _send_status,
}


class Backlog:
    """Records that could not be sent, in a file of JSON lines; each line knows its run."""

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / BACKLOG

    def __bool__(self) -> bool:
        return self.path.exists()

    def add(self, run_id: str, record: Record) -> None:
        """Append one record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"run_id": run_id, **asdict(record)}) + "\n")

    def send_all(self, client: MlflowClient) -> list[str]:
        """Send every record in order and take it off the file.

        Returns:
            What the store refused, one line each; those records are gone.

        Raises:
            Exception: the store is still lost; what was sent before is off the file, the rest is kept.
        """
        lines = self.path.read_text(encoding="utf-8").splitlines()
        refused, done = [], 0
        try:
            for line in lines:
                entry = self._read(line)
                if entry is not None:
                    run_id, record = entry
                    try:
                        send(client, run_id, record)
                    except Exception as error:
                        if not is_refusal(error):
                            raise
                        refused.append(f"{record.kind}: {first_line(error)}")
                done += 1
        finally:
            self._keep(lines[done:])
        return refused

    @staticmethod
    def _read(line: str) -> tuple[str, Record] | None:
        """One line; None for a line cut off when the process was killed in the middle of writing it."""
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            return None
        return entry["run_id"], Record(entry["kind"], entry["body"])

    def _keep(self, lines: Sequence[str]) -> None:
        if not lines:
            self.path.unlink(missing_ok=True)
            return
        rest = self.path.with_suffix(".part")
        rest.write_text("\n".join(lines) + "\n", encoding="utf-8")
        rest.replace(self.path)


def first_line(error: Exception) -> str:
    """The first line of what an error says, short enough for one line on the screen."""
    text = str(error).strip().split("\n")[0] or type(error).__name__
    return text if len(text) <= 200 else text[:199] + "…"


def _chunks(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def text_values(mapping: Mapping[str, Any]) -> dict[str, str]:
    """Tag values as text; None is left out."""
    return {key: str(value) for key, value in mapping.items() if value is not None}
