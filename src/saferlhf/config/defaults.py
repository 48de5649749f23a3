"""Values that depend on other keys: filled in before the run's identity is taken, and printed in the plan.

Learning rates: from-scratch values were tuned on the toy world (docs/log.md); full fine-tuning takes the paper's 2e-5
(PKU-SafeRLHF scripts: SFT, reward and cost alike); LoRA takes ten times that, as is usual for low-rank updates.
"""

from __future__ import annotations

from dataclasses import replace

from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ModerationConfig

FROM_SCRATCH_LR = {"sft": 2e-3, "reward": 1e-3, "cost": 1e-3, "moderator": 1e-3}
FULL_LR = 2e-5
LORA_LR = 2e-4

PRETRAINED_MICRO_BATCH = 8
"""Rows per forward pass of a loaded backbone when `trainer.micro_batch_size` is null: 32 pairs of short texts took
about 10 GiB with SmolLM2-135M."""

FROM_SCRATCH_MICRO_BATCH = {"reward": 16, "cost": 16}
"""Rows per forward pass of a small model trained from scratch: 32 pairs at once took 251 ms a step on 2 cores, two
times 16, sorted by length, 214 ms. SFT gains nothing."""

TOYWORLD_ROWS = {"sft": 24_000, "reward": 22_000, "cost": 20_000, "moderator": 24_000, "probe": 8_000}
"""Training rows of the toy world when `data.train_rows` is null."""


def fill_defaults(config: TrainConfig) -> TrainConfig:
    """A copy with every `null` that stands for a default of other keys replaced by its value."""
    optimizer, data = config.optimizer, config.data
    if optimizer.lr is None:
        optimizer = replace(optimizer, lr=_learning_rate(config))
    if data.source == "toyworld" and data.train_rows is None:
        data = replace(data, train_rows=TOYWORLD_ROWS[config.task.name])
    elif config.task.name == "sft" and data.answers is None and data.source != "toyworld":
        data = replace(data, answers="best")  # demonstrations out of pairs must not teach unsafe responses
    trainer = config.trainer
    if trainer.micro_batch_size is None:
        single = isinstance(config.task, ModerationConfig)  # one sequence per row where a pair has two
        size = PRETRAINED_MICRO_BATCH * (1 + single) if config.backbone.architecture is None else None
        size = size or FROM_SCRATCH_MICRO_BATCH.get(config.task.name)
        trainer = replace(trainer, micro_batch_size=min(size, trainer.batch_size) if size else None)
    return replace(config, optimizer=optimizer, data=data, trainer=trainer, name=config.name or config.task.name)


def _learning_rate(config: TrainConfig) -> float:
    if config.adapter.name == "lora":
        return LORA_LR
    if config.backbone.architecture is not None:
        return FROM_SCRATCH_LR.get(config.task.name, FULL_LR)  # a probe has none
    return FULL_LR
