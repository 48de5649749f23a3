"""The Lightning trainer of a run, and what it is given.

The training stream is one long epoch of optimizer steps for Lightning: where a pass over the rows ends is the stream's
own business (`data/loader.py`). That leaves a single cursor to resume, in the middle of an epoch or at its boundary.
"""

from __future__ import annotations

import logging
import math
import warnings
from typing import Any

import lightning as L

from saferlhf.config.run_folder import RunFolder
from saferlhf.config.schema import TrainConfig
from saferlhf.evaluation.processes import Processes
from saferlhf.training.strategy import build_strategy


def rows_per_step(config: TrainConfig) -> int:
    """Rows of an optimizer step; online, prompts of a rollout, which is what a step is there."""
    return config.trainer.batch_size if config.rollout is None else config.rollout.prompts


def total_steps(config: TrainConfig, rows: int) -> int:
    """Optimizer steps (online: rollouts) of the run: `epochs` passes over the rows, rounded up, `max_steps` at most."""
    steps = max(1, math.ceil(config.trainer.epochs * rows / rows_per_step(config)))
    return min(steps, config.trainer.max_steps) if config.trainer.max_steps else steps


def micro_batch_size(config: TrainConfig) -> int:
    """Rows per forward pass and process."""
    share = max(1, config.trainer.batch_size // config.trainer.devices)
    return min(config.trainer.micro_batch_size or share, share)


def validation_interval(config: TrainConfig, steps: int) -> int:
    """Steps between validations: as configured, or four times per run."""
    return min(steps, config.trainer.val_every_steps or max(1, math.ceil(steps / 4)))


def build_trainer(
    config: TrainConfig,
    *,
    folder: RunFolder,
    steps: int,
    callbacks: list[L.Callback],
    loggers: list[Any],
    plugins: list[Any],
) -> L.Trainer:
    """A trainer that does what the config says and nothing by itself."""
    quiet_lightning()
    processes = Processes.current()
    return L.Trainer(
        accelerator=config.trainer.accelerator,
        devices=config.trainer.devices,
        num_nodes=max(1, processes.size // config.trainer.devices),
        strategy=build_strategy(config),
        inference_mode=not config.strategy.sharded,  # shards are gathered into tensors that training uses too
        precision=config.trainer.precision,  # type: ignore[arg-type]
        max_epochs=1,
        val_check_interval=validation_interval(config, steps),
        num_sanity_val_steps=0,
        logger=loggers,
        log_every_n_steps=1,  # the task decides itself when to log
        callbacks=callbacks,
        plugins=plugins,
        default_root_dir=folder.path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def quiet_lightning() -> None:
    """Lightning's hints about devices and workers tell a user nothing here."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for of in (name, f"{name}.utilities.rank_zero"):
            logging.getLogger(of).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*GPU available but not used.*")
    # frozen roles are meant to be
    warnings.filterwarnings("ignore", message=".*module.s. in eval mode at the start of training.*")
    # while critics warm up, the actor's schedule goes on without its optimizer
    warnings.filterwarnings("ignore", message=".*Detected call of `lr_scheduler.step.*")
    warnings.filterwarnings("ignore", message=".*have no `val_dataloader`.*")  # data without validation rows
