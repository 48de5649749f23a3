"""What goes wrong in a run is said in one true line, and what was on disk before stays whole."""

from __future__ import annotations

import errno
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import RunServer, assert_same, config, curves, only_run, own, prepared, small, state, status, weights

from saferlhf.errors import TrainingDiverged, UserError
from saferlhf.run import stages
from saferlhf.run.stages import fit
from saferlhf.run.train import train
from saferlhf.tracking.base import NullLogger

KILL = signal.SIGKILL


# ------------------------------------------------------------------------------------------------ divergence
@pytest.mark.parametrize("every", ["null", "1"])
def test_a_loss_that_is_not_finite_names_step_and_rows(every: str, server: RunServer, tmp_path: Path) -> None:
    wild = ("optimizer.lr=1e30", "trainer.gradient_clip=null", "schedule=constant", f"checkpoint.every_steps={every}")
    ended = server.run(*small("task=reward", *wild, f"output_root={tmp_path}"))
    assert ended.code == 2 and "Traceback" not in ended.output, ended.output
    line = ended.lines[-1]
    folder = only_run(tmp_path)
    saved = sorted(path.stem for path in folder.glob("checkpoints/*"))
    step = int(line.partition(" in step ")[2].split()[0])
    assert line.startswith("error: the ") and " became " in line and "lower optimizer.lr" in line and step >= 2
    # the rows named are rows of that step
    run = prepared(small("task=reward", *wild, f"output_root={tmp_path}"))
    loader, _ = stages._loaders(run)
    rows = [run.encoded.train.rows[i].id for i in loader.step_indices(step - 1)]
    named = line.partition("rows ")[2].partition(")")[0].split(", ")
    assert named and set(named) <= set(rows)
    # and what it says of the disk is so
    if every == "null":
        assert not saved and "no weights of this run are on disk" in line
    else:
        assert saved == [f"step-{step - 1:08d}"] and f"after step {step - 1} are in" in line
    assert status(folder)["status"] == "failed" and status(folder)["error"] in line
    assert not (folder / "export").exists() and not (folder / "metrics.json").exists()


def test_the_rows_of_the_very_micro_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One poisoned row among eight: its micro-batch is named and no other."""
    run = prepared(small("task=cost", f"output_root={tmp_path}"))
    run.task.configure_model()
    loader, _ = stages._loaders(run)
    micro = loader.step(1)[1]
    poisoned, loss_sum = micro.tokens.row_ids[0], run.task.loss_sum

    def poison(batch: Any) -> Any:
        loss, more = loss_sum(batch)
        return (loss * float("nan") if run.task.global_step == 1 and poisoned in batch.tokens.row_ids else loss), more

    monkeypatch.setattr(run.task, "loss_sum", poison)
    before: list[dict[str, torch.Tensor]] = []
    clip = run.task._clip
    monkeypatch.setattr(run.task, "_clip", lambda optimizer: (before.append(copy(run.task)), clip(optimizer))[1])
    with pytest.raises(TrainingDiverged) as caught:
        fit(run, NullLogger())
    assert "the loss became nan in step 2 of 12" in caught.value.what
    assert caught.value.where == "rows " + ", ".join(micro.tokens.row_ids[: len(micro)])
    assert_same(copy(run.task), before[1])  # the step was not taken


def test_a_gradient_that_is_not_finite_names_the_rows_of_the_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = prepared(small("task=sft", f"output_root={tmp_path}"))
    run.task.configure_model()
    monkeypatch.setattr(run.task, "_clip", lambda optimizer: torch.tensor(float("inf")))
    with pytest.raises(TrainingDiverged, match=r"gradient's norm became inf in step 1 of 12 \(in rows "):
        fit(run, NullLogger())


def copy(task: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in task.named_parameters()}


# ------------------------------------------------------------------------------------------------ the disk
def test_a_full_disk_while_saving(server: RunServer, tmp_path: Path) -> None:
    """The system refuses bytes beyond a limit; half-way through the checkpoint that is hit."""
    overrides = small("task=reward", f"output_root={tmp_path}")
    assert server.run(*overrides, die={"signal": KILL, "at": "train_batch_start", "step": 7}).code == -KILL
    folder = only_run(tmp_path)
    (before,) = folder.glob("checkpoints/*")
    held, size = before.read_bytes(), before.stat().st_size
    ended = server.run(*overrides, files_at_most=size // 2)
    assert ended.code == 2 and "Traceback" not in ended.output, ended.output
    assert ended.lines[-1].startswith("error: the checkpoint of step 9 could not be written: File too large")
    assert "make room; the same command goes on from step 6" in ended.lines[-1]
    assert [path.read_bytes() for path in (folder / "checkpoints").iterdir()] == [held]
    assert status(folder)["status"] == "failed" and "File too large" in status(folder)["error"]


@pytest.mark.parametrize("after", [0, 1000])
def test_no_space_left(after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ENOSPC at the first byte and half-way, on the first checkpoint."""
    from saferlhf.training import checkpoint

    class Full(checkpoint._Writer):
        written = 0

        def write(self, data: Any) -> int:
            if self.written + len(memoryview(data).cast("B")) > after:
                self.error = OSError(errno.ENOSPC, "No space left on device")
                raise self.error
            self.written += len(memoryview(data).cast("B"))
            return super().write(data)

    monkeypatch.setattr(checkpoint, "_Writer", Full)
    with pytest.raises(UserError) as caught:
        train(config(small("task=reward", f"output_root={tmp_path}")))
    assert caught.value.what == "the checkpoint of step 3 could not be written: No space left on device"
    assert caught.value.mend == "make room; the same command starts anew"
    assert not list((only_run(tmp_path) / "checkpoints").iterdir())


