"""The launcher, with processes of milliseconds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from saferlhf.errors import UserError
from saferlhf.pipeline import launcher
from saferlhf.pipeline.launcher import Job, JobResult, Known, cpu_share, last_words, launch

PYTHON = (sys.executable, "-S", "-c")  # -S: no site-packages, starts in milliseconds


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launcher, "POLL_S", 0.01)


class Jobs:
    """Jobs of one test; each notes in `order` when its command is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.order: list[str] = []

    def job(self, name: str, code: str | None = "", needs: Sequence[str] = (), **environment: str) -> Job:
        def command() -> list[str] | None:
            self.order.append(name)
            return None if code is None else [*PYTHON, code]

        return Job(name, command, self.folder / f"{name}.log", tuple(needs), environment)


@pytest.fixture
def jobs(tmp_path: Path) -> Jobs:
    return Jobs(tmp_path / "logs")


def codes(results: dict[str, JobResult]) -> dict[str, int | None]:
    return {name: result.code for name, result in results.items()}


def test_jobs_wait_for_what_they_need(jobs: Jobs) -> None:
    trace = jobs.folder / "trace"
    note = f"open({str(trace)!r}, 'a').write('NAME '); "
    slow = "import time; time.sleep(0.3); "
    done = launch(
        [
            jobs.job("c", note.replace("NAME", "c"), needs=["a", "b"]),
            jobs.job("a", slow + note.replace("NAME", "a")),
            jobs.job("b", note.replace("NAME", "b"), needs=["a"]),
        ],
        at_once=3,
    )
    assert codes(done) == {"a": 0, "b": 0, "c": 0}
    assert jobs.order == ["a", "b", "c"]
    assert trace.read_text().split() == ["a", "b", "c"]
    assert done["a"].seconds >= 0.3


def test_a_failure_stops_only_what_needs_it(jobs: Jobs) -> None:
    done = launch(
        [
            jobs.job("bad", "raise SystemExit(3)"),
            jobs.job("child", needs=["bad"]),
            jobs.job("grandchild", needs=["child"]),
            jobs.job("other", "import time; time.sleep(0.2)"),
            jobs.job("late", needs=["other"]),
        ],
        at_once=2,
    )
    assert codes(done) == {"bad": 3, "child": None, "grandchild": None, "other": 0, "late": 0}
    assert "child" not in jobs.order and "grandchild" not in jobs.order
    assert not (jobs.folder / "child.log").exists()


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_at_once_than_allowed(jobs: Jobs, at_once: int) -> None:
    most = 0

    def watch(known: Known) -> None:
        nonlocal most
        most = max(most, sum(result is None for result in known.values()))

    code = "import time; time.sleep(0.15)"
    started = time.monotonic()
    launch([jobs.job(name, code) for name in "abcd"], at_once=at_once, on_poll=watch)
    assert most == at_once
    if at_once == 1:
        assert time.monotonic() - started >= 4 * 0.15
    assert jobs.order == list("abcd"), "in order of preference"


def test_a_job_with_nothing_to_do_is_done(jobs: Jobs) -> None:
    done = launch([jobs.job("a", None), jobs.job("b", needs=["a"])], at_once=1)
    assert codes(done) == {"a": 0, "b": 0}
    assert not (jobs.folder / "a.log").exists(), "nothing was started"


def test_a_command_is_built_when_its_needs_are_done(jobs: Jobs) -> None:
    made = jobs.folder / "made"
    command = [*PYTHON, f"open({str(made)!r}, 'w').write('x')"]
    second = Job("b", lambda: [*PYTHON, f"print({made.read_text()!r})"], jobs.folder / "b.log", ("a",))
    assert codes(launch([second, Job("a", lambda: command, jobs.folder / "a.log")], at_once=2)) == {"a": 0, "b": 0}
    assert last_words(jobs.folder / "b.log") == "x"


def test_a_user_error_of_a_command_is_that_jobs_failure(jobs: Jobs) -> None:
    def refuse() -> list[str]:
        raise UserError("no such file: x", "data.path", "give one")

    done = launch([Job("a", refuse, jobs.folder / "a.log"), jobs.job("b"), jobs.job("c", needs=["a"])], at_once=1)
    assert codes(done) == {"a": 2, "b": 0, "c": None}
    assert last_words(jobs.folder / "a.log") == "no such file: x (in data.path); give one"


def test_another_error_of_a_command_stops_the_jobs_that_run(jobs: Jobs) -> None:
    def fault() -> list[str]:
        raise KeyError("ours")

    pid = jobs.folder / "pid"
    wait = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    started = time.monotonic()

    def when_it_runs(known: Known) -> None:
        if not pid.exists() or not pid.read_text():
            return
        raise KeyError("ours")

    with pytest.raises(KeyError):
        launch([jobs.job("a", wait)], at_once=1, on_poll=when_it_runs)
    assert time.monotonic() - started < 120
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
    with pytest.raises(KeyError):
        launch([Job("b", fault, jobs.folder / "b.log")], at_once=1)


