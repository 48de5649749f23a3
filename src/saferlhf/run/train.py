"""One run, in the order it happens: locate, load rows, plan, fit, evaluate, export, report."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from saferlhf.config.files import read_json, write_json, write_text
from saferlhf.config.run_folder import FAILED, FINISHED, KILLED, RunFolder
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ProbeConfig
from saferlhf.errors import UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.run import screen
from saferlhf.run.log import RunLog
from saferlhf.run.prepare import LocatedRun, checked, locate_run
from saferlhf.run.screen import say, say_finished, say_result
from saferlhf.training.first_process import follow_first
from saferlhf.training.processes import assembled, await_the_end, comes_first, has_several, told
from saferlhf.training.requeue import requeue, slurm_job
from saferlhf.training.stop import system_asked, system_interrupts

if TYPE_CHECKING:
    from saferlhf.run.stages import PreparedRun


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder and final metrics (empty for `plan=on`)."""

    folder: Path
    metrics: dict[str, float]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run; the message says what of it is on disk."""


def train(config: TrainConfig) -> RunResult:
    """Carry out one run, or continue it, or say that it is finished.

    Raises:
        UserError: the input is wrong.
        Interrupted: a person or the system asked for an end; the same command goes on.
    """
    config = checked(config)
    first = comes_first(config)
    if not first:
        follow_first()
    run = locate_run(config)
    if not config.plan.only and run.folder.status().get("status") == FINISHED:
        return _finished_before(run) if first else RunResult(run.folder.path, {})
    # heavy imports only now, so that a finished run answers at once
    from saferlhf.run.stages import prepare

    if config.plan.only:
        if first:
            prepare(run).show_plan()
        return RunResult(run.folder.path, {})
    if not first:
        return _follow(run)
    run.folder.acquire()
    try:
        if "finished" in run.folder.status():  # by another process, while this one was importing
            run.folder.update_status(status=FINISHED)
            return _finished_before(run)
        with RunLog(run.folder.path / "run.log"):
            metrics, ui = _to_the_end(run)
            say_result(run.folder, metrics, ui, run.config.evaluation.confidence)
    finally:
        run.folder.release()
    return RunResult(run.folder.path, metrics)


def _finished_before(run: LocatedRun) -> RunResult:
    metrics = read_json(run.folder.metrics) or {}
    say_finished(run.folder, metrics, run.config.evaluation.confidence)
    return RunResult(run.folder.path, metrics)


def _to_the_end(run: LocatedRun) -> tuple[dict[str, float], str | None]:
    """`_carry_out`; however it ends, status file and tracking say so."""
    tracked: list[Any] = []
    if has_several(run.config):
        from saferlhf.run.trainer import quiet_lightning

        quiet_lightning()
    try:
        with system_interrupts(), assembled(run.config) as processes:
            return _carry_out(run, tracked, processes)
    except Interrupted as stopped:
        _end(run.folder, tracked, KILLED)
        raise Interrupted(_with_requeue(run, str(stopped))) from None
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the one into the other
        _end(run.folder, tracked, KILLED)
        raise Interrupted(_with_requeue(run, f"stopped; {_where_it_goes_on(run)}")) from None
    except OSError as error:
        _end(run.folder, tracked, FAILED, str(error))
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        mend = f"make room; {_where_it_goes_on(run)}"
        raise UserError(error.strerror or "the disk is full", str(error.filename or run.folder.path), mend) from error
    except BaseException as error:
        _end(run.folder, tracked, FAILED, str(error) or type(error).__name__)
        raise


def _follow(run: LocatedRun) -> RunResult:
    """The part of a process that is not the first: its rows of every step. What is to be said, the first says."""
    from saferlhf.run.stages import fit
    from saferlhf.run.trainer import quiet_lightning
    from saferlhf.tracking.base import NullLogger

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # while it trains it listens; else the first ends it
    screen.silence()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until this process ends
    quiet_lightning()
    with assembled(run.config) as processes:
        try:
            run = replace(run, folder=RunFolder(Path(told(processes, ""))))
            prepared = _prepare_together(run, processes)
            processes.each(prepared.task.configure_model)
            fit(prepared, NullLogger())
        except (Interrupted, KeyboardInterrupt, SystemExit):  # the first was asked too, and keeps what there is
            pass
        except Exception as trouble:
            await_the_end(trouble)
    return RunResult(run.folder.path, {})


def _prepare_together(run: LocatedRun, processes: Processes) -> PreparedRun:
    """Rows, tokenizer and task; trouble of any process is raised in all."""
    from saferlhf.run.stages import prepare

    found: list[PreparedRun] = []
    processes.each(lambda: found.append(prepare(run)))
    return found[0]


def _carry_out(run: LocatedRun, tracked: list[Any], processes: Processes) -> tuple[dict[str, float], str | None]:
    """The stages; the tracker goes into `tracked` as soon as there is one. Final metrics, and how to compare runs."""
    from saferlhf.run.stages import evaluate_run, export_run, fit
    from saferlhf.training.checkpoint import discard_checkpoints, seconds_trained

    folder = run.folder
    _remove_drafts(folder)
    _write_config(run)
    told(processes, str(folder.path))
    prepared = _prepare_together(run, processes)
    # now already: whoever stops the run, or finds it failed, may want to know what it was fed
    write_json(folder.path / "data_report.json", prepared.rows.report.to_dict())
    tracker = prepared.start_tracking()
    tracked.append(tracker)
    tracker.log_artifact(folder.path / "data_report.json")
    if processes.size > 1:  # so that a model that cannot be built is one line, not several
        processes.each(prepared.task.configure_model)
    prepared.show_plan()
    started, before = time.monotonic(), seconds_trained(folder)
    fit(prepared, tracker)
    seconds = before + time.monotonic() - started
    folder.update_status(phase="evaluating")
    evaluation = evaluate_run(prepared)
    evaluation.metrics["train/seconds"] = round(seconds, 1)
    folder.update_status(phase="exporting")
    export_run(prepared, evaluation, tracker)
    # last of all: whatever is cut short before is done again by the same command
    tracker.finish("FINISHED")
    folder.update_status(status=FINISHED, phase=None, finished=time.time())
    if not run.config.checkpoint.keep_when_finished:
        discard_checkpoints(folder)
    return evaluation.metrics, prepared.ui_command()


def _end(folder: RunFolder, tracked: list[Any], status: str, reason: str | None = None) -> None:
    """Note how the run ended, here and in tracking; trouble with that must not hide the reason."""
    try:
        folder.update_status(status=status, phase=None, error=None if reason is None else reason[:2000])
        for tracker in tracked:
            tracker.finish("KILLED" if status == KILLED else "FAILED")
    except Exception as error:
        say(f"the run's end could not be noted: {error}")


def _where_it_goes_on(run: LocatedRun) -> str:
    if isinstance(run.config.task, ProbeConfig):
        return "what was computed of the features is kept: the same command goes on from there"
    steps = [int(path.stem.partition("-")[2]) for path in run.folder.checkpoints.glob("step-*.ckpt")]
    if not steps:
        return "no checkpoint was due yet: the same command starts anew"
    return f"the same command goes on from step {max(steps)}"


def _with_requeue(run: LocatedRun, message: str) -> str:
    """The message; where SLURM shall start the job again, it is asked to, last of all, and a line says so."""
    job = slurm_job() if run.config.checkpoint.requeue and system_asked() else None
    return message if job is None else f"{message}\n{requeue(job)}"


def _remove_drafts(folder: RunFolder) -> None:
    """What a killed process was writing when it died; nobody else is here, we hold the lock."""
    drafts = [p for p in folder.path.glob(".*.*") if p.is_file()]
    for draft in [*drafts, *folder.checkpoints.glob(".*")]:
        draft.unlink()
    for draft in folder.path.glob(f".{folder.export.name}.*"):
        shutil.rmtree(draft)


def _write_config(run: LocatedRun) -> None:
    write_text(run.folder.path / "config.yaml", yaml.safe_dump(asdict(run.config), sort_keys=False))
    write_json(run.folder.path / "identity.json", run.identity)
    run.folder.update_status(hash=run.hash, name=run.config.name, started=time.time(), process=os.getpid(), phase=None)
    say(f"run {run.folder.path}")
