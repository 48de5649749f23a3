"""Checkpoints: atomic, without pickle, of everything trained and nothing else; generators to the number."""

from __future__ import annotations

import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import own, prepared, small, state
from torch import nn

from saferlhf.config.run_folder import RunFolder
from saferlhf.config.schema import CheckpointConfig
from saferlhf.errors import UserError
from saferlhf.run.stages import fit
from saferlhf.tracking.base import NullLogger
from saferlhf.training import checkpoint as module
from saferlhf.training.checkpoint import (
    AtomicCheckpointIO,
    RandomState,
    RunCheckpoint,
    checkpoint_path,
    checkpoint_step,
    discard_checkpoints,
    newest_checkpoint,
)


# ------------------------------------------------------------------------------------------------ files
def test_there_and_back(tmp_path: Path) -> None:
    held = {"a": torch.arange(5), "b": {"c": [1, 2.5, "d", None, True]}}
    path = tmp_path / "new" / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint(held, path)
    found = AtomicCheckpointIO().load_checkpoint(path)
    assert torch.equal(found["a"], held["a"]) and found["b"] == held["b"]
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(1)])
def test_broken_off_half_way_the_old_file_stays(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever breaks off arrives as itself, not as what torch makes of it while closing its archive."""
    path = tmp_path / "x.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": 1}, path)
    count = 0

    class Breaking(module._Writer):
        def write(self, data: Any) -> int:
            nonlocal count
            count += 1
            if count == 3:
                self.error = error
                raise error
            return super().write(data)

    monkeypatch.setattr(module, "_Writer", Breaking)
    with pytest.raises(type(error)):
        AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(100_000)}, path)
    assert AtomicCheckpointIO().load_checkpoint(path) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_file_with_code_in_it_is_refused(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.system, ("true",)

    torch.save({"a": Evil()}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="the checkpoint cannot be read"):
        AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt", weights_only=False)


def test_names_and_the_newest(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert newest_checkpoint(folder) is None
    folder.checkpoints.mkdir()
    for step in (9, 100, 20):
        checkpoint_path(folder, step).write_bytes(b"")
    (folder.checkpoints / ".step-00000200.ckpt.77").write_bytes(b"half")
    newest = newest_checkpoint(folder)
    assert newest is not None and checkpoint_step(newest) == 100
    discard_checkpoints(folder)
    assert newest_checkpoint(folder) is None


# ------------------------------------------------------------------------------------------------ random numbers
def draws() -> list[Any]:
    return [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(2).tolist()]


def test_generators_go_on_where_they_were(tmp_path: Path) -> None:
    random.gauss(0, 1)  # leaves a second value behind; so does NumPy's
    np.random.randn()
    AtomicCheckpointIO().save_checkpoint({"state": RandomState().state_dict()}, tmp_path / "x.ckpt")
    expected = [draws(), draws()]
    callback = RandomState()
    callback.load_state_dict(AtomicCheckpointIO().load_checkpoint(tmp_path / "x.ckpt")["state"])
    draws()
    callback.on_train_batch_start(None, None, None, 0)  # type: ignore[arg-type]
    assert [draws()] == expected[:1]
    callback.on_train_batch_start(None, None, None, 1)  # type: ignore[arg-type]
    assert [draws()] == expected[1:], "restored once, not at every step"


def test_a_state_saved_again_before_training_went_on_is_the_old_one() -> None:
    old = RandomState().state_dict()
    callback = RandomState()
    callback.load_state_dict(old)
    draws()
    assert callback.state_dict() is old


# ------------------------------------------------------------------------------------------------ when
class Recorder:
    """Stands for a trainer: its step, and what was saved."""

    def __init__(self) -> None:
        self.global_step, self.world_size, self.is_global_zero = 0, 1, True
        self.enable_validation, self.val_check_batch = False, None
        self.loggers = [SimpleNamespace(save=lambda: self.saved.append(-self.global_step))]
        self.saved: list[int] = []

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(checkpoint_step(path))
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")


def steps(saver: RunCheckpoint, count: int, seconds: list[float] | None = None) -> Recorder:
    trainer: Any = Recorder()
    saver.on_train_start(trainer, None)  # type: ignore[arg-type]
    for step in range(1, count + 1):
        trainer.global_step = step
        if seconds is not None:
            seconds[0] += 60
        saver.on_train_batch_end(trainer, None, None, None, 0)  # type: ignore[arg-type]
    return trainer


def test_by_steps_and_only_the_newest_are_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    saver = RunCheckpoint(folder, CheckpointConfig(every_steps=3, every_minutes=None, keep=2))
    trainer = steps(saver, 10)
    # before each state, what the loggers hold back is sent
    assert trainer.saved == [-3, 3, -6, 6, -9, 9]
    assert sorted(map(checkpoint_step, folder.checkpoints.iterdir())) == [6, 9]


def test_by_minutes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    saver = RunCheckpoint(RunFolder(tmp_path), CheckpointConfig(every_steps=None, every_minutes=3.0))
    assert [step for step in steps(saver, 10, now).saved if step > 0] == [3, 6, 9]


def test_a_state_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    saver = RunCheckpoint(folder, CheckpointConfig(every_steps=1), resumed=checkpoint_path(folder, 2))
    trainer: Any = Recorder()
    for step in (2, 2, 3, 3):
        trainer.global_step = step
        saver.save(trainer)
    assert trainer.saved == [-3, 3]


# ------------------------------------------------------------------------------------------------ what
def test_only_what_is_trained(tmp_path: Path) -> None:
    run = prepared(own(tmp_path, "task=reward", "trainer.max_steps=2", f"output_root={tmp_path}"))
    fit(run, NullLogger())
    held = state(run.folder.path)["state_dict"]
    trained = {name for name, p in run.task.named_parameters() if p.requires_grad}
    assert set(held) == trained and {"model.heads.score.weight", "model.heads.score.bias"} <= trained
    assert sum(v.numel() for v in held.values()) < 0.3 * sum(v.numel() for v in run.task.state_dict().values())


class WithBuffers(nn.Module):
    """A model with a running mean that training changes, and a buffer that is never saved."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("scratch", torch.zeros(1), persistent=False)
        self.trunk.requires_grad_(False)


def test_buffers_are_kept(tmp_path: Path) -> None:
    run = prepared(small("task=reward", f"output_root={tmp_path}"))
    run.task.build_model = WithBuffers
    run.task.configure_model()
    names = {f"model.norm.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
    assert run.task.trained_names() == names
    run.task.model.norm(torch.randn(8, 3) + 5)
    saved: dict[str, Any] = {"state_dict": run.task.state_dict()}
    run.task.on_save_checkpoint(saved)
    assert set(saved["state_dict"]) == names and saved["state_dict"]["model.norm.running_mean"].abs().max() > 0.1
    run.task.on_load_checkpoint(saved)
    del saved["state_dict"]["model.norm.running_var"]
    with pytest.raises(UserError, match=r"lacks 1 trained weights, such as model\.norm\.running_var"):
        run.task.on_load_checkpoint(saved)
