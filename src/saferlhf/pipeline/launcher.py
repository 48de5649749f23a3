"""The one launcher: jobs as processes of their own, a few at once, each with its own GPUs or its share of the cores.

A job of its own process is what keeps CUDA, Lightning's subprocess launcher and random state of one run out of the
next. Jobs that wait for others start as soon as those are done; when one fails, what does not need it goes on.

Where there are GPUs a job gets as many as it wants, and sees no others (`CUDA_VISIBLE_DEVICES`): it may call its first
one 0. GPUs are dealt in the order of the jobs, so that one that wants many is not kept waiting by smaller ones.

Ctrl-C, SIGTERM and a closed terminal stop all jobs: each is asked once, so that it can save its state; whoever does not
end in time, or is still there at the second Ctrl-C, is ended. When this process is killed, so that it can ask nobody,
the jobs are asked by the system (Linux; `follow_launcher`).
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
from saferlhf.training.parent import end_with_parent

POLL_S = 0.2
GRACE_S = 60.0
LOG_MARK = "=== "
"""Starts the line that heads each job's part of its log file."""

LAUNCHER_PID = "SAFERLHF_LAUNCHER_PID"
"""Variable that tells a job which process started it."""
VISIBLE = "CUDA_VISIBLE_DEVICES"


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
        devices: GPUs it wants for itself, where `launch` has any to deal.
        ready: false as long as it must wait for something else, such as a process that is no job of ours.
    """

    name: str
    command: Callable[[], Sequence[str] | None]
    log: Path
    needs: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    devices: int = 0
    ready: Callable[[], bool] = lambda: True


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


def visible_gpus() -> tuple[str, ...]:
    """The GPUs of this machine that this process may use, by the names `CUDA_VISIBLE_DEVICES` has for them."""
    listed = os.environ.get(VISIBLE)
    if listed is not None:
        names = [name.strip() for name in listed.split(",")]
        # CUDA, too, stops reading at the first that is none
        return tuple(names[: next((n for n, name in enumerate(names) if name in ("", "-1")), len(names))])
    # asking CUDA itself would take memory on each GPU
    import pynvml

    try:
        pynvml.nvmlInit()
        return tuple(str(number) for number in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()


class DevicePool:
    """GPUs to be dealt to jobs; without any, jobs are not limited by it.

    Args:
        names: of the GPUs; None: all that this process may use.
    """

    def __init__(self, names: Sequence[str] | None = None) -> None:
        self.names = visible_gpus() if names is None else tuple(names)
        self._free = list(self.names)

    @property
    def free(self) -> tuple[str, ...]:
        """Names of those that no job has."""
        return tuple(self._free)

    def take(self, count: int) -> tuple[str, ...] | None:
        """So many GPUs for a job; None when they are not free now; nothing where there are none at all."""
        if not self.names:
            return ()
        if count > len(self._free):
            return None
        taken, self._free = tuple(self._free[:count]), self._free[count:]
        return taken

    def give_back(self, taken: Sequence[str]) -> None:
        """GPUs of a job that ended."""
        self._free = sorted([*self._free, *taken], key=self.names.index)

    def check(self, count: int, where: str = "trainer.devices") -> None:
        """Refuse what will never be free.

        Raises:
            UserError: a job wants more GPUs than there are.
        """
        if self.names and count > len(self.names):
            there = f"{len(self.names)} GPU{'s' if len(self.names) > 1 else ''}"
            raise UserError(f"{count} GPUs for one run, this machine has {there}", where, f"use {len(self.names)}")


def follow_launcher() -> None:
    """End as after a SIGTERM when the launcher that started this process dies, however it does; Linux only."""
    launcher = os.environ.get(LAUNCHER_PID)
    if launcher == str(os.getppid()):
        end_with_parent(launcher, signal.SIGTERM)


def launch(
    jobs: Sequence[Job],
    *,
    at_once: int,
    on_poll: Callable[[Known], None] = lambda _: None,
    pool: DevicePool | None = None,
    more: Callable[[], Job | None] = lambda: None,
) -> dict[str, JobResult]:
    """Run jobs, `at_once` at most at the same time.

    Args:
        jobs: in order of preference; a job whose need failed is not run (code None).
        at_once: processes at the same time.
        on_poll: called a few times a second with what is known of each job.
        pool: GPUs to deal; None: every job sees what this process sees.
        more: asked for another job when fewer than `at_once` are there; None: not now. Once no job is left to wait for
            that is the end.

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
    pool = pool or DevicePool(())
    with _StopRequests() as stop:
        try:
            while _fill(waiting, running, at_once, more) or running:
                if stop.count:
                    raise KeyboardInterrupt
                _check_needs(waiting, running, done)
                ended = len(done)
                _start_ready(waiting, running, done, at_once, pool)
                for name, job in list(running.items()):
                    if (code := job.process.poll()) is not None:
                        del running[name]
                        pool.give_back(job.devices)
                        done[name] = JobResult(code, time.monotonic() - job.started)
                on_poll({**dict.fromkeys(running), **done})
                if running or (waiting and len(done) == ended):
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
    devices: tuple[str, ...] = ()


def _fill(waiting: list[Job], running: dict[str, _Running], at_once: int, more: Callable[[], Job | None]) -> bool:
    """Ask for jobs as long as there is room; whether any wait."""
    while len(waiting) + len(running) < at_once and (job := more()) is not None:
        waiting.append(job)
    return bool(waiting)


def _check_needs(waiting: Sequence[Job], running: dict[str, _Running], done: dict[str, JobResult]) -> None:
    """Nobody may wait for what never comes."""
    if waiting and not running and all(any(need not in done for need in job.needs) for job in waiting):
        raise ValueError(f"jobs wait for each other: {', '.join(job.name for job in waiting)}")


def _start_ready(
    waiting: list[Job], running: dict[str, _Running], done: dict[str, JobResult], at_once: int, pool: DevicePool
) -> None:
    """Start what may start; what needs a failed job, or has nothing to do, is done."""
    for job in list(waiting):
        if any(need in done and done[need].code != 0 for need in job.needs):
            waiting.remove(job)
            done[job.name] = JobResult(None, 0.0)
            continue
        if len(running) >= at_once or any(need not in done for need in job.needs) or not job.ready():
            continue
        devices = pool.take(job.devices)
        if devices is None:
            return  # those behind it wait too, else smaller ones would go on taking what it waits for
        waiting.remove(job)
        started = time.monotonic()
        try:
            process = _start(job, devices if pool.names else None)
        except UserError as error:
            _write_log(job.log, f"error: {error}\n")
            done[job.name], process = JobResult(2, 0.0), None
        except BaseException:
            pool.give_back(devices)
            raise
        if process is not None:
            running[job.name] = _Running(process, started, devices)
        else:
            pool.give_back(devices)
            done.setdefault(job.name, JobResult(0, 0.0))


def _start(job: Job, devices: Sequence[str] | None) -> subprocess.Popen[bytes] | None:
    command = job.command()
    if command is None:
        return None
    environment = {**os.environ, LAUNCHER_PID: str(os.getpid()), **job.environment}
    if devices is not None:
        environment[VISIBLE] = ",".join(devices)
        if VISIBLE not in os.environ:  # the numbers are those of `nvidia-smi`
            environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    _write_log(job.log, f"{LOG_MARK}{job.name}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
    with open(job.log, "ab") as log:
        # a process group of its own: Ctrl-C reaches the launcher alone, which asks each job once
        return subprocess.Popen(
            list(command),
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
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
