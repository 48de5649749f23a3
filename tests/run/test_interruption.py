"""Ctrl-C, SIGTERM and SIGUSR1: a usable checkpoint, a run marked killed, exit code 130, and an end equal to the bit."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from small_runs import STEPS, RunServer, assert_same_end, curves, only_run, small, state, status

NO_CHECKPOINT_DUE = "checkpoint.every_steps=null"


@pytest.fixture(scope="module")
def uninterrupted(server: RunServer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("uninterrupted")
    ended = server.run(*small("task=reward", f"output_root={outputs}"))
    assert ended.code == 0, ended.output
    return only_run(outputs)


@pytest.mark.parametrize(
    ("number", "at", "step", "saved"),
    [
        (signal.SIGINT, "train_batch_start", 4, 5),
        (signal.SIGTERM, "validation", 8, 8),
        pytest.param(signal.SIGTERM, "train_batch_start", 6, 7, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "validation", 12, 12, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "train_batch_end", 8, 8, marks=pytest.mark.slow),  # validation due, not begun
        pytest.param(signal.SIGUSR1, "train_batch_start", 0, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "train_batch_end", 12, 12, marks=pytest.mark.slow),
    ],
)
def test_the_state_is_saved_and_the_same_command_ends_the_run(
    number: int, at: str, step: int, saved: int, server: RunServer, uninterrupted: Path, tmp_path: Path
) -> None:
    overrides = small("task=reward", NO_CHECKPOINT_DUE, f"output_root={tmp_path}")
    ended = server.run(*overrides, die={"signal": number, "at": at, "step": step})
    name = signal.Signals(number).name
    assert ended.code == 130 and "Traceback" not in ended.output, ended.output
    assert f"{name}: saving after this step" in ended.output
    assert ended.lines[-1].startswith(f"stopped by {name} after step {saved} of {STEPS}")
    folder = only_run(tmp_path)
    found = status(folder)
    assert (found["status"], found["error"], found["step"]) == ("killed", None, saved)
    assert state(folder)["global_step"] == saved
    # no validation that was not due, none that was not whole
    validated = [at for at, _ in curves(folder).get("val/loss", [])]
    assert validated == [due for due in (4, 8, 12) if due < saved]
    assert server.run(*overrides).code == 0
    assert_same_end(folder, uninterrupted)


def test_the_second_signal_ends_it_at_once(server: RunServer, tmp_path: Path) -> None:
    overrides = small("task=reward", f"output_root={tmp_path}")
    twice = {"signal": signal.SIGINT, "at": "train_batch_start", "step": 7, "times": 2}
    ended = server.run(*overrides, die=twice)
    assert ended.code == 130 and "Traceback" not in ended.output, ended.output
    assert ended.lines[-1] == "stopped; the same command goes on from step 6"
    folder = only_run(tmp_path)
    assert status(folder)["status"] == "killed" and state(folder)["global_step"] == 6


def test_a_signal_in_the_middle_of_saving_leaves_the_previous_checkpoint(server: RunServer, tmp_path: Path) -> None:
    overrides = small("task=reward", f"output_root={tmp_path}")
    twice = {"signal": signal.SIGTERM, "at": "saving", "step": 6, "times": 2}
    ended = server.run(*overrides, die=twice)
    assert ended.code == 130 and ended.lines[-1] == "stopped; the same command goes on from step 3", ended.output
    folder = only_run(tmp_path)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-00000003.ckpt"]
    assert state(folder)["global_step"] == 3 and status(folder)["status"] == "killed"


@pytest.mark.parametrize(
    ("number", "at"),
    [
        (signal.SIGTERM, "evaluated"),
        pytest.param(signal.SIGINT, "evaluated", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "exported", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "fitted", marks=pytest.mark.slow),
    ],
)
def test_outside_of_training_too(number: int, at: str, server: RunServer, uninterrupted: Path, tmp_path: Path) -> None:
    overrides = small("task=reward", NO_CHECKPOINT_DUE, f"output_root={tmp_path}")
    ended = server.run(*overrides, die={"signal": number, "at": at})
    assert ended.code == 130 and "Traceback" not in ended.output, ended.output
    assert ended.lines[-1] == f"stopped; the same command goes on from step {STEPS}"
    folder = only_run(tmp_path)
    assert status(folder)["status"] == "killed"
    assert server.run(*overrides).code == 0
    assert_same_end(folder, uninterrupted)


def test_before_the_first_step_there_is_nothing_to_keep(server: RunServer, tmp_path: Path) -> None:
    overrides = small("task=reward", f"output_root={tmp_path}")
    ended = server.run(*overrides, die={"signal": signal.SIGINT, "at": "train_batch_start", "step": 0, "times": 2})
    assert ended.code == 130
    assert ended.lines[-1] == "stopped; no checkpoint was due yet: the same command starts anew"


@pytest.mark.slow
def test_a_signal_from_outside(server: RunServer, uninterrupted: Path, tmp_path: Path) -> None:
    """Sent by another process at no chosen moment, as soon as there is a first checkpoint."""
    overrides = small("task=reward", "checkpoint.every_steps=1", f"output_root={tmp_path}")
    pid, log = server.start(*overrides)
    until = time.monotonic() + 60
    while not list(tmp_path.glob("*/*/checkpoints/step-*.ckpt")):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.001)
    os.kill(pid, signal.SIGTERM)
    ended = server.wait(pid, log)
    assert ended.code == 130, ended.output
    folder = only_run(tmp_path)
    assert status(folder)["status"] == "killed"
    assert server.run(*overrides).code == 0
    assert_same_end(folder, uninterrupted)


@pytest.mark.slow
def test_slurm_does_not_get_its_own_checkpoint(
    server: RunServer, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under Slurm, Lightning would save on SIGUSR1 in the middle of a step and requeue the job by itself."""
    overrides = small("task=reward", NO_CHECKPOINT_DUE, f"output_root={tmp_path}")
    slurm = {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "1", "SLURM_NODEID": "0"}
    slurm |= {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "1"}
    die = {"signal": signal.SIGUSR1, "at": "train_batch_start", "step": 4}
    ended = server.run(*overrides, die=die, environment=slurm)
    assert ended.code == 130 and ended.lines[-1].startswith("stopped by SIGUSR1 after step 5"), ended.output
    folder = only_run(tmp_path)
    assert not list(folder.rglob("hpc_ckpt*")) and state(folder)["global_step"] == 5
    assert server.run(*overrides, environment=slurm).code == 0
    assert_same_end(folder, uninterrupted)


