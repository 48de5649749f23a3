"""A process that is on its way to the others is gone with the first, and nobody else's process is touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from saferlhf.training import parent
from saferlhf.training.first_process import FIRST_PID, follow_first, leading

FOLLOW = "import time; from saferlhf.training.first_process import follow_first; {before}; follow_first(); {after}"
AWAKE = "print('awake', flush=True); time.sleep(60)"
LEAD = """
import subprocess, sys, time
from saferlhf.training.first_process import leading
with leading():
    child = subprocess.Popen([sys.executable, "-c", sys.argv[1]])
print(child.pid, flush=True)
time.sleep(60)
"""


def gone(pid: int, within_s: float = 20.0) -> bool:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return False


@pytest.mark.parametrize("late", [False, True])
def test_it_goes_with_the_first(late: bool) -> None:
    """`late`: the first is dead before the other asks to be killed with it."""
    code = FOLLOW.format(before="time.sleep(3)" if late else "pass", after=AWAKE)
    first = subprocess.Popen([sys.executable, "-c", LEAD, code], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    lines = [first.stdout.readline().strip()]
    if not late:
        lines.append(first.stdout.readline().strip())
    pid = int(next(line for line in lines if line != "awake"))
    first.kill()
    first.wait()
    assert gone(pid)
    assert "awake" not in first.stdout.read()


@pytest.mark.parametrize("variable", [None, "mine"])
def test_whoever_was_started_by_somebody_else_is_left_alone(variable: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if key != FIRST_PID}
    if variable is not None:
        environment[FIRST_PID] = str(os.getpid())
    code = FOLLOW.format(before="pass", after="print('awake')")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert (done.returncode, done.stdout) == (0, "awake\n")


def test_the_environment_is_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(FIRST_PID, raising=False)
    with leading():
        assert os.environ[FIRST_PID] == str(os.getpid())
    assert FIRST_PID not in os.environ
    monkeypatch.setenv(FIRST_PID, "7")
    with pytest.raises(RuntimeError), leading():
        raise RuntimeError
    assert os.environ[FIRST_PID] == "7"


@pytest.mark.slow
def test_the_first_is_killed_while_the_second_is_importing(tmp_path: Path, project_root: Path) -> None:
    """The whole command: nobody waits for a dead process at the place where they were to meet."""
    from small_runs import small

    words = ["task=reward", "trainer.accelerator=cpu", "trainer.devices=2", "strategy=ddp", f"output_root={tmp_path}"]
    first = subprocess.Popen(
        [sys.executable, "train.py", *small(*words)],
        cwd=project_root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 120
    while not (children := psutil.Process(first.pid).children()):
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    time.sleep(1.0)
    first.kill()
    first.wait()
    assert all(gone(child.pid) for child in children)


def test_nothing_is_asked_for_without_a_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process has a parent that may well end."""
    asked: list[None] = []
    monkeypatch.setattr(parent.ctypes, "CDLL", asked.append)
    monkeypatch.delenv(FIRST_PID, raising=False)
    follow_first()
    assert not asked
    monkeypatch.setenv(FIRST_PID, str(os.getppid()))
    follow_first()
    assert asked, "with a first it is asked for"
