"""Heartbeats, lines and the bar."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_runs import config, prepared, small

from saferlhf.config.run_folder import RunFolder
from saferlhf.run.stages import fit
from saferlhf.run.trainer import micro_batch_size, total_steps, validation_interval
from saferlhf.tracking.base import NullLogger
from saferlhf.training import progress
from saferlhf.training.display import duration
from saferlhf.training.progress import RunProgress, resolve_mode


def test_a_heartbeat_a_second_with_the_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    folder, trainer = RunFolder(tmp_path), SimpleNamespace(global_step=10)
    beats: list[dict[str, Any]] = []
    monkeypatch.setattr(RunFolder, "update_status", lambda self, **values: beats.append(values))
    task = SimpleNamespace(
        last_stats={"loss": 0.5}, last_validation={"val/loss": 1.0, "val/reward/pair_accuracy": 0.75}
    )
    callback: Any = RunProgress(folder, "x", 100, "none")
    callback.on_train_start(trainer, task)
    for _ in range(90):
        now[0] += 0.4
        trainer.global_step += 1
        callback.on_train_batch_end(trainer, task, None, None, 0)
    # every third step at 0.4 s a step; the time left is measured from where this process began
    assert [beat["step"] for beat in beats] == [13 + 3 * k for k in range(30)]
    assert [beat["seconds_left"] for beat in beats] == pytest.approx([0.4 * (100 - beat["step"]) for beat in beats])
    assert beats[0]["note"] == "loss 0.5000, reward/pair_accuracy 0.750" and beats[0]["total_steps"] == 100


@pytest.mark.parametrize("mode", ["lines", "bar", "none"])
def test_what_is_shown(mode: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = prepared(small("task=reward", f"trainer.progress={mode}", f"output_root={tmp_path}"))
    fit(run, NullLogger())
    shown = capfd.readouterr().err
    assert ("step 12/12, loss" in shown) == (mode == "lines")
    assert ("reward (tiny on toyworld)" in shown) == (mode != "none")
    assert run.folder.status()["step"] == 12


def test_modes_and_durations() -> None:
    assert [resolve_mode(mode) for mode in ("bar", "lines", "none")] == ["bar", "lines", "none"]
    assert resolve_mode("auto") in ("bar", "lines")
    assert [duration(seconds) for seconds in (5, 75, 3700.9)] == ["0:05", "1:15", "1:01:40"]


def test_steps_and_sizes(tmp_path: Path) -> None:
    def with_trainer(*overrides: str) -> Any:
        return config(small("task=reward", f"output_root={tmp_path}", *overrides))

    # 20 rows, batches of 8: two epochs are five steps, a third of one is rounded up
    assert total_steps(with_trainer("trainer.max_steps=null", "trainer.epochs=2"), 20) == 5
    assert total_steps(with_trainer("trainer.max_steps=null", "trainer.epochs=0.3"), 20) == 1
    assert total_steps(with_trainer("trainer.max_steps=3", "trainer.epochs=2"), 20) == 3
    assert micro_batch_size(with_trainer("trainer.micro_batch_size=null")) == 8
    assert validation_interval(with_trainer("trainer.val_every_steps=null"), 10) == 3
    assert validation_interval(with_trainer("trainer.val_every_steps=50"), 10) == 10
