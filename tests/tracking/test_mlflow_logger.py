"""The logger of a run against a sqlite store: what was logged is read back through MLflow's own client."""

from __future__ import annotations

import inspect
import json
import logging
import math
import random
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

from saferlhf.config.schema import TrackingConfig
from saferlhf.tracking import mlflow_logger as module
from saferlhf.tracking.base import NullLogger, SplitInfo, TrackingLogger
from saferlhf.tracking.mlflow_logger import MLflowLogger, build_logger
from saferlhf.tracking.records import BACKLOG
from saferlhf.tracking.store import connect


class Bench:
    """Builds loggers for one run folder and reads the store."""

    def __init__(self, outputs: Path) -> None:
        self.outputs, self.folder = outputs, outputs / "reward" / "0123456789"
        self.folder.mkdir(parents=True)
        self.client = connect(f"sqlite:///{outputs}/mlflow.db")
        self.open: list[TrackingLogger] = []

    def logger(self, resume: str | None = None, tags: dict[str, Any] | None = None, **changes: Any) -> MLflowLogger:
        cfg = TrackingConfig(name="mlflow", **{"system_metrics": False, **changes})
        logger = build_logger(
            cfg,
            output_root=self.outputs,
            run_folder=self.folder,
            run_name="reward/0123456789",
            identity="0123456789",
            tags=tags,
            resume_run_id=resume,
        )
        assert isinstance(logger, MLflowLogger)
        self.open.append(logger)
        return logger

    def run(self, logger: TrackingLogger) -> Any:
        return self.client.get_run(logger.run_id)

    def history(self, logger: TrackingLogger, key: str) -> list[tuple[int, float]]:
        return [(point.step, point.value) for point in self.client.get_metric_history(logger.run_id, key)]

    def text(self, logger: TrackingLogger, artifact: str) -> str:
        return Path(self.client.download_artifacts(logger.run_id, artifact)).read_text()


@pytest.fixture
def bench(empty_store: Path) -> Iterator[Bench]:
    bench = Bench(empty_store)
    yield bench
    for logger in bench.open:
        logger.finish()


# ------------------------------------------------------------------------------------------------ what is kept
def test_a_run_from_start_to_end(bench: Bench) -> None:
    logger = bench.logger(tags={"task": "reward", "data": "toyworld", "nothing": None})
    assert bench.run(logger).info.status == "RUNNING"
    logger.finish("FINISHED")
    logger.finish("FAILED")  # the first end counts
    run = bench.run(logger)
    assert run.info.status == "FINISHED" and run.info.end_time >= run.info.start_time
    assert run.info.run_name == "reward/0123456789"
    tags = run.data.tags
    assert tags["task"] == "reward" and tags["data"] == "toyworld" and "nothing" not in tags
    assert tags["run_identity"] == "0123456789"
    assert Path(tags["run_folder"]) == bench.folder and Path(tags["export_folder"]) == bench.folder / "export"
    assert logger.version == logger.run_id and logger.name == "saferlhf"
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(bench.outputs / "mlartifacts")


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_statuses(bench: Bench, status: Any) -> None:
    logger = bench.logger()
    logger.finish(status)
    assert bench.run(logger).info.status == status


def test_a_run_whose_id_nobody_lived_to_note_is_found_again(bench: Bench) -> None:
    first = bench.logger()  # and the process is killed
    note = bench.folder / module.TOKEN
    note.write_text(f"{note.read_text().split()[0]} 1")
    second = bench.logger()
    assert second.run_id == first.run_id
    second.log_hyperparams({"a": 1})
    third = bench.logger()
    assert third.run_id != first.run_id, "who has logged has noted the id before: no resuming means a new run"
    third.finish()
    assert not note.exists()
    note.write_text("killedbeforethestoremadearun 1")
    assert bench.logger().run_id not in (first.run_id, third.run_id)


