"""What all supervised tasks share: one optimizer step over its micro-batches.

Let a step hold the micro-batches m = 1..M with loss sums S_m over rows (or tokens) and counts n_m. The loss is

    L = sum_m S_m / sum_m n_m

taken over all micro-batches and processes, so neither micro-batch size, padding nor the number of processes changes it
(trap 6 of docs/architecture.md). Each micro-batch is backpropagated at once, scaled by the count of the whole step. The
gradient is clipped once, over the whole step. All numbers of a step leave the device together, after its last backward
pass: one wait per step, not one per micro-batch.

Of several processes each runs its rows of the step; gradients, logged means and validation rows are brought together,
and what goes wrong in one is raised in all.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from saferlhf.config.schema import TrainConfig
from saferlhf.data.batches import AnswerBatch, PairBatch, TokenBatch, tokens_of
from saferlhf.data.loader import EvalBatch, StepBatch
from saferlhf.errors import TrainingDiverged, UserError
from saferlhf.evaluation.processes import Processes
from saferlhf.models.adapters import add_lora
from saferlhf.models.backbone import load_backbone
from saferlhf.models.features import trunk_id
from saferlhf.models.frozen_prefix import FrozenPrefix
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.moderation import ModerationLabels
from saferlhf.tasks.optimization import build_optimizer, build_schedule, clip_gradients

Batch = TokenBatch | PairBatch | AnswerBatch


@dataclass(frozen=True)
class TaskInputs:
    """What a task needs beside its config.

    Attributes:
        tokenizer: of the backbone.
        total_steps: optimizer steps of the whole run; the schedule's length.
        output_root: where run folders lie, to resolve `init`.
        labels: of the training rows, for a moderator; None for other tasks.
        supervised: encoded demonstrations beside an online task's prompts; None: no use is made of any.
    """

    tokenizer: PreTrainedTokenizerBase
    total_steps: int
    output_root: Path
    labels: ModerationLabels | None = None
    supervised: Any = None


class SupervisedTask(L.LightningModule, ABC):
    """A LightningModule whose batch holds micro-batches: everything one optimizer step sees."""

    lm_head = False
    """Whether the backbone keeps its language-model head."""

    def __init__(self, config: TrainConfig, inputs: TaskInputs) -> None:
        super().__init__()
        # several backward passes per step, one step per batch: Lightning counts our steps exactly
        self.automatic_optimization = False
        # a frozen base is not in the checkpoint; `on_load_checkpoint` checks that all trained weights are
        self.strict_loading = False
        self.config, self.inputs = config, inputs
        self.model: nn.Module | None = None
        self.last_stats: dict[str, float] = {}  # of the last step, for display
        self.last_validation: dict[str, float] = {}  # of the last validation, for display
        self._running: dict[str, float] = {}  # sums since the last log
        self._running_steps = 0
        self._outputs: list[dict[str, Any]] = []

    # -------------------------------------------------------------------------------------------- to be filled in
    @abstractmethod
    def build_model(self, trunk: nn.Module) -> nn.Module:
        """Wrap the backbone into the task's model."""

    @abstractmethod
    def loss_sum(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss summed over the batch, and statistics to log, summed over the batch too."""

    @abstractmethod
    def count(self, batch: Any) -> int:
        """What the loss is divided by: rows or tokens."""

    @abstractmethod
    def outputs(self, batch: Any) -> dict[str, Any]:
        """Scores of a batch for evaluation: `row_ids` and one tensor per score, on the CPU."""

    @abstractmethod
    def validation_metrics(self, outputs: Sequence[Mapping[str, Any]]) -> Mapping[str, float | None]:
        """Metrics over a whole pass, without the `val/` prefix; None = undefined, left out."""

    # -------------------------------------------------------------------------------------------- model
    def configure_model(self) -> None:
        """Build the model once; Lightning calls this for every stage."""
        if self.model is not None:
            return
        config, tokenizer = self.config, self.inputs.tokenizer
        trunk = load_backbone(
            config.backbone,
            quantization=config.quantization,
            init=config.init,
            lm_head=self.lm_head,
            vocabulary_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            seed=config.seed,
            cache_dir=config.cache_dir,
            output_root=self.inputs.output_root,
        )
        identity = trunk_id(trunk) if config.adapter.cache_frozen else ""
        if config.adapter.name == "lora":
            layers = getattr(config.task, "layers", None)
            read = max(layers) if isinstance(layers, list) else None
            trunk = add_lora(trunk, config.adapter, seed=config.seed, read=read)
        self.model = self.build_model(trunk)
        if config.adapter.cache_frozen:
            assert isinstance(self.model, ScoreModel) and config.adapter.blocks
            self.model.keep_frozen(FrozenPrefix(trunk, min(config.adapter.blocks), identity, config.cache_dir))
        # Hugging Face models arrive in eval mode and Lightning keeps it (trap 18)
        self.model.train()

    def configure_optimizers(self) -> Any:
        """AdamW or a relative over the trainable parameters, and its schedule."""
        assert self.model is not None
        optimizer = build_optimizer(self.model.parameters(), self.config.optimizer)
        schedule = build_schedule(optimizer, self.inputs.total_steps, self.config.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule}}

    # -------------------------------------------------------------------------------------------- one step
    def training_step(self, batch: StepBatch[Any], batch_idx: int) -> None:
        """One optimizer step.

        Raises:
            TrainingDiverged: a loss or the gradient is not finite; the weights are those of the step before.
        """
        optimizer: Any = self.optimizers()
        schedule: Any = self.lr_schedulers()
        # a step without anything to learn from has loss zero, not zero by zero
        total = max(1, self._global_sum(sum(self.count(micro) for micro in batch)))
        optimizer.zero_grad()
        sums: list[dict[str, Tensor]] = []
        for number, micro in enumerate(batch, 1):
            loss, more = self.loss_sum(micro)
            with nullcontext() if number == len(batch) else self._gradients_kept():
                # gradients are averaged over processes, so each gives its sum times their number
                self.manual_backward(loss * (self.trainer.world_size / total))
            sums.append({"loss": loss.detach(), **more})
        norm = self._clip(optimizer)
        stats = self._step_stats(batch, sums, norm, total)
        stats["lr"] = optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()
        self._log_step(stats)

    def _gradients_kept(self) -> AbstractContextManager[None]:
        """Under ddp gradients are exchanged with the last micro-batch's, all at once."""
        no_sync = getattr(self.trainer.strategy.model, "no_sync", None)
        return no_sync() if no_sync is not None else nullcontext()

    def _clip(self, optimizer: Any) -> Tensor:
        """Clip the gradient of the whole step; its norm before that."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        return clip_gradients(trained, self.config.trainer.gradient_clip)

    def _step_stats(
        self, batch: StepBatch[Any], sums: Sequence[Mapping[str, Tensor]], norm: Tensor, total: int
    ) -> dict[str, float]:
        """Means over the step, and the gradient's norm."""
        flat = torch.stack([value.float() for micro in sums for value in micro.values()] + [norm.float()]).tolist()
        names = list(sums[0])
        rows = [dict(zip(names, flat[i * len(names) :], strict=False)) for i in range(len(sums))]
        found = self._global_sums({name: sum(row[name] for row in rows) for name in names})
        if not (math.isfinite(found["loss"]) and math.isfinite(flat[-1])):
            raise self._diverged([(micro, row["loss"]) for micro, row in zip(batch, rows, strict=True)], flat[-1])
        return {**{name: value / total for name, value in found.items()}, "grad_norm": flat[-1]}

    def _diverged(self, losses: Sequence[tuple[Batch, float]], norm: float) -> TrainingDiverged:
        """What became of the step, and of which rows, on whichever process; all must call this."""
        bad = [(batch, loss) for batch, loss in losses if not math.isfinite(loss)]
        what = f"the loss became {bad[0][1]}" if bad else f"the gradient's norm became {norm}"
        tokens = [tokens_of(batch) for batch, _ in (bad[:1] or losses)]
        ids = list(dict.fromkeys(row_id for batch in tokens for row_id in batch.row_ids))
        everywhere = Processes.current().each(lambda: (not bad, what, ids))
        _, what, ids = min(everywhere, key=lambda found: found[0])  # a loss says more than the norm that it spoils
        return TrainingDiverged(
            f"{what} in step {self.global_step + 1} of {self.inputs.total_steps}",
            "rows " + ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else ""),
            "lower optimizer.lr, or look at these rows",
        )

    def _global_sums(self, values: Mapping[str, float]) -> dict[str, float]:
        if self.trainer.world_size == 1:
            return dict(values)
        sums = torch.tensor(list(values.values()), dtype=torch.float64, device=self._meeting_place())
        return dict(zip(values, self.trainer.strategy.reduce(sums, reduce_op="sum").tolist(), strict=True))

    def _global_sum(self, value: int) -> int:
        if self.trainer.world_size == 1:
            return value
        total = torch.tensor(value, device=self._meeting_place())
        return int(self.trainer.strategy.reduce(total, reduce_op="sum"))

    def _meeting_place(self) -> torch.device:
        """Where numbers of several processes are added; weights may lie elsewhere."""
        return self.trainer.strategy.root_device

    def _log_step(self, stats: dict[str, float]) -> None:
        """Means over the steps since the last log; the learning rate is the current one."""
        for name, value in stats.items():
            self._running[name] = value if name == "lr" else self._running.get(name, 0.0) + value
        self._running_steps += 1
        if self.global_step % self.config.trainer.log_every_steps == 0 or self.global_step == self.inputs.total_steps:
            values = {f"train/{k}": v if k == "lr" else v / self._running_steps for k, v in self._running.items()}
            self._running, self._running_steps = {}, 0
            for logger in self.loggers:
                logger.log_metrics(values, step=self.global_step)
        self.last_stats = stats

    # -------------------------------------------------------------------------------------------- evaluation
    def validation_step(self, batch: EvalBatch[Any], batch_idx: int) -> None:
        """Collect scores; metrics come from all of them at once."""
        self._outputs.append({"rows": torch.from_numpy(batch.indices), **self.outputs(batch.batch)})

    def on_validation_epoch_end(self) -> None:
        """Metrics over the whole validation split."""
        found = self.validation_metrics([self._whole_pass()]).items()
        metrics = {f"val/{name}": value for name, value in found if value is not None}
        self._outputs = []
        self.last_validation = metrics
        if not self.trainer.sanity_checking:
            for logger in self.loggers:
                logger.log_metrics(metrics, step=self.global_step)

    def _whole_pass(self) -> dict[str, Tensor]:
        """What all processes found, in the order of the rows, so that their number does not change the metrics."""
        batches = [batch for part in Processes.current().each(lambda: self._outputs) for batch in part]
        rows = torch.cat([batch["rows"] for batch in batches])
        if len(rows.unique()) != len(rows):
            raise ValueError(f"{len(rows)} results of {len(rows.unique())} rows came together")
        order = rows.argsort()
        names = [name for name, value in batches[0].items() if isinstance(value, Tensor)]
        return {name: torch.cat([torch.atleast_1d(batch[name]) for batch in batches])[order] for name in names}

    # -------------------------------------------------------------------------------------------- checkpoint
    def trained_names(self) -> set[str]:
        """Keys of the state dict that training may change: trainable parameters, and buffers that are saved at all."""
        trainable = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        return trainable | ({name for name, _ in self.named_buffers()} & self.state_dict(keep_vars=True).keys())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes: a frozen base is found again by its name."""
        trained = self.trained_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        checkpoint["running"] = {"sums": dict(self._running), "steps": self._running_steps}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint in which anything trained is missing.

        Raises:
            UserError: it was written by another version of this project, or of its libraries.
        """
        missing = self.trained_names() - set(checkpoint["state_dict"])
        if missing:
            raise UserError(
                f"the checkpoint lacks {len(missing)} trained weights, such as {sorted(missing)[0]}",
                "resume",
                "resume=never starts afresh",
            )
        self._running, self._running_steps = dict(checkpoint["running"]["sums"]), checkpoint["running"]["steps"]
