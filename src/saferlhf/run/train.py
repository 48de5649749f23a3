"""One run, in the order it happens: locate, load rows, plan, fit, evaluate, export, report."""

from __future__ import annotations

import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from saferlhf.config.files import read_json, write_json, write_text
from saferlhf.config.run_folder import FAILED, FINISHED, KILLED, RunFolder
from saferlhf.config.schema import TrainConfig
from saferlhf.run.prepare import LocatedRun, checked, locate_run
from saferlhf.run.screen import say, say_finished, say_result


@dataclass(frozen=True)
class RunResult:
    """What a run leaves: its folder and final metrics (empty for `plan=on`)."""

    folder: Path
    metrics: dict[str, float]


class Interrupted(Exception):
    """Ctrl-C or SIGTERM ended the run; its state is on disk."""


def train(config: TrainConfig) -> RunResult:
    """Carry out one run, or continue it, or say that it is finished.

    Raises:
        UserError: the input is wrong.
        Interrupted: a person or the system asked for an end; the same command goes on.
    """
    run = locate_run(checked(config))
    if not config.plan.only and run.folder.status().get("status") == FINISHED:
        metrics = read_json(run.folder.metrics) or {}
        say_finished(run.folder, metrics, run.config.evaluation.confidence)
        return RunResult(run.folder.path, metrics)
    # heavy imports only now, so that a finished run answers at once
    from saferlhf.run.stages import evaluate_run, export_run, fit, prepare

    if config.plan.only:
        prepare(run).show_plan()
        return RunResult(run.folder.path, {})
    run.folder.acquire()
    tracker: Any = None
    try:
        _write_config(run)
        prepared = prepare(run)
        tracker = prepared.start_tracking()
        prepared.show_plan()
        started = time.monotonic()
        fit(prepared, tracker)
        seconds = time.monotonic() - started
        run.folder.update_status(phase="evaluating")
        evaluation = evaluate_run(prepared)
        evaluation.metrics["train/seconds"] = round(seconds, 1)
        run.folder.update_status(phase="exporting")
        export_run(prepared, evaluation, tracker)
        run.folder.update_status(status=FINISHED, phase=None, finished=time.time())
        tracker.finish("FINISHED")
        say_result(run.folder, evaluation.metrics, prepared.ui_command(), run.config.evaluation.confidence)
        return RunResult(run.folder.path, evaluation.metrics)
    except (Interrupted, KeyboardInterrupt, SystemExit) as error:
        _end(run.folder, tracker, KILLED, "interrupted")
        raise Interrupted(
            f"stopped; the state is in {run.folder.path}: type the same command to go on"
        ) from (None if isinstance(error, Interrupted) else error)
    except BaseException as error:
        _end(run.folder, tracker, FAILED, str(error) or type(error).__name__)
        raise
    finally:
        run.folder.release()


def _end(folder: RunFolder, tracker: Any, status: str, reason: str) -> None:
    folder.update_status(status=status, phase=None, error=None if status == KILLED else reason[:2000])
    if tracker is not None:
        tracker.finish("KILLED" if status == KILLED else "FAILED")


def _write_config(run: LocatedRun) -> None:
    write_text(run.folder.path / "config.yaml", yaml.safe_dump(asdict(run.config), sort_keys=False))
    write_json(run.folder.path / "identity.json", run.identity)
    run.folder.update_status(hash=run.hash, name=run.config.name, started=time.time(), process=os.getpid())
    say(f"run {run.folder.path}")
