"""One tracked run per run folder, however often it was killed, and its status is the run's."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from small_runs import RunServer, curves, metrics, only_run, small, status

KILL = signal.SIGKILL


def tracked(outputs: Path, *overrides: str) -> list[str]:
    return small("tracking=mlflow", "tracking.system_metrics=false", f"output_root={outputs}", *overrides)


def runs(outputs: Path) -> tuple[Any, list[Any]]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{outputs / 'mlflow.db'}")
    return client, client.search_runs([e.experiment_id for e in client.search_experiments()])


def test_a_killed_run_is_continued(server: RunServer, tmp_path: Path) -> None:
    overrides = tracked(tmp_path, "task=reward")
    ended = server.run(*overrides, die={"signal": KILL, "at": "train_batch_start", "step": 7})
    assert ended.code == -KILL, ended.output
    folder = only_run(tmp_path)
    first = status(folder)["mlflow_run_id"]
    _, (run,) = runs(tmp_path)
    assert run.info.run_id == first and run.info.status == "RUNNING"
    ended = server.run(*overrides)
    assert ended.code == 0, ended.output
    client, (run,) = runs(tmp_path)
    assert run.info.run_id == first == status(folder)["mlflow_run_id"] and run.info.status == "FINISHED"
    # every point of the curves once, and the same as on disk
    for name, points in curves(folder).items():
        history = [(m.step, m.value) for m in client.get_metric_history(first, name)]
        # the final measurement writes some names once more
        assert sorted(history[: len(points)]) == points, name
        assert len(history) == len(points) + (name in metrics(folder)), name
    for name, value in metrics(folder).items():
        assert run.data.metrics[name] == value
    assert {"config.yaml", "metrics.json", "report.html"} <= {a.path for a in client.list_artifacts(first)}


def test_an_interrupted_run_is_killed_and_a_diverged_one_failed(server: RunServer, tmp_path: Path) -> None:
    stopped = tracked(tmp_path / "stopped", "task=reward")
    die = {"signal": signal.SIGTERM, "at": "train_batch_start", "step": 4}
    assert server.run(*stopped, die=die).code == 130
    _, (run,) = runs(tmp_path / "stopped")
    assert run.info.status == "KILLED" and run.info.end_time is not None
    wild = ("optimizer.lr=1e30", "trainer.gradient_clip=null", "schedule=constant")
    assert server.run(*tracked(tmp_path / "failed", "task=reward", *wild)).code == 2
    _, (run,) = runs(tmp_path / "failed")
    assert run.info.status == "FAILED"


@pytest.mark.slow
def test_a_run_interrupted_twice_ends_finished(server: RunServer, tmp_path: Path) -> None:
    overrides = tracked(tmp_path, "task=cost")
    for at, step in (("train_batch_start", 4), ("evaluated", 12)):
        assert server.run(*overrides, die={"signal": signal.SIGINT, "at": at, "step": step}).code == 130
        _, (run,) = runs(tmp_path)
        assert run.info.status == "KILLED"
    assert server.run(*overrides).code == 0
    _, (run,) = runs(tmp_path)
    assert run.info.status == "FINISHED" and run.info.run_id == status(only_run(tmp_path))["mlflow_run_id"]


@pytest.mark.slow
def test_killed_between_tracking_and_status(server: RunServer, tmp_path: Path) -> None:
    """The last moment at which anything can go wrong: all is written, the run is not called finished yet."""
    overrides = tracked(tmp_path, "task=reward")
    assert server.run(*overrides, die={"signal": KILL, "at": "exported"}).code == -KILL
    assert server.run(*overrides).code == 0
    _, (run,) = runs(tmp_path)
    assert run.info.status == "FINISHED" and status(only_run(tmp_path))["status"] == "finished"
