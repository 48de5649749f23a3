"""Trains runs one after the other, each with two processes, and keeps what came out; started by tests with a job file.

    {"jobs": [{"name": "ddp", "overrides": [...], "stop_after": 5}, ...], "folder": "..."}

The two processes are started once for all jobs, the way `train.py` starts them. `stop_after` asks the second process to
stop after so many steps; the next job of the same overrides goes on from there. `spoil` makes the second process's loss
NaN in that step. Each leaves `<folder>/<name>.pt`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from small_runs import config as composed

from saferlhf.evaluation.processes import Processes
from saferlhf.run import stages
from saferlhf.run.prepare import locate_run
from saferlhf.run.train import Interrupted
from saferlhf.run.trainer import quiet_lightning
from saferlhf.tracking.base import NullLogger
from saferlhf.training.processes import assembled


class StopAfter(L.Callback):
    """SIGTERM to the second process alone."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_rank == trainer.world_size - 1 and trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def main() -> None:
    """All jobs."""
    wanted = json.loads(Path(sys.argv[1]).read_text())
    folder, jobs = Path(wanted["folder"]), wanted["jobs"]
    stages.part = dist.barrier  # the group is wanted for the next job
    quiet_lightning()
    with assembled(composed(jobs[0]["overrides"])) as processes:
        for job in jobs:
            found = trained(job, processes)
            if processes.first:
                torch.save(found, folder / f"{job['name']}.pt")
            dist.barrier()


def trained(job: dict[str, Any], processes: Processes) -> dict[str, Any]:
    """Weights and the checkpoint's place after one job; or what stopped it."""
    run = locate_run(composed(job["overrides"]))
    run.folder.path.mkdir(parents=True, exist_ok=True)
    prepared = stages.prepare(run)
    build = stages.build_trainer

    def build_trainer(*args: Any, callbacks: list[L.Callback], **kwargs: Any) -> L.Trainer:
        more = [StopAfter(job["stop_after"])] if job.get("stop_after") else []
        return build(*args, callbacks=[*more, *callbacks], **kwargs)

    stages.build_trainer = build_trainer
    found: dict[str, Any] = {"folder": str(run.folder.path)}
    if job.get("spoil"):
        spoil(prepared.task, job["spoil"], found, processes)
    if hasattr(prepared.task, "sample"):
        found["samples"] = watched_samples(prepared.task)
    try:
        stages.fit(prepared, NullLogger())
    except Interrupted as stop:
        return {**found, "stopped": str(stop)}
    except Exception as trouble:
        if not job.get("spoil"):
            raise
        found["rows"] = processes.each(lambda: found.get("rows", []))[-1]
        return {**found, "trouble": f"{type(trouble).__name__}: {trouble}"}
    finally:
        stages.build_trainer = build
    if processes.first:
        found["weights"] = {k: v.detach().cpu().clone() for k, v in prepared.task.model.state_dict().items()}
    return found


def watched_samples(task: Any) -> list[list[tuple[str, int, list[int]]]]:
    """Row, number and tokens of every response that an online task samples from now on, rollout by rollout."""
    seen: list[list[tuple[str, int, list[int]]]] = []
    sample = task.sample

    def watched(*args: Any) -> Any:
        found = sample(*args)
        tokens = [ids[mask].tolist() for ids, mask in zip(found.input_ids, found.response_mask, strict=True)]
        seen.append(list(zip(found.row_ids, found.sample.tolist(), tokens, strict=True)))
        return found

    task.sample = watched
    return seen


def spoil(task: Any, step: int, found: dict[str, Any], processes: Processes) -> None:
    """NaN for one micro-batch of the last process."""
    loss_sum = task.loss_sum

    def spoilt(batch: Any) -> Any:
        loss, more = loss_sum(batch)
        if processes.rank == processes.size - 1 and task.global_step == step - 1 and "rows" not in found:
            found["rows"] = list(dict.fromkeys(batch.tokens.row_ids))
            loss = loss * float("nan")
        return loss, more

    task.loss_sum = spoilt


if __name__ == "__main__":
    main()
