"""Stopped after any step, gone on with new objects: the same weights, optimizer, generators and curves, bit by bit.

The same promise as in tests/run/test_resume.py without processes, so that every step can be tried.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from small_runs import STEPS, assert_same, curves, own, prepared, small, state

from saferlhf.run import stages
from saferlhf.run.stages import fit
from saferlhf.run.train import Interrupted
from saferlhf.tracking.base import NullLogger

End = tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, Any]]


class Signal(L.Callback):
    """Ctrl-C in the middle of a step, or of a validation."""

    def __init__(self, step: int, during_validation: bool = False) -> None:
        self.step, self.during_validation = step, during_validation

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if not self.during_validation and trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if self.during_validation and trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGINT)


def with_callback(callback: L.Callback) -> Callable[..., L.Trainer]:
    build = stages.build_trainer
    return lambda *args, callbacks, **kwargs: build(*args, callbacks=[callback, *callbacks], **kwargs)


def end_of(overrides: list[str], monkeypatch: pytest.MonkeyPatch, *stops: Signal) -> End:
    """Train with these interruptions one after the other, with new objects each time."""
    for stop in stops:
        with monkeypatch.context() as patch:
            patch.setattr(stages, "build_trainer", with_callback(stop))
            run = prepared(overrides)
            with pytest.raises(Interrupted, match=f"stopped by SIGINT after step {stop.step} of {STEPS}"):
                fit(run, NullLogger())
        assert state(run.folder.path)["global_step"] == stop.step
    run = prepared(overrides)
    fit(run, NullLogger())
    weights = {name: value.clone() for name, value in run.task.state_dict().items()}
    return weights, state(run.folder.path), curves(run.folder.path)


def assert_same_ends(one: End, other: End) -> None:
    assert_same(one[0], other[0], "weights")
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "running", "callbacks"):
        assert_same(one[1][key], other[1][key], key)
    assert_same(one[2], other[2], "curves")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., End]:
    """The end of a run that nothing disturbed."""
    made: dict[str, End] = {}

    def end(task: str) -> End:
        if task not in made:
            outputs = tmp_path_factory.mktemp(task)
            with pytest.MonkeyPatch.context() as patch:
                made[task] = end_of(small(f"task={task}", f"output_root={outputs}"), patch)
        return made[task]

    return end


# 20 rows in steps of 8: step 5 and 10 end an epoch; steps 3, 8 and 13 hold rows of two
@pytest.mark.parametrize(
    ("task", "step"),
    [("reward", step) for step in range(1, STEPS + 1)]
    + [(task, step) for task in ("sft", "cost") for step in (3, 5, 8)],
)
def test_stopped_after_any_step(
    task: str, step: int, whole: Callable[..., End], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = small(f"task={task}", "checkpoint.every_steps=null", f"output_root={tmp_path}")
    assert_same_ends(end_of(overrides, monkeypatch, Signal(step)), whole(task))


@pytest.mark.parametrize("step", [8, 12])
def test_stopped_during_validation(
    step: int, whole: Callable[..., End], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = small("task=cost", f"output_root={tmp_path}")
    assert_same_ends(end_of(overrides, monkeypatch, Signal(step, during_validation=True)), whole("cost"))


def test_stopped_again_and_again(whole: Callable[..., End], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = small("task=sft", f"output_root={tmp_path}")
    stops = [Signal(1), Signal(2), Signal(4, during_validation=True), Signal(5), Signal(12)]
    assert_same_ends(end_of(overrides, monkeypatch, *stops), whole("sft"))


@pytest.mark.parametrize("task", ["sft", "cost"])
def test_with_dropout_and_checkpointed_activations(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = own(tmp_path, f"task={task}", "backbone.gradient_checkpointing=true")
    once = end_of([*overrides, f"output_root={tmp_path / 'once'}"], monkeypatch)
    twice = end_of([*overrides, f"output_root={tmp_path / 'twice'}"], monkeypatch, Signal(5), Signal(8))
    assert_same_ends(twice, once)
    # the frozen base is not in the file
    assert not any("embed" in name or "base_layer" in name for name in twice[1]["state_dict"])


def test_with_a_4_bit_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Packed anew at every start, validated in between: the same steps."""
    overrides = own(tmp_path, "task=reward", "quantization=nf4")
    once = end_of([*overrides, f"output_root={tmp_path / 'once'}"], monkeypatch)
    twice = end_of([*overrides, f"output_root={tmp_path / 'twice'}"], monkeypatch, Signal(5), Signal(9))
    assert_same(twice[1]["state_dict"], once[1]["state_dict"], "trained")
    assert_same_ends(twice, once)


@pytest.mark.parametrize("interval", [5, 12])
def test_whatever_the_validation_interval(interval: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5: the last step is no validation step."""
    overrides = small("task=reward", f"trainer.val_every_steps={interval}")
    once = end_of([*overrides, f"output_root={tmp_path / 'once'}"], monkeypatch)
    stops = [Signal(interval), *([] if interval == STEPS else [Signal(STEPS)])]
    twice = end_of([*overrides, f"output_root={tmp_path / 'twice'}"], monkeypatch, *stops)
    assert_same_ends(twice, once)
    assert [step for step, _ in once[2]["val/loss"]] == list(range(interval, STEPS + 1, interval))


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_validating_often_changes_no_weight(quantization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither modes, generators nor packed weights are other ones after a validation."""
    overrides = own(tmp_path, "task=reward", f"quantization={quantization}")
    ends = []
    for interval in (1, STEPS):
        changed = [o for o in overrides if not o.startswith("trainer.val_every_steps")]
        changed += [f"trainer.val_every_steps={interval}", f"output_root={tmp_path / str(interval)}"]
        ends.append(end_of(changed, monkeypatch))
    assert len(ends[0][2]["val/loss"]) == STEPS and len(ends[1][2]["val/loss"]) == 1
    for key in ("state_dict", "optimizer_states", "callbacks"):
        assert_same(ends[0][1][key], ends[1][1][key], key)
    assert ends[0][2]["val/loss"][-1] == ends[1][2]["val/loss"][-1]
