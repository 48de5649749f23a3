"""One tracked run per run folder, however often it was killed, and its status is the run's."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from small_runs import RunServer, curves, metrics, small, status

KILL = signal.SIGKILL


class Tracked:
    """Runs that share one store: making one takes longer than a small run."""

    def __init__(self, server: RunServer, outputs: Path) -> None:
        self.server, self.outputs = server, outputs

    def run(self, name: str, *overrides: str, **options: Any) -> Any:
        mine = ("tracking=mlflow", "tracking.system_metrics=false", f"name={name}", f"output_root={self.outputs}")
        return self.server.run(*small(*mine, *overrides), **options)

    def folder(self, name: str) -> Path:
        (folder,) = (self.outputs / name).iterdir()
        return folder

    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(f"sqlite:///{self.outputs / 'mlflow.db'}")

    def found(self, name: str) -> Any:
        """The one tracked run of a run folder."""
        folder, client = self.folder(name), self.client()
        runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
        (run,) = [run for run in runs if run.data.tags["run_folder"] == str(folder.resolve())]
        assert run.info.run_id == status(folder)["mlflow_run_id"]
        return run


@pytest.fixture(scope="module")
def tracked(server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    return Tracked(server, tmp_path_factory.mktemp("tracked"))


def test_a_killed_run_is_continued(tracked: Tracked) -> None:
    ended = tracked.run("killed", "task=reward", die={"signal": KILL, "at": "train_batch_start", "step": 7})
    assert ended.code == -KILL, ended.output
    first = tracked.found("killed")
    assert first.info.status == "RUNNING"
    # what it was fed is known from the start
    artifacts = {a.path for a in tracked.client().list_artifacts(first.info.run_id)}
    assert "data_report.json" in artifacts
    ended = tracked.run("killed", "task=reward")
    assert ended.code == 0, ended.output
    run, folder, client = tracked.found("killed"), tracked.folder("killed"), tracked.client()
    assert run.info.run_id == first.info.run_id and run.info.status == "FINISHED"
    # every point of the curves once, and the same as on disk
    for name, points in curves(folder).items():
        history = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
        assert sorted(history[: len(points)]) == points, name
        assert len(history) == len(points) + (name in metrics(folder)), name
    for name, value in metrics(folder).items():
        assert run.data.metrics[name] == value
    assert {"config.yaml", "metrics.json", "report.html"} <= {a.path for a in client.list_artifacts(run.info.run_id)}


def test_a_diverged_run_is_failed(tracked: Tracked) -> None:
    wild = ("optimizer.lr=1e30", "trainer.gradient_clip=null", "schedule=constant")
    assert tracked.run("diverged", "task=reward", *wild).code == 2
    assert tracked.found("diverged").info.status == "FAILED"


def test_an_interrupted_run_is_killed(tracked: Tracked) -> None:
    die = {"signal": signal.SIGTERM, "at": "train_batch_start", "step": 4}
    assert tracked.run("stopped", "task=reward", die=die).code == 130
    run = tracked.found("stopped")
    assert run.info.status == "KILLED" and run.info.end_time is not None


@pytest.mark.slow
def test_a_run_interrupted_twice_ends_finished(tracked: Tracked) -> None:
    for at, step in (("train_batch_start", 4), ("evaluated", 12)):
        die = {"signal": signal.SIGINT, "at": at, "step": step}
        assert tracked.run("twice", "task=cost", die=die).code == 130
        assert tracked.found("twice").info.status == "KILLED"
    assert tracked.run("twice", "task=cost").code == 0
    assert tracked.found("twice").info.status == "FINISHED"


@pytest.mark.slow
def test_killed_at_the_last_moment(tracked: Tracked) -> None:
    """All is written, and the run is not called finished yet."""
    assert tracked.run("last", "task=reward", die={"signal": KILL, "at": "exported"}).code == -KILL
    assert tracked.run("last", "task=reward").code == 0
    assert tracked.found("last").info.status == "FINISHED" and status(tracked.folder("last"))["status"] == "finished"
