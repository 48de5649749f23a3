"""Optimizer and learning-rate schedule from their config groups, and clipping.

Weight decay never touches 1-D parameters (biases, norms): the earlier implementation exempted by name and so decayed
LLaMA's final norm and all norms of GPT-2.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

from saferlhf.config.schema import OptimizerConfig, ScheduleConfig
from saferlhf.errors import UserError


def build_optimizer(parameters: Iterable[nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters, in two groups: with and without weight decay.

    Raises:
        UserError: nothing is trainable.
    """
    trainable = [p for p in parameters if p.requires_grad]
    if not trainable:
        raise UserError("no parameter is trainable", "adapter", "choose adapter=lora, or adapter=none without nf4")
    assert config.lr is not None, "fill_defaults sets the learning rate"
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    betas = (float(config.betas[0]), float(config.betas[1]))
    if config.name == "adamw":
        # one kernel for all tensors of a group: on CPU the tiny backbone's step is bound by Python otherwise
        return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.eps, fused=True)
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=config.lr)
    import bitsandbytes as bnb

    kinds = {"adamw_8bit": bnb.optim.AdamW8bit, "paged_adamw_8bit": bnb.optim.PagedAdamW8bit}
    return kinds[config.name](groups, lr=config.lr, betas=betas, eps=config.eps)


def clip_gradients(parameters: Iterable[nn.Parameter], limit: float | None) -> Tensor:
    """Scale the gradients of these parameters down to a norm of `limit` at most; their norm before that, a scalar.

    Parameters without a gradient are passed over, sharded ones are counted once over all processes; null: no limit.
    """
    trained = list(parameters)
    norm = get_total_norm([p.grad for p in trained if p.grad is not None])
    if isinstance(norm, DTensor):  # each process knows the norm of its share
        norm = norm.full_tensor()
    clip_grads_with_norm_(trained, limit if limit is not None else math.inf, norm)
    return norm


def learning_rate_factor(step: int, total_steps: int, config: ScheduleConfig) -> float:
    """Share of the peak learning rate at an optimizer step.

    Rises linearly over the first `warmup_ratio` of the steps, the first step included (so it is never zero), then falls
    from 1 to `final_ratio`, which is reached one step after the last.
    """
    warmup = max(1, math.ceil(total_steps * config.warmup_ratio)) if config.warmup_ratio > 0 else 0
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.name == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    remaining = 0.5 * (1 + math.cos(math.pi * progress)) if config.name == "cosine" else 1 - progress
    return config.final_ratio + (1 - config.final_ratio) * remaining


def build_schedule(optimizer: torch.optim.Optimizer, total_steps: int, config: ScheduleConfig) -> LambdaLR:
    """A scheduler to be stepped once per optimizer step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, total_steps, config))