def test_jobs_that_wait_for_each_other_are_found_out(jobs: Jobs) -> None:
    with pytest.raises(ValueError, match="wait for each other: a, b"):
        launch([jobs.job("a", needs=["b"]), jobs.job("b", needs=["a"])], at_once=1)
    with pytest.raises(ValueError, match="wait for each other: c"):
        launch([jobs.job("c", needs=["not there"])], at_once=1)
    with pytest.raises(ValueError, match="0 jobs at once"):
        launch([jobs.job("a")], at_once=0)
    assert launch([], at_once=1) == {}


def test_output_goes_to_the_log_and_variables_to_the_job(jobs: Jobs) -> None:
    code = "import os, sys; print(os.environ['WHO']); print('trouble', file=sys.stderr); print(sys.stdin.read() == '')"
    launch([jobs.job("a", code, WHO="me")], at_once=1)
    head, *lines = (jobs.folder / "a.log").read_text().splitlines()
    assert head.startswith("=== a, ")
    assert sorted(lines) == ["True", "me", "trouble"]


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log) == ""
    log.write_text("=== a, 1\nerror: old trouble\n=== a, 2\nloading\n\n")
    assert last_words(log) == "loading", "the trouble of an earlier start is over"
    log.write_text("=== a, 1\nerror: first\nnoise\nerror: second\nmore noise\n")
    assert last_words(log) == "second"
    log.write_text("=== a, 1\n")
    assert last_words(log) == ""


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert [cpu_share(n) for n in (1, 2, 3, 8, 9)] == [8, 4, 2, 1, 1]


# ------------------------------------------------------------------------------------------------ stopping
def interrupt_when(ready: Path, *signals: int, then: Path | None = None) -> threading.Thread:
    """Send this process signals once the file is there, the second once the other one is, if the launcher listens."""

    def send() -> None:
        for number, file in zip(signals, (ready, then or ready), strict=False):
            for _ in range(1000):
                if file.exists() and callable(signal.getsignal(number)):
                    break
                time.sleep(0.01)
            if getattr(signal.getsignal(number), "__func__", None) is launcher._StopRequests._note:
                os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


GRACEFUL = """
import os, signal, sys, time
def stop(number, frame):
    open(sys.argv[1] + '.asked', 'w').close()
    raise SystemExit(130)
signal.signal(signal.SIGINT, stop)
open(sys.argv[1], 'w').close()
time.sleep(30)
"""
STUBBORN = GRACEFUL.replace("    raise SystemExit(130)\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_request_to_stop_reaches_the_jobs_once(jobs: Jobs, number: int) -> None:
    ready = jobs.folder / "ready"
    command = [*PYTHON, GRACEFUL, str(ready)]
    before = signal.getsignal(number)
    thread = interrupt_when(ready, number)
    with pytest.raises(KeyboardInterrupt):
        launch([Job("a", lambda: command, jobs.folder / "a.log"), jobs.job("b", needs=["a"])], at_once=2)
    thread.join()
    assert (jobs.folder / "ready.asked").exists(), "asked, not ended"
    assert "b" not in jobs.order
    assert signal.getsignal(number) is before


def test_who_does_not_stop_in_time_is_ended(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "GRACE_S", 0.3)
    ready = jobs.folder / "ready"
    thread = interrupt_when(ready, signal.SIGINT)
    stubborn = STUBBORN.replace("time.sleep(30)", "[time.sleep(1) for _ in range(30)]")
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch([Job("a", lambda: [*PYTHON, stubborn, str(ready)], jobs.folder / "a.log")], at_once=1)
    thread.join()
    assert time.monotonic() - started < 15
    assert "did not stop by itself and was ended" in capfd.readouterr().err


def test_a_second_request_ends_at_once_with_all_that_was_started(jobs: Jobs) -> None:
    ready = jobs.folder / "ready"
    # a child of its own, as a data loader's worker is one
    family = (
        "import subprocess\n"
        "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(60)'])\n"
        "open(sys.argv[1] + '.child', 'w').write(str(child.pid))\n"
    )
    stubborn = STUBBORN.replace("open(sys.argv[1], 'w')", family + "open(sys.argv[1], 'w')")
    stubborn = stubborn.replace("time.sleep(30)", "[time.sleep(1) for _ in range(60)]")
    thread = interrupt_when(ready, signal.SIGINT, signal.SIGINT, then=jobs.folder / "ready.asked")
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        launch([Job("a", lambda: [*PYTHON, stubborn, str(ready)], jobs.folder / "a.log")], at_once=1)
    thread.join()
    assert time.monotonic() - started < 15, "long before the grace is over"
    grandchild = int((jobs.folder / "ready.child").read_text())
    for _ in range(200):
        if not Path(f"/proc/{grandchild}").exists() or "zombie" in Path(f"/proc/{grandchild}/status").read_text():
            break
        time.sleep(0.01)
    else:
        os.kill(grandchild, signal.SIGKILL)
        raise AssertionError("the job's own child lives on")


def test_ignored_signals_stay_ignored(jobs: Jobs) -> None:
    """`nohup` means that a closed terminal is no reason to stop."""
    code = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from saferlhf.pipeline import launcher\n"
        "with launcher._StopRequests() as stop:\n"
        "    signal.raise_signal(signal.SIGHUP); signal.raise_signal(signal.SIGINT); print(stop.count)\n"
        "    signal.raise_signal(signal.SIGTERM); print(stop.count)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "1"]
