"""SIGKILL at any moment, the same command again, and the end is the same to the last bit.

An epoch of the small runs is 20 rows, a step 8: step 5 ends an epoch, every other epoch ends in the middle of a step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import (
    ALL_TASKS,
    STEPS,
    TASKS,
    RunServer,
    assert_same_end,
    curves,
    metrics,
    only_run,
    own,
    small,
    state,
    status,
    weights,
)

from saferlhf.config.files import write_json

KILL = signal.SIGKILL
Reference = Callable[..., Path]


@pytest.fixture(scope="module")
def uninterrupted(server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Folder of a run that nothing disturbed; each is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def run(*overrides: str) -> Path:
        if overrides not in made:
            outputs = tmp_path_factory.mktemp("uninterrupted")
            ended = server.run(*small(*overrides, f"output_root={outputs}"))
            assert ended.code == 0, ended.output
            made[overrides] = only_run(outputs)
        return made[overrides]

    return run


def killed_and_resumed(
    server: RunServer, outputs: Path, overrides: list[str], *deaths: tuple[str, int], resumes_at: int | None = None
) -> Path:
    """The folder of a run killed at each of the moments in turn, then left alone."""
    for at, step in deaths:
        ended = server.run(*small(*overrides, f"output_root={outputs}"), die={"signal": KILL, "at": at, "step": step})
        assert ended.code == -KILL, ended.output
        folder = only_run(outputs)
        assert status(folder)["status"] == "running"  # nobody was left to say otherwise
    ended = server.run(*small(*overrides, f"output_root={outputs}"))
    assert ended.code == 0, ended.output
    if resumes_at is not None:
        assert f"step-{resumes_at:08d}.ckpt" in ended.output if resumes_at else "going on" not in ended.output
    return only_run(outputs)


@pytest.mark.parametrize("task", ALL_TASKS)
def test_killed_in_the_middle_of_an_epoch(
    task: str, server: RunServer, uninterrupted: Reference, tmp_path: Path
) -> None:
    overrides = [f"task={task}"]
    folder = killed_and_resumed(server, tmp_path, overrides, ("train_batch_start", 7), resumes_at=6)
    whole = uninterrupted(*overrides)
    assert_same_end(folder, whole)
    assert folder.name == whole.name


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_killed_at_the_border_of_two_epochs(
    task: str, server: RunServer, uninterrupted: Reference, tmp_path: Path
) -> None:
    overrides = [f"task={task}"]
    at_border = [*overrides, "checkpoint.every_steps=5"]
    folder = killed_and_resumed(server, tmp_path, at_border, ("train_batch_start", 5), resumes_at=5)
    assert_same_end(folder, uninterrupted(*overrides))


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_killed_with_an_adapter_and_dropout(task: str, server: RunServer, tmp_path: Path) -> None:
    """Dropout draws from the generators whose state has to come back; only trained weights are saved."""
    overrides = own(tmp_path, f"task={task}")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert server.run(*overrides, f"output_root={whole}").code == 0
    die = {"signal": KILL, "at": "train_batch_start", "step": 7}
    assert server.run(*overrides, f"output_root={killed}", die=die).code == -KILL
    ended = server.run(*overrides, f"output_root={killed}")
    assert ended.code == 0 and "going on from" in ended.output
    assert_same_end(only_run(killed), only_run(whole))
    names = set(state(only_run(whole))["state_dict"])
    trained = ("lora_A", "lora_B") if task == "sft" else ("lora_A", "lora_B", "heads.score")
    assert names and all(any(part in name for part in trained) for name in names)


MOMENTS = [
    ("train_batch_start", 2, 3, 0),  # before anything was saved: the run starts anew
    ("train_batch_end", 8, 4, 4),  # a step was done and not saved yet
    ("validation", 8, 4, 8),  # saved at 8, validation of step 8 not done
    ("validation", 12, 4, 12),  # the same at the very end
    ("saving", 6, 3, 3),  # half a file
    ("saved", 6, 3, 6),
    ("saved", 12, 3, 12),  # the last step's state, before validation
    ("fitted", 12, 3, 12),
    ("evaluated", 12, 5, 12),  # the state at the end is saved whatever is due
    ("exported", 12, 3, 12),
]
TASK_MATTERS = ("train_batch_end", "validation", "saving", "evaluated")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "at", "step", "every", "resumes_at"),
    [(t, *moment) for t in TASKS for moment in MOMENTS if t == "reward" or moment[0] in TASK_MATTERS],
)
def test_killed_at_any_other_moment(
    task: str,
    at: str,
    step: int,
    every: int,
    resumes_at: int,
    server: RunServer,
    uninterrupted: Reference,
    tmp_path: Path,
) -> None:
    overrides = [f"task={task}"]
    changed = [*overrides, f"checkpoint.every_steps={every}"]
    folder = killed_and_resumed(server, tmp_path, changed, (at, step), resumes_at=resumes_at)
    assert_same_end(folder, uninterrupted(*overrides))
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"], "leftovers of the killed process"


@pytest.mark.slow
def test_the_phase_of_the_dead_process_is_not_that_of_the_next(server: RunServer, tmp_path: Path) -> None:
    """A pipeline shows it: `exporting` while the next process is loading would be wrong."""
    overrides = small("task=reward", f"output_root={tmp_path}")
    assert server.run(*overrides, die={"signal": KILL, "at": "exported"}).code == -KILL
    folder = only_run(tmp_path)
    assert status(folder)["phase"] == "exporting"
    assert server.run(*overrides, die={"signal": KILL, "at": "fitted"}).code == -KILL
    assert status(folder)["phase"] is None and status(folder)["status"] == "running"


@pytest.mark.slow
def test_killed_during_validation(server: RunServer, uninterrupted: Reference, tmp_path: Path) -> None:
    overrides = ["task=reward"]
    changed = [*overrides, "checkpoint.every_steps=4"]
    folder = killed_and_resumed(server, tmp_path, changed, ("validation", 8), resumes_at=8)
    assert_same_end(folder, uninterrupted(*overrides))
    # the validation that was cut short was made up for
    assert [step for step, _ in curves(folder)["val/reward/pair_accuracy"]] == [4, 8, 12]


@pytest.mark.slow
def test_killed_again_and_again(server: RunServer, uninterrupted: Reference, tmp_path: Path) -> None:
    overrides = ["task=cost"]
    changed = [*overrides, "checkpoint.every_steps=2"]
    deaths = [("train_batch_start", 3), ("saving", 4), ("validation", 4), ("train_batch_end", 9), ("evaluated", 12)]
    folder = killed_and_resumed(server, tmp_path, changed, *deaths, resumes_at=12)
    assert_same_end(folder, uninterrupted(*overrides))


@pytest.mark.slow
@pytest.mark.parametrize("rows", [16, 24, 25])
def test_epochs_that_end_with_a_step_or_within_one(
    rows: int, server: RunServer, uninterrupted: Reference, tmp_path: Path
) -> None:
    """16 and 24 rows: every epoch ends with a step. 25: none does within the run."""
    overrides = ["task=reward", f"data.train_rows={rows}"]
    folder = killed_and_resumed(
        server, tmp_path, overrides, ("train_batch_start", 4), ("train_batch_start", 6), resumes_at=6
    )
    assert_same_end(folder, uninterrupted(*overrides))


def test_a_finished_run_is_left_as_it_is(server: RunServer, uninterrupted: Reference) -> None:
    whole = uninterrupted("task=reward")
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    ended = server.run(*small("task=reward", f"output_root={whole.parent.parent}"))
    assert ended.code == 0 and "finished before" in ended.output
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_checkpoints_are_dropped_when_finished_and_only_then(server: RunServer, tmp_path: Path) -> None:
    keeping = ("checkpoint.keep_when_finished=false", "checkpoint.keep=2")
    overrides = small("task=reward", *keeping, f"output_root={tmp_path}")
    ended = server.run(*overrides, die={"signal": KILL, "at": "exported"})
    assert ended.code == -KILL
    folder = only_run(tmp_path)
    assert sorted(p.name for p in folder.glob("checkpoints/*")) == ["step-00000009.ckpt", "step-00000012.ckpt"]
    # export and metrics are there, and the run is still not called finished
    assert metrics(folder) and weights(folder) and status(folder)["status"] == "running"
    assert server.run(*overrides).code == 0
    assert not list(folder.glob("checkpoints/*")) and status(folder)["status"] == "finished"


def test_the_time_of_training_is_that_of_all_its_processes(server: RunServer, tmp_path: Path) -> None:
    overrides = small("task=reward", f"output_root={tmp_path}")
    assert server.run(*overrides, die={"signal": KILL, "at": "train_batch_start", "step": 7}).code == -KILL
    folder = only_run(tmp_path)
    trained = status(folder)["trained_s"]
    assert trained >= 0
    write_json(folder / "status.json", {**status(folder), "trained_s": trained + 500.0})
    assert server.run(*overrides).code == 0
    assert 500 < json.loads((folder / "metrics.json").read_text())["train/seconds"] < 600
    assert 500 < status(folder)["trained_s"] < 600


@pytest.mark.slow
def test_a_plain_command_killed_from_outside(tmp_path: Path, project_root: Path) -> None:
    """No test code inside the process: started as a user does, killed once a checkpoint is seen."""

    def start(outputs: Path) -> subprocess.Popen[bytes]:
        command = [sys.executable, "train.py", *small("task=reward", f"output_root={outputs}")]
        return subprocess.Popen(command, cwd=project_root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole).wait(200) == 0
    process, until = start(killed), time.monotonic() + 120
    while not list(killed.glob("*/*/checkpoints/step-*.ckpt")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.001)
    os.kill(process.pid, KILL)
    assert process.wait() == -KILL
    folder = only_run(killed)
    assert status(folder)["status"] == "running" and state(folder)["global_step"] < STEPS
    assert start(killed).wait(200) == 0
    assert_same_end(folder, only_run(whole))


# ------------------------------------------------------------------------------------------------ what is refused
def test_a_checkpoint_that_lacks_a_trained_weight_or_its_end_is_refused(server: RunServer, tmp_path: Path) -> None:
    overrides = small("task=reward", f"output_root={tmp_path}")
    assert server.run(*overrides, die={"signal": KILL, "at": "train_batch_start", "step": 7}).code == -KILL
    folder = only_run(tmp_path)
    (path,) = folder.glob("checkpoints/*.ckpt")
    whole = torch.load(path, weights_only=True)
    name = "model.heads.score.bias"
    assert whole["state_dict"].pop(name) is not None
    torch.save(whole, path)
    ended = server.run(*overrides)
    assert ended.code == 2 and "Traceback" not in ended.output
    assert ended.lines[-1].startswith("error: the checkpoint lacks 1 trained weights") and name in ended.lines[-1]
    assert status(folder)["status"] == "failed" and "lacks" in status(folder)["error"]
    # a damaged file is another line
    path.write_bytes(path.read_bytes()[:1000])
    ended = server.run(*overrides)
    assert ended.code == 2 and "Traceback" not in ended.output
    assert "cannot be read" in ended.lines[-1] and str(path) in ended.lines[-1] and "delete it" in ended.lines[-1]


def test_two_processes_do_not_share_a_run(server: RunServer, tmp_path: Path) -> None:
    overrides = small("task=reward", f"output_root={tmp_path}")
    stopped, log = server.start(*overrides, die={"signal": signal.SIGSTOP, "at": "train_batch_start", "step": 4})
    until = time.monotonic() + 60
    while not list(tmp_path.glob("*/*/checkpoints/step-*.ckpt")):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.01)
    second = server.run(*overrides)
    assert second.code == 2 and f"in progress in process {stopped}" in second.lines[-1]
    os.kill(stopped, signal.SIGCONT)
    assert server.wait(stopped, log).code == 0
    assert json.loads((only_run(tmp_path) / "status.json").read_text())["status"] == "finished"