SLURM = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}


@pytest.mark.parametrize(
    ("number", "at", "answer", "asked", "said"),
    [
        (signal.SIGUSR1, "train_batch_start", "", 1, "SLURM will start job 17 again, and the run goes on from there"),
        (signal.SIGINT, "train_batch_start", "", 0, "stopped by SIGINT after step 5"),
        (signal.SIGUSR1, "evaluated", "", 1, "SLURM will start job 17 again"),
        pytest.param(
            *(signal.SIGTERM, "train_batch_start", "echo no >&2; exit 1", 1),
            "SLURM does not start job 17 again, it said 'no'",
            marks=pytest.mark.slow,
        ),
        pytest.param(signal.SIGTERM, "fitted", "", 1, "SLURM will start job 17 again", marks=pytest.mark.slow),
    ],
)
def test_a_job_that_has_to_leave_is_requeued(
    number: int, at: str, answer: str, asked: int, said: str, server: RunServer, uninterrupted: Path, tmp_path: Path
) -> None:
    """When SLURM is asked, the state is on disk and the run's end is noted; started again, it comes to the same end."""
    place = tmp_path / "bin"
    place.mkdir()
    log, outputs = tmp_path / "asked", tmp_path / "outputs"
    states = f"ls {outputs}/*/*/checkpoints/*; grep -c killed {outputs}/*/*/status.json"
    (place / "scontrol").write_text(f'#!/bin/sh\n(echo "$@"; {states}) >> {log}\nkill -TERM $PPID\n{answer}\n')
    (place / "scontrol").chmod(0o755)
    environment = {**SLURM, "PATH": f"{place}:{os.environ['PATH']}"}
    overrides = small("task=reward", NO_CHECKPOINT_DUE, "checkpoint.requeue=true", f"output_root={outputs}")
    ended = server.run(*overrides, die={"signal": number, "at": at, "step": 4}, environment=environment)
    assert ended.code == 130 and "Traceback" not in ended.output, ended.output
    assert ended.lines[-1].startswith(said), ended.output
    folder = only_run(outputs)
    assert status(folder)["status"] == "killed"
    lines = log.read_text().splitlines() if log.exists() else []
    assert lines.count("requeue 17") == asked
    if asked:
        step = STEPS if at in ("fitted", "evaluated") else 5
        assert lines == ["requeue 17", str(folder / "checkpoints" / f"step-{step:08d}.ckpt"), "1"]
    assert server.run(*overrides, environment=environment).code == 0
    assert_same_end(folder, uninterrupted)


@pytest.mark.parametrize("words", [(), ("checkpoint.requeue=true",)])
def test_nothing_is_requeued_unless_asked_for_and_under_slurm(
    words: tuple[str, ...], server: RunServer, tmp_path: Path
) -> None:
    place, outputs = tmp_path / "bin", tmp_path / "outputs"
    place.mkdir()
    (place / "scontrol").write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n")
    (place / "scontrol").chmod(0o755)
    environment = {**({} if words else SLURM), "PATH": f"{place}:{os.environ['PATH']}"}
    die = {"signal": signal.SIGUSR1, "at": "train_batch_start", "step": 4}
    ended = server.run(*small("task=reward", *words, f"output_root={outputs}"), die=die, environment=environment)
    assert ended.code == 130 and ended.lines[-1].startswith("stopped by SIGUSR1 after step 5"), ended.output
    assert not (tmp_path / "asked").exists()


def test_no_pickle_in_a_checkpoint(uninterrupted: Path) -> None:
    (path,) = (uninterrupted / "checkpoints").iterdir()
    held = torch.load(path, weights_only=True)
    assert held["global_step"] == STEPS and path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
