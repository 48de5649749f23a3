"""Values that depend on other keys: filled in before the run's identity is taken, and printed in the plan.

Learning rates: from-scratch values were tuned on the toy world (docs/log.md); full fine-tuning takes the paper's 2e-5
(PKU-SafeRLHF scripts: SFT, reward and cost alike); LoRA takes ten times that, as is usual for low-rank updates.
"""

from __future__ import annotations

from dataclasses import replace

from saferlhf.config.online_schema import PpoConfig
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ModerationConfig

FROM_SCRATCH_LR = {"sft": 2e-3, "reward": 1e-3, "cost": 1e-3, "moderator": 1e-3, "ppo": 4e-4, "ppo_lag": 4e-4}
FULL_LR = 2e-5
LORA_LR = 2e-4
ONLINE_FULL_LR = 1e-5
"""Of a policy trained online, all weights: Safe RLHF's script takes 9.65e-6."""

PRETRAINED_MICRO_BATCH = 8
"""Rows per forward pass of a loaded backbone when `trainer.micro_batch_size` is null: 32 pairs of short texts took
about 10 GiB with SmolLM2-135M."""

FROM_SCRATCH_MICRO_BATCH = {"reward": 16, "cost": 16}
"""Rows per forward pass of a small model trained from scratch: 32 pairs at once took 251 ms a step on 2 cores, two
times 16, sorted by length, 214 ms. SFT gains nothing."""

MOST_NEW_TOKENS = 128
"""Of a sampled response, when `rollout.max_new_tokens` is null."""

TOYWORLD_ROWS = {
    "sft": 32_000,
    "reward": 22_000,
    "cost": 20_000,
    "moderator": 24_000,
    "probe": 8_000,
    "ppo": 7_680,
    "ppo_lag": 7_680,
}
"""Training rows (online: prompts) of the toy world when `data.train_rows` is null."""


def fill_defaults(config: TrainConfig) -> TrainConfig:
    """A copy with every `null` that stands for a default of other keys replaced by its value."""
    optimizer, data, task = config.optimizer, config.data, config.task
    if optimizer.lr is None:
        optimizer = replace(optimizer, lr=_learning_rate(config))
    if data.source == "toyworld" and data.train_rows is None:
        data = replace(data, train_rows=TOYWORLD_ROWS[config.task.name])
    elif config.task.name == "sft" and data.answers is None and data.source != "toyworld":
        data = replace(data, answers="best")  # demonstrations out of pairs must not teach unsafe responses
    trainer = config.trainer
    if isinstance(task, PpoConfig):
        if trainer.micro_batch_size is None and config.backbone.architecture is None:
            trainer = replace(trainer, micro_batch_size=PRETRAINED_MICRO_BATCH)  # responses, not rows
    elif trainer.micro_batch_size is None:
        single = isinstance(config.task, ModerationConfig)  # one sequence per row where a pair has two
        size = PRETRAINED_MICRO_BATCH * (1 + single) if config.backbone.architecture is None else None
        size = size or FROM_SCRATCH_MICRO_BATCH.get(config.task.name)
        trainer = replace(trainer, micro_batch_size=min(size, trainer.batch_size) if size else None)
    if isinstance(task, PpoConfig) and task.critic.lr is None:
        task = replace(task, critic=replace(task.critic, lr=_critic_lr(config, optimizer.lr)))
    rollout = config.rollout
    if rollout is not None and rollout.max_new_tokens is None:
        rollout = replace(rollout, max_new_tokens=min(MOST_NEW_TOKENS, config.backbone.max_length // 2))
    return replace(
        config,
        rollout=rollout,
        task=task,
        optimizer=optimizer,
        data=data,
        trainer=trainer,
        name=config.name or task.name,
    )


def _learning_rate(config: TrainConfig) -> float:
    if config.adapter.name == "lora":
        return LORA_LR
    if config.backbone.architecture is not None:
        return FROM_SCRATCH_LR.get(config.task.name, FULL_LR)  # a probe has none
    return ONLINE_FULL_LR if isinstance(config.task, PpoConfig) else FULL_LR


def _critic_lr(config: TrainConfig, actor_lr: float | None) -> float:
    """Half the actor's, as in Safe RLHF; more where small models are trained from scratch."""
    assert actor_lr is not None
    return actor_lr * (2.5 if config.backbone.architecture is not None else 0.5)
