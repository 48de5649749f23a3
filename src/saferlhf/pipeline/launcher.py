"""The one launcher: jobs as processes of their own, a few at once, each with its share of the cores.

A job of its own process is what keeps CUDA, Lightning's subprocess launcher and random state of one run out of the
next. Jobs that wait for others start as soon as those are done; when one fails, what does not need it goes on.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

POLL_S = 0.2
GRACE_S = 60.0


@dataclass
class Job:
    """One process to be run.

    Attributes:
        name: for the screen.
        command: builds the argument list once the jobs in `needs` are done.
        needs: names of jobs that must have succeeded before.
        log: file for its output.
    """

    name: str
    command: Callable[[], Sequence[str]]
    log: Path
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


@dataclass
class JobResult:
    """How a job ended: its exit code, None when it never ran, and its duration."""

    code: int | None
    seconds: float


def cpu_share(jobs_at_once: int) -> int:
    """Cores for each of so many jobs."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // max(1, jobs_at_once))


def launch(
    jobs: Sequence[Job], *, at_once: int, on_poll: Callable[[dict[str, JobResult | None]], None] = lambda _: None
) -> dict[str, JobResult]:
    """Run jobs, `at_once` at most at the same time.

    Args:
        jobs: in order of preference; a job whose need failed is not run (code None).
        at_once: processes at the same time.
        on_poll: called a few times a second with what is known of each job (None = running).

    Returns:
        A result for each job.

    Raises:
        KeyboardInterrupt: after all running jobs were asked to stop, and did.
    """
    waiting, running, done = list(jobs), {}, {}  # type: ignore[var-annotated]
    try:
        while waiting or running:
            for job in list(waiting):
                failed = [need for need in job.needs if need in done and done[need].code != 0]
                if failed:
                    waiting.remove(job)
                    done[job.name] = JobResult(None, 0.0)
                elif len(running) < at_once and all(need in done for need in job.needs):
                    waiting.remove(job)
                    running[job.name] = (_start(job), time.monotonic())
            for name, (process, started) in list(running.items()):
                if (code := process.poll()) is not None:
                    del running[name]
                    done[name] = JobResult(code, time.monotonic() - started)
            on_poll({**{name: None for name in running}, **done})
            if running:
                time.sleep(POLL_S)
    except KeyboardInterrupt:
        _stop([process for process, _ in running.values()])
        raise
    return done


def _start(job: Job) -> subprocess.Popen[bytes]:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "ab") as log:
        # a process group of its own: Ctrl-C reaches the launcher alone, which asks each job once
        return subprocess.Popen(
            list(job.command()),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **job.environment},
            start_new_session=True,
        )


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask once, wait for the checkpoints, then insist."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE_S
    for process in processes:
        try:
            process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            print(f"process {process.pid} did not stop in {GRACE_S:.0f} s and was ended", file=sys.stderr)
