"""SLURM is asked once, for the right job, and what it answers is one line; a person's Ctrl-C asks for nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from saferlhf.training import requeue as module
from saferlhf.training.requeue import requeue, slurm_job
from saferlhf.training.stop import FROM_SYSTEM

KEYS = ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID")


@pytest.fixture(autouse=True)
def _outside_of_slurm(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for key in KEYS:
        monkeypatch.delenv(key, raising=False)
    before = {number: signal.getsignal(number) for number in FROM_SYSTEM}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def scontrol(folder: Path, body: str) -> Path:
    """A command of that name, in a folder of its own, that notes what it was asked."""
    folder.mkdir()
    file = folder / "scontrol"
    file.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\n{body}\n')
    file.chmod(0o755)
    return folder


@pytest.mark.parametrize(
    ("variables", "job"),
    [
        ({}, None),
        ({"SLURM_JOB_ID": "17"}, "17"),
        ({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, "17_2"),
        ({"SLURM_JOB_ID": "19", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "0"}, "17_0"),
        ({"SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "2"}, None),
        ({"SLURM_JOB_ID": ""}, None),
    ],
)
def test_the_name_of_the_job(variables: dict[str, str], job: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    assert slurm_job() == job


def test_it_is_asked_and_its_sigterm_no_longer_matters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake ends its caller at once, as SLURM may before the answer is said."""
    place = scontrol(tmp_path / "bin", f"kill -TERM {os.getpid()}; kill -USR1 {os.getpid()}")
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    assert requeue("17_2") == "SLURM will start job 17_2 again, and the run goes on from there"
    assert (place / "asked").read_text() == "requeue 17_2\n"
    os.kill(os.getpid(), signal.SIGTERM)  # this process is still here


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("echo 'Requested operation is presently disabled' >&2; exit 1", "it said 'Requested operation is presently"),
        ("exit 3", "scontrol ended with code 3"),
        ("sleep 5", "scontrol did not answer within 0 s"),
    ],
)
def test_it_refuses(body: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = [signal.getsignal(number) for number in FROM_SYSTEM]
    place = scontrol(tmp_path / "bin", body)
    monkeypatch.setenv("PATH", f"{place}:{os.environ['PATH']}")
    if "sleep" in body:
        monkeypatch.setattr(module, "WAIT_S", 0.2)
    said = requeue("17")
    assert said.startswith(f"SLURM does not start job 17 again, {why}") and "\n" not in said
    assert said.endswith("submit it once more; --requeue in its script allows this")
    assert [signal.getsignal(number) for number in FROM_SYSTEM] == before, "nothing will end this process now"


def test_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "again, there is no scontrol on this machine" in requeue("17")
    (tmp_path / "scontrol").write_text("no program")
    assert "again, scontrol cannot be run (Permission denied)" in requeue("17")


def test_from_another_thread_too(tmp_path: Path) -> None:
    """Only the main thread may set handlers."""
    place = scontrol(tmp_path / "bin", "")
    code = (
        "import threading; from saferlhf.training.requeue import requeue; said = [];"
        "t = threading.Thread(target=lambda: said.append(requeue('5'))); t.start(); t.join(); print(said)"
    )
    environment = {**os.environ, "PATH": f"{place}:{os.environ['PATH']}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120)
    assert "SLURM will start job 5 again" in done.stdout, done.stderr
