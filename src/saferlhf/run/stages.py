"""The heavy parts of a run: everything that needs torch, Lightning and the models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.utils import get_class

from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.run_folder import RunFolder
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ModerationConfig, ProbeConfig
from saferlhf.data.build import Splits
from saferlhf.data.loader import EvalLoader, StepLoader
from saferlhf.errors import TrainingDiverged, UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.models.tokenizer import load_tokenizer
from saferlhf.ops.calibration import Calibration
from saferlhf.run.plan import plan_rows
from saferlhf.run.prepare import LocatedRun
from saferlhf.run.rows import EncodedSplits, encode_splits, first_rows, load_splits
from saferlhf.run.screen import say, show_data, show_table
from saferlhf.run.trainer import build_trainer, micro_batch_size, rows_per_step, total_steps
from saferlhf.tasks.base import TaskInputs
from saferlhf.tracking.base import SplitInfo, TrackingLogger
from saferlhf.tracking.mlflow_logger import build_logger
from saferlhf.tracking.store import ui_command
from saferlhf.training.checkpoint import (
    AtomicCheckpointIO,
    RandomState,
    RunCheckpoint,
    checkpoint_step,
    newest_checkpoint,
)
from saferlhf.training.curves import CurveLogger
from saferlhf.training.processes import part, told
from saferlhf.training.progress import RunProgress
from saferlhf.training.stop import GracefulStop, StopRequested


@dataclass
class PreparedRun:
    """A run with its rows, tokenizer and task, before anything is trained."""

    run: LocatedRun
    rows: Splits
    tokenizer: Any
    encoded: EncodedSplits
    steps: int

    @property
    def config(self) -> TrainConfig:
        """The checked config."""
        return self.run.config

    @property
    def folder(self) -> RunFolder:
        """Of the run."""
        return self.run.folder

    @cached_property
    def task(self) -> Any:
        """The LightningModule (`SupervisedTask`, or of an online run), without weights until `configure_model`."""
        kind = get_class(self.config.task._target_)
        moderates = isinstance(self.config.task, ModerationConfig)
        labels = self.encoded.labels(self.encoded.train) if moderates else None
        supervised = self.encoded.supervised
        inputs = TaskInputs(self.tokenizer, self.steps, Path(self.config.output_root), labels, supervised)
        return kind(self.config, inputs)

    def show_plan(self) -> None:
        """One screen: what will be done, with how much, and where the results go."""
        show_data(self.rows.report.to_dict())
        show_table("plan", plan_rows(self.config, self.encoded, self.task, self.steps, self.folder.path))

    def gather(self) -> None:
        """Put whole weights in the place of shards: a fresh task, with what the newest checkpoint holds."""
        newest = newest_checkpoint(self.folder)
        assert newest is not None, "a training that ended was saved"
        del self.task
        self.task.configure_model()
        if self.config.trainer.precision == "bf16-true":
            self.task.to(torch.bfloat16)
        state = AtomicCheckpointIO().load_checkpoint(newest)
        self.task.on_load_checkpoint(state)
        self.task.load_state_dict(state["state_dict"], strict=False)

    def ui_command(self) -> str | None:
        """How to look at the tracked runs."""
        if self.config.tracking.name == "none":
            return None
        return ui_command(self.config.tracking, Path(self.config.output_root))

    def start_tracking(self) -> TrackingLogger:
        """Begin the tracked run, or continue the one this folder began before."""
        config, folder = self.config, self.folder
        name = f"{config.name}/{folder.path.name}"
        tracker = build_logger(
            config.tracking,
            output_root=Path(config.output_root),
            run_folder=folder.path,
            run_name=config.tracking.run_name or name,
            identity=self.run.hash,
            tags={"task": config.task.name, "data": config.data.name, "backbone": config.backbone.name},
            resume_run_id=folder.status().get("mlflow_run_id"),
        )
        folder.update_status(mlflow_run_id=tracker.run_id)
        tracker.log_hyperparams(asdict(config))
        source = config.data.path or self.rows.report.revision or config.data.source
        parts = {"train": self.encoded.train, "val": self.encoded.val, "test": self.encoded.test}
        tracker.log_datasets(
            [SplitInfo(s, config.data.name, self.rows.fingerprint, len(p), source) for s, p in parts.items() if len(p)]
        )
        return tracker


def prepare(run: LocatedRun) -> PreparedRun:
    """Load and check rows, load the tokenizer, encode."""
    config = run.config
    if config.trainer.threads:
        torch.set_num_threads(config.trainer.threads)
    rows = load_splits(config)
    tokenizer = load_tokenizer(
        config.backbone,
        vocabulary=vocabulary_of(config),
        cache_dir=config.cache_dir,
        init=policy_start(config),
        output_root=config.output_root,
    )
    encoded = encode_splits(config, rows, tokenizer)
    if not len(encoded.train):
        raise UserError("no row is left to train on", "data", "see the table of dropped rows; change data.policy")
    return PreparedRun(run, rows, tokenizer, encoded, total_steps(config, len(encoded.train)))


def policy_start(config: TrainConfig) -> str | None:
    """Where the weights start: of an online run, the actor's."""
    return (config.roles.actor.model if config.roles is not None else None) or config.init