def test_params_are_flat_and_whole(bench: Bench) -> None:
    long = "word " * 3000
    config = {"task": {"name": "reward", "margin": 0.5, "on": True, "none": None}, "targets": ["a", "b"], "long": long}
    logger = bench.logger()
    logger.log_hyperparams(OmegaConf.create(config))
    params = bench.run(logger).data.params
    assert params["task.name"] == "reward"
    assert params["task.margin"] == "0.5"
    assert params["task.on"] == "true"
    assert params["task.none"] == "null"
    assert params["targets"] == '["a", "b"]'
    assert len(params["long"]) == 6000 and params["long"].endswith("[cut; whole in config.yaml]")
    assert yaml.safe_load(bench.text(logger, "config.yaml")) == config


def test_more_params_than_one_call_takes(bench: Bench) -> None:
    logger = bench.logger()
    logger.log_hyperparams({f"key{i}": i for i in range(250)})
    params = bench.run(logger).data.params
    assert {name: int(value) for name, value in params.items()} == {f"key{i}": i for i in range(250)}


def test_metrics_keep_their_steps_and_names(bench: Bench) -> None:
    logger = bench.logger()
    for step in range(1, 4):
        logger.log_metrics({"val/reward/pair_accuracy": torch.tensor(step / 4), "train/loss": 1 / step}, step)
    logger.log_metrics({"odd@name": 1, "not_a_number": math.nan})
    assert bench.history(logger, "train/loss") == []  # buffered
    logger.flush()
    assert bench.history(logger, "val/reward/pair_accuracy") == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert bench.history(logger, "train/loss") == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert bench.history(logger, "odd_name") == [(0, 1.0)]
    assert math.isnan(bench.history(logger, "not_a_number")[0][1])


