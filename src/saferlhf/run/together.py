"""One evaluation by several processes: started, told apart, and brought back together.

`trainer.devices=2` starts the second process by itself (Lightning Fabric runs the same command again); under `torchrun`
and in a SLURM job the processes are there already. All of them read the rows and judge their part of the batches
(`evaluation/processes.py`). The first alone holds the folder, measures with intervals and baselines, writes, tracks and
speaks; what the others write goes into a folder that is thrown away.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from saferlhf.config.evaluate_schema import EvaluateConfig
from saferlhf.config.run_folder import RunFolder
from saferlhf.errors import UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.run import screen
from saferlhf.training.first_process import follow_first
from saferlhf.training.processes import launched, started_by_torchrun


def joined(config: EvaluateConfig) -> Processes:
    """The processes of this evaluation; starts them where nobody else did.

    Raises:
        UserError: the launcher started another number of processes than `trainer.devices` says.
    """
    present = Processes.current()
    started = started_by_torchrun()
    devices = config.trainer.devices
    if devices == 1:
        devices = started
    if present.size > 1 or devices == 1:
        return present
    if started not in (1, devices):
        what = f"{started} processes were started and trainer.devices is {devices}"
        raise UserError(what, "trainer.devices", "leave it out: the number of processes says it")
    from saferlhf.run.trainer import quiet_lightning

    quiet_lightning()
    follow_first()
    launched(config.trainer.accelerator, devices, command="evaluate")
    processes = Processes.current()
    if not processes.first:
        _be_silent()
    return processes


def _be_silent() -> None:
    """What is to be said, the first process says."""
    from transformers.utils import logging as hub

    hub.disable_progress_bar()
    screen.silence()
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until this process ends


def followed(config: EvaluateConfig, work: Callable[[EvaluateConfig, RunFolder], dict[str, float]]) -> dict[str, float]:
    """The part of a process that is not the first: its batches, and nothing that lasts.

    Args:
        work: the evaluation; here without draws and baselines, in a folder that is thrown away.

    Raises:
        SystemExit: the user must mend something, which the first process says.
    """
    quiet = replace(
        config,
        baselines=False,
        evaluation=replace(config.evaluation, bootstrap_draws=0),
        tracking=replace(config.tracking, name="none"),
        trainer=replace(config.trainer, progress="none"),
    )
    with tempfile.TemporaryDirectory(prefix="saferlhf-") as place:
        try:
            return work(quiet, RunFolder(Path(place)))
        except UserError:
            raise SystemExit(0) from None