def fit(prepared: PreparedRun, tracker: TrackingLogger) -> None:
    """Train from the newest checkpoint, or from the start, to the last step; together with the other processes.

    Raises:
        Interrupted: an end was asked for; the state is saved.
        TrainingDiverged: the loss or the gradient is not finite.
    """
    from saferlhf.run.train import Interrupted

    config, folder, processes = prepared.config, prepared.folder, Processes.current()
    if isinstance(config.task, ProbeConfig):
        from saferlhf.run.fit_probe import run_probe

        run_probe(prepared, tracker)
        return
    found = told(processes, str(newest_checkpoint(folder) or ""))
    checkpoint = Path(found) if found else None
    if checkpoint is not None:
        say(f"going on from {checkpoint}")
    elif getattr(config.task, "head_start", None) == "linear_probe":
        from saferlhf.run.head_start import begin_at_probe

        begin_at_probe(prepared)
    # each process draws noise of its own; weights were drawn, from the run's seed, or will be, from streams of theirs
    L.seed_everything(config.seed + processes.rank, verbose=False)
    stop = GracefulStop(quiet=not processes.first)
    saver = RunCheckpoint(folder, config.checkpoint, stop, resumed=checkpoint)
    title = f"{config.task.name} ({config.backbone.name} on {config.data.name})"
    shown = [RunProgress(folder, title, prepared.steps, config.trainer.progress)] if processes.first else []
    trainer = build_trainer(
        config,
        folder=folder,
        steps=prepared.steps,
        callbacks=[RandomState(), *shown, saver],
        loggers=[CurveLogger(folder.path / "curves.jsonl"), tracker] if processes.first else [],
        plugins=[AtomicCheckpointIO()],
    )
    train_loader, val_loader = _loaders(prepared)
    stopped = False
    with stop:
        try:
            trainer.fit(
                prepared.task,
                train_dataloaders=train_loader,
                val_dataloaders=val_loader,
                ckpt_path=checkpoint,
                weights_only=True,
            )
        except StopRequested:
            stopped = True
        except TrainingDiverged as error:
            raise TrainingDiverged(error.what, error.where, f"{error.mend}; {_kept(folder)}") from None
        else:
            # evaluation and export can be repeated from here; removed once the run is finished
            saver.save(trainer)
        if stopped or stop.requested:
            raise Interrupted(
                f"stopped by {stop.requested or 'another process'} after step {trainer.global_step} of "
                f"{prepared.steps}, which is saved in {folder.path}: type the same command to go on"
            )
    part()
    if config.strategy.sharded and processes.first:
        prepared.gather()


def _loaders(prepared: PreparedRun) -> tuple[StepLoader[Any], EvalLoader[Any] | None]:
    config, val = prepared.config, prepared.encoded.val
    processes = Processes.current()
    share = {"rank": processes.rank, "world_size": processes.size}
    online = isinstance(config.task, PpoConfig)
    train_loader: StepLoader[Any] = StepLoader(
        prepared.encoded.train,
        batch_size=rows_per_step(config),
        # a rollout is known as a whole to all processes
        micro_batch_size=None if online else micro_batch_size(config),
        total_steps=prepared.steps,
        seed=config.seed,
        **({} if online else share),
    )
    if online or not len(val):
        return train_loader, None
    val = first_rows(val, config.trainer.val_max_rows)
    return train_loader, EvalLoader(val, batch_size=config.trainer.eval_batch_size, **share)


def _kept(folder: RunFolder) -> str:
    """What of a training that broke off is on disk."""
    newest = newest_checkpoint(folder)
    if newest is None:
        return "no checkpoint was due before: no weights of this run are on disk"
    return f"the weights after step {checkpoint_step(newest)} are in {newest}"


@dataclass
class Evaluation:
    """Final numbers, what the report shows beside them, and a moderator's calibration."""

    metrics: dict[str, float]
    histograms: list[Any]
    samples: list[dict[str, Any]]
    calibration: Calibration | None = None


def evaluate_run(prepared: PreparedRun) -> Evaluation:
    """Final metrics on validation and test rows."""
    from saferlhf.run.measure import measure

    return measure(prepared)


def export_run(prepared: PreparedRun, evaluation: Evaluation, tracker: TrackingLogger) -> None:
    """Export, metrics, report, card; everything into tracking too."""
    from saferlhf.run.finish import finish

    finish(prepared, evaluation, tracker)


def vocabulary_of(config: TrainConfig) -> tuple[str, ...]:
    """The toy world's words, where the tokenizer is made of them."""
    if config.backbone.tokenizer != "toyworld":
        return ()
    from saferlhf.data.toyworld import vocabulary

    return vocabulary()
