"""The one launcher: jobs as processes of their own, a few at once, each with its share of the cores.

A job of its own process is what keeps CUDA, Lightning's subprocess launcher and random state of one run out of the
next. Jobs that wait for others start as soon as those are done; when one fails, what does not need it goes on.

Ctrl-C, SIGTERM and a closed terminal stop all jobs: each is asked once, so that it can save its state; whoever does not
end in time, or is still there at the second Ctrl-C, is ended.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from saferlhf.errors import UserError

POLL_S = 0.2
GRACE_S = 60.0
LOG_MARK = "=== "
"""Starts the line that heads each job's part of its log file."""


@dataclass
class Job:
    """One process to be run.

    Attributes:
        name: for the screen.
        command: builds the argument list once the jobs in `needs` are done; None when nothing is left to do. A
            `UserError` from it is the job's failure, with exit code 2.
        log: file for its output; appended to.
        needs: names of jobs that must have succeeded before.
        environment: variables set for it.
    """

    name: str
    command: Callable[[], Sequence[str] | None]
    log: Path
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class JobResult:
    """How a job ended: its exit code (negative: the signal that ended it), None when it never ran; its duration."""

    code: int | None
    seconds: float


Known = dict[str, JobResult | None]
"""What is known of the jobs that were started or skipped: None = running."""


def cpu_share(jobs_at_once: int) -> int:
    """Cores for each of so many jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, jobs_at_once))


def launch(
    jobs: Sequence[Job], *, at_once: int, on_poll: Callable[[Known], None] = lambda _: None
) -> dict[str, JobResult]:
    """Run jobs, `at_once` at most at the same time.

    Args:
        jobs: in order of preference; a job whose need failed is not run (code None).
        at_once: processes at the same time.
        on_poll: called a few times a second with what is known of each job.

    Returns:
        A result for each job.

    Raises:
        KeyboardInterrupt: after all running jobs were asked to stop, and did.
        ValueError: no job may run, or jobs wait for each other or for one that is not there.
    """
    if at_once < 1:
        raise ValueError(f"{at_once} jobs at once")
    waiting = list(jobs)
    running: dict[str, _Running] = {}
    done: dict[str, JobResult] = {}
    with _StopRequests() as stop:
        try:
            while waiting or running:
                if stop.count:
                    raise KeyboardInterrupt
                before = len(waiting)
                _start_ready(waiting, running, done, at_once)
                if waiting and not running and len(waiting) == before:
                    raise ValueError(f"jobs wait for each other: {', '.join(job.name for job in waiting)}")
                for name, job in list(running.items()):
                    if (code := job.process.poll()) is not None:
                        del running[name]
                        done[name] = JobResult(code, time.monotonic() - job.started)
                on_poll({**dict.fromkeys(running), **done})
                if running:
                    time.sleep(POLL_S)
        except BaseException:
            _stop([job.process for job in running.values()], stop)
            raise
    return done


def last_words(log: Path) -> str:
    """What a job's log says last: the newest line that starts with `error:`, else the last one, of its last start."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return ""
    heads = [number for number, line in enumerate(lines) if line.startswith(LOG_MARK)]
    lines = lines[heads[-1] + 1 :] if heads else lines
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return errors[-1] if errors else lines[-1] if lines else ""


@dataclass
class _Running:
    process: subprocess.Popen[bytes]
    started: float


def _start_ready(waiting: list[Job], running: dict[str, _Running], done: dict[str, JobResult], at_once: int) -> None:
    """Start what may start; what needs a failed job, or has nothing to do, is done."""
    for job in list(waiting):
        if any(need in done and done[need].code != 0 for need in job.needs):
            waiting.remove(job)
            done[job.name] = JobResult(None, 0.0)
        elif len(running) < at_once and all(need in done for need in job.needs):
            waiting.remove(job)
            started = time.monotonic()
            try:
                process = _start(job)
            except UserError as error:
                _write_log(job.log, f"error: {error}\n")
                done[job.name] = JobResult(2, 0.0)
                continue
            if process is None:
                done[job.name] = JobResult(0, 0.0)
            else:
                running[job.name] = _Running(process, started)


def _start(job: Job) -> subprocess.Popen[bytes] | None:
    command = job.command()
    if command is None:
        return None
    _write_log(job.log, f"{LOG_MARK}{job.name}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    with open(job.log, "ab") as log:
        # a process group of its own: Ctrl-C reaches the launcher alone, which asks each job once
        return subprocess.Popen(
            list(command),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **job.environment},
            start_new_session=True,
        )


def _write_log(log: Path, text: str) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8") as file:
        file.write(text)


class _StopRequests:
    """Counts SIGINT, SIGTERM and SIGHUP instead of being interrupted by them at any line; a context."""

    def __init__(self) -> None:
        self.count = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopRequests:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` wants it
                    self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.count += 1


def _stop(processes: Iterable[subprocess.Popen[bytes]], stop: _StopRequests) -> None:
    """Ask once, wait for the checkpoints, then insist."""
    left = [process for process in processes if process.poll() is None]
    # a process started in the background of a script ignores SIGINT, and so do its children
    ask = signal.SIGTERM if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else signal.SIGINT
    for process in left:
        process.send_signal(ask)
    deadline, asked = time.monotonic() + GRACE_S, stop.count
    if left:
        print("stopping; what runs saves its state (Ctrl-C once more to end it at once)", file=sys.stderr, flush=True)
    while left and time.monotonic() < deadline and stop.count == asked:
        time.sleep(POLL_S / 2)
        left = [process for process in left if process.poll() is None]
    for process in left:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with all it started: it leads its group
        process.wait()
        print(f"process {process.pid} did not stop by itself and was ended", file=sys.stderr, flush=True)