def test_many_points_are_sent_in_few_calls(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = bench.logger()
    sizes: list[int] = []
    whole = logger._client.log_batch

    def counted(run_id: str, metrics: Any = (), **more: Any) -> Any:
        sizes.append(len(metrics))
        return whole(run_id, metrics, **more)

    monkeypatch.setattr(logger._client, "log_batch", counted)
    monkeypatch.setattr(module, "FLUSH_SECONDS", 1e9)
    for step in range(2500):
        logger.log_metrics({"train/loss": step}, step)
    logger.finish()
    assert [size for size in sizes if size] == [1000, 1000, 500]
    assert len(bench.history(logger, "train/loss")) == 2500


def test_metrics_are_sent_after_some_seconds(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = bench.logger()
    monkeypatch.setattr(module, "FLUSH_SECONDS", 0.0)
    time.sleep(0.01)
    logger.log_metrics({"train/loss": 2.0}, 1)
    assert bench.history(logger, "train/loss") == [(1, 2.0)]


def test_artifacts(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "card.md").write_text("card")
    (tmp_path / "metrics.json").write_text("{}")
    logger = bench.logger()
    logger.log_artifact(tmp_path / "metrics.json")
    logger.log_artifact(tmp_path / "folder", "export")
    logger.log_text("täxt", "notes/a.txt")
    logger.log_dict({"b": 1, "a": [None, 2.5]}, "numbers.json")
    assert bench.text(logger, "metrics.json") == "{}"
    assert bench.text(logger, "export/inner/card.md") == "card"
    assert bench.text(logger, "notes/a.txt") == "täxt"
    assert json.loads(bench.text(logger, "numbers.json")) == {"b": 1, "a": [None, 2.5]}
    with pytest.raises(FileNotFoundError):
        logger.log_artifact(tmp_path / "absent.txt")


SPLITS = [
    SplitInfo(split, "toyworld", f"{letter}" * 64, rows, "toyworld")
    for split, letter, rows in (("train", "a", 900), ("val", "b", 50), ("test", "c", 50))
]


def test_datasets_are_inputs_with_their_split(bench: Bench) -> None:
    logger = bench.logger()
    logger.log_datasets(SPLITS)
    logger.log_datasets(SPLITS)  # as a resumed run does
    inputs = bench.run(logger).inputs.dataset_inputs
    found = {i.tags[0].value: (i.dataset.name, i.dataset.digest, json.loads(i.dataset.profile)) for i in inputs}
    assert len(inputs) == 3
    assert found["train"] == ("toyworld", "a" * 36, {"num_rows": 900, "fingerprint": "a" * 64})
    assert set(found) == {"train", "val", "test"}


def test_parent_and_child(bench: Bench) -> None:
    parent = bench.logger(run_name="quickstart")
    child = bench.logger(parent_run_id=parent.run_id)
    assert bench.run(parent).info.run_name == "quickstart"
    experiment = bench.run(parent).info.experiment_id
    children = bench.client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.run_id}'")
    assert [run.info.run_id for run in children] == [child.run_id]
    child.finish()
    assert bench.run(parent).info.status == "RUNNING"


def test_the_registry_is_optional(bench: Bench) -> None:
    export = bench.folder / "export"
    export.mkdir()
    (export / "saferlhf.json").write_text('{"kind": "reward"}')
    bench.logger().register_model(export)
    assert list(bench.client.search_registered_models()) == []
    for expected in ("1", "2"):
        logger = bench.logger(register_model="toy-reward")
        logger.register_model(export, {"kind": "reward"})
        version = bench.client.get_model_version("toy-reward", expected)
        assert version.run_id == logger.run_id and version.tags == {"kind": "reward"}
        assert bench.text(logger, "export/saferlhf.json") == '{"kind": "reward"}'
        assert version.source.endswith(f"{logger.run_id}/artifacts/export")


def test_system_metrics_run_and_stop(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SYSTEM_METRICS_SECONDS", 0.1)
    logger = bench.logger(system_metrics=True)
    key, deadline = "system/cpu_utilization_percentage", time.monotonic() + 20
    while time.monotonic() < deadline and not bench.run(logger).data.metrics.get(key):
        time.sleep(0.1)
    logger.finish()
    assert key in bench.run(logger).data.metrics
    assert "system/system_memory_usage_megabytes" in bench.run(logger).data.metrics
    assert not [thread for thread in threading.enumerate() if thread.name == "SystemMetricsMonitor"]


# ------------------------------------------------------------------------------------------------ resuming
def test_resume_continues_the_same_run(bench: Bench) -> None:
    first = bench.logger()
    first.log_hyperparams({"seed": 1, "trainer": {"devices": 1}})
    first.log_metrics({"test/loss": 9.0})
    for step in (1, 2, 3):
        first.log_metrics({"train/loss": float(step)}, step)
    first.finish("KILLED")
    second = bench.logger(resume=first.run_id)
    assert second.run_id == first.run_id
    assert bench.run(second).info.status == "RUNNING"
    second.log_hyperparams({"seed": 1, "trainer": {"devices": 2}, "new": "x"})
    # the checkpoint was written at step 1: steps 2 and 3 come again
    for step in (2, 3, 4, 5):
        second.log_metrics({"train/loss": float(step)}, step)
    second.log_metrics({"test/loss": 8.0})
    second.finish()
    run = bench.run(second)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"seed": "1", "trainer.devices": "1", "new": "x"}
    assert run.data.tags["changed.trainer.devices"] == "2" and "changed.seed" not in run.data.tags
    assert bench.history(second, "train/loss") == [(step, float(step)) for step in (1, 2, 3, 4, 5)]
    assert run.data.metrics["test/loss"] == 8.0


@pytest.mark.parametrize("how", ["never there", "deleted"])
def test_resume_of_a_run_the_store_has_no_more(bench: Bench, caplog: pytest.LogCaptureFixture, how: str) -> None:
    gone = "0" * 32
    if how == "deleted":
        gone = str(bench.logger().run_id)
        bench.client.delete_run(gone)
    with caplog.at_level(logging.WARNING, "saferlhf.tracking"):
        logger = bench.logger(resume=gone)
    assert logger.run_id != gone
    assert [record for record in caplog.messages if gone in record and "new one is started" in record]
    if how == "deleted":
        bench.open[0]._finished = True  # type: ignore[attr-defined]


# ------------------------------------------------------------------------------------------------ a lost store
class Gone(ConnectionError):
    pass


def cut_off(logger: MLflowLogger, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise Gone("connection refused by http://me:secret@runs.example")

    for name in ("log_batch", "log_text", "log_artifact", "log_inputs", "set_terminated", "update_run"):
        monkeypatch.setattr(logger._client, name, fail)


def test_a_lost_store_does_not_stop_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = bench.logger()
    with caplog.at_level(logging.WARNING, "saferlhf.tracking"), monkeypatch.context() as patch:
        cut_off(logger, patch)
        for step in (1, 2, 3):
            logger.log_metrics({"train/loss": float(step)}, step)
            logger.flush()
        logger.log_metrics({"not_a_number": math.inf}, 3)
        logger.set_tags({"late": "yes"})
        logger.log_datasets(SPLITS)
        logger.log_text("kept", "kept.txt")
        logger.finish("FAILED")
    lost = [message for message in caplog.messages if "is lost" in message]
    assert len(lost) == 1 and BACKLOG in lost[0]
    assert "waits in" in caplog.messages[-1] and str(bench.folder / BACKLOG) in caplog.messages[-1]
    assert "secret" not in caplog.text
    assert bench.history(logger, "train/loss") == [] and bench.run(logger).info.status == "RUNNING"

    with (bench.folder / BACKLOG).open("a") as file:
        file.write('{"run_id": "cut off by a ki')
    again = bench.logger(resume=logger.run_id)
    assert not (bench.folder / BACKLOG).exists()
    assert bench.run(again).info.status == "RUNNING"  # the old end does not overwrite the new beginning
    again.log_metrics({"train/loss": 3.0}, 3)
    again.finish()
    assert bench.history(again, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert bench.history(again, "not_a_number")[0][1] >= 1e300
    assert bench.run(again).data.tags["late"] == "yes"
    assert bench.text(again, "kept.txt") == "kept"
    assert len(bench.run(again).inputs.dataset_inputs) == 3


def test_a_store_that_comes_back_gets_everything_in_order(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    logger = bench.logger()
    with monkeypatch.context() as patch:
        cut_off(logger, patch)
        logger.log_metrics({"train/loss": 1.0}, 1)
        logger.flush()
        logger.set_tags({"state": "first"})
    logger.set_tags({"state": "second"})
    assert "state" not in bench.run(logger).data.tags  # not asked again at once
    logger._next_try = 0.0
    with caplog.at_level(logging.WARNING, "saferlhf.tracking"):
        logger.log_metrics({"train/loss": 2.0}, 2)
        logger.flush()
    assert "is back" in caplog.text
    assert bench.history(logger, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert bench.run(logger).data.tags["state"] == "second"
    assert not (bench.folder / BACKLOG).exists()


def test_what_the_store_refuses_is_named_and_dropped(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    logger = bench.logger()
    logger.log_hyperparams({"seed": 1})
    logger._known_params.clear()
    with caplog.at_level(logging.WARNING, "saferlhf.tracking"):
        logger.log_hyperparams({"seed": 2})
    assert "does not take params" in caplog.text and "is lost" not in caplog.text
    assert not (bench.folder / BACKLOG).exists()
    logger.finish()
    assert bench.run(logger).info.status == "FINISHED"


def test_logging_leaves_the_random_generators_alone(bench: Bench) -> None:
    random.seed(3)
    torch.manual_seed(3)
    states = random.getstate(), torch.get_rng_state()
    logger = bench.logger()
    logger.log_hyperparams({"a": 1})
    logger.log_metrics({"x": 1.0}, 1)
    logger.log_text("t", "t.txt")
    logger.finish()
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


# ------------------------------------------------------------------------------------------------ the interface
def public(cls: type) -> dict[str, Any]:
    names = [name for name in dir(TrackingLogger) if not name.startswith("_")]
    return {name: inspect.getattr_static(cls, name) for name in names}


def test_the_null_logger_has_the_same_interface() -> None:
    real, null = public(MLflowLogger), public(NullLogger)
    assert {"run_id", "finish", "log_datasets", "register_model", "log_metrics"} <= set(real)
    for name in real:
        assert type(real[name]) is type(null[name]), name
        if inspect.isfunction(real[name]):
            mine, theirs = inspect.signature(real[name]).parameters, inspect.signature(null[name]).parameters
            assert list(mine) == list(theirs), name
            assert [p.default for p in mine.values()] == [p.default for p in theirs.values()], name
    extra = {name for name in vars(MLflowLogger) if not name.startswith("_")} - set(real)
    assert extra <= {"save_dir"}, f"what one logger can do, the other must take: {extra}"


def test_no_tracking_keeps_nothing(tmp_outputs: Path, tmp_path: Path) -> None:
    cfg = TrackingConfig(name="none", register_model="m")
    logger = build_logger(cfg, output_root=tmp_outputs, run_folder=tmp_outputs, run_name="r", identity="i")
    assert isinstance(logger, NullLogger) and logger.run_id is None
    logger.log_hyperparams({"a": 1})
    logger.log_metrics({"a": 1.0}, 1)
    logger.log_datasets(SPLITS)
    logger.log_artifact(tmp_path / "absent")
    logger.register_model(tmp_path)
    logger.finalize("success")
    logger.finish("FAILED")
    assert list(tmp_outputs.iterdir()) == []


def test_only_the_first_process_tracks(tmp_outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.rank_zero_only, "rank", 1, raising=False)
    cfg = TrackingConfig(name="mlflow")
    logger = build_logger(cfg, output_root=tmp_outputs, run_folder=tmp_outputs, run_name="r", identity="i")
    assert isinstance(logger, NullLogger)
    assert list(tmp_outputs.iterdir()) == []


def test_under_lightning_the_run_outlives_fit(bench: Bench, tmp_path: Path) -> None:
    from lightning.pytorch import LightningModule, Trainer

    class Line(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss = self.layer(batch).square().mean()
            self.log("train/loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    logger = bench.logger()
    trainer = Trainer(
        max_steps=4, logger=logger, log_every_n_steps=2, accelerator="cpu", default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Line(), torch.utils.data.DataLoader(torch.ones(8, 1), batch_size=1))
    assert [step for step, _ in bench.history(logger, "train/loss")] == [1, 3]
    assert bench.run(logger).info.status == "RUNNING"


@pytest.mark.slow
def test_a_real_server_killed_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tracking server over HTTP dies and comes back; in between the run goes on within seconds."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    code = textwrap.dedent(f"""
        import sys
        from mlflow.cli import cli
        cli(["server", "--port", "{port}", "--workers", "1", "--backend-store-uri", "sqlite:///{tmp_path}/s.db",
             "--artifacts-destination", "{tmp_path}/artefacts"])
    """)

    def serve() -> subprocess.Popen[bytes]:
        import requests

        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            try:
                requests.get(uri + "/health", timeout=1)
                return process
            except requests.RequestException:
                time.sleep(0.5)
        raise AssertionError("the server did not start")

    def stop(process: subprocess.Popen[bytes]) -> None:
        import os
        import signal

        os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    server = serve()
    try:
        folder = tmp_path / "run"
        logger = build_logger(
            TrackingConfig(name="mlflow", uri=uri, system_metrics=False, register_model="served"),
            output_root=tmp_path, run_folder=folder, run_name="r", identity="i",
        )  # fmt: skip
        assert isinstance(logger, MLflowLogger)
        logger.log_metrics({"train/loss": 1.0}, 1)
        logger.flush()
        stop(server)
        begun = time.monotonic()
        logger.log_metrics({"train/loss": 2.0}, 2)
        logger.flush()
        assert time.monotonic() - begun < 30
        assert (folder / BACKLOG).exists()
        server = serve()
        logger._next_try = 0.0
        (folder / "export").mkdir()
        (folder / "export" / "saferlhf.json").write_text("{}")
        logger.register_model(folder / "export")
        logger.finish()
        client = connect(uri)
        assert client.get_run(logger.run_id).info.status == "FINISHED"
        assert [p.value for p in client.get_metric_history(logger.run_id, "train/loss")] == [1.0, 2.0]
        assert client.get_model_version("served", "1").run_id == logger.run_id
        assert not (folder / BACKLOG).exists()
    finally:
        stop(server)