def test_a_full_disk_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "report.html")

    monkeypatch.setattr(stages, "export_run", full)
    with pytest.raises(UserError) as caught:
        train(config(small("task=reward", f"output_root={tmp_path}")))
    assert (caught.value.what, caught.value.where) == ("No space left on device", "report.html")
    assert caught.value.mend == "make room; the same command goes on from step 12"
    assert status(only_run(tmp_path))["status"] == "failed"


# ------------------------------------------------------------------------------------------------ other faults
def test_an_exception_marks_the_run_failed_and_frees_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_config = config(small("task=reward", f"output_root={tmp_path}"))

    def broken(*_: Any) -> None:
        raise RuntimeError("the machine is on fire")

    with monkeypatch.context() as patch:
        patch.setattr(stages, "evaluate_run", broken)
        with pytest.raises(RuntimeError, match="on fire"):
            train(run_config)
    folder = only_run(tmp_path)
    found = status(folder)
    assert (found["status"], found["error"], found["phase"]) == ("failed", "the machine is on fire", None)
    assert "RuntimeError: the machine is on fire" in (folder / "run.log").read_text()
    assert state(folder)["global_step"] == 12
    # the lock is free again; trained steps are not done twice
    train(run_config)
    assert status(folder)["status"] == "finished" and status(folder)["error"] is None
    assert [step for step, _ in curves(folder)["train/loss"]] == [3, 6, 9, 12]


def test_a_run_that_another_process_finished_meanwhile_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both asked for the status before either was done; the second got the lock when the first had ended."""
    from saferlhf.config.run_folder import RunFolder

    run_config = config(small("task=reward", "checkpoint.keep_when_finished=false", f"output_root={tmp_path}"))
    first = train(run_config)
    before = weights(first.folder)
    asked, ask = [], RunFolder.status
    monkeypatch.setattr(RunFolder, "status", lambda self: ask(self) if asked else asked.append(1) or {})
    monkeypatch.setattr(stages, "fit", lambda *_: pytest.fail("trained again"))
    assert train(run_config).metrics == first.metrics
    assert status(first.folder)["status"] == "finished" and asked
    assert_same(weights(first.folder), before)


def test_trouble_with_the_status_does_not_hide_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from saferlhf.config.run_folder import RunFolder

    def broken(*_: Any) -> None:
        raise RuntimeError("the reason")

    update = RunFolder.update_status

    def unwritable(self: RunFolder, **values: Any) -> None:
        if values.get("status") == "failed":
            raise OSError(errno.ENOSPC, "No space left on device")
        update(self, **values)

    monkeypatch.setattr(stages, "fit", broken)
    monkeypatch.setattr(RunFolder, "update_status", unwritable)
    with pytest.raises(RuntimeError, match="the reason"):
        train(config(small("task=reward", f"output_root={tmp_path}")))
    assert "could not be noted: [Errno 28]" in capsys.readouterr().err


def test_no_validation_rows(tmp_path: Path) -> None:
    overrides = own(tmp_path, "task=reward", "data.val_fraction=0", f"output_root={tmp_path / 'out'}")
    result = train(config(overrides))
    assert "test/reward/pair_accuracy" in result.metrics
    assert not any(name.startswith("val/") for name in [*result.metrics, *curves(result.folder)])
    assert weights(result.folder)
