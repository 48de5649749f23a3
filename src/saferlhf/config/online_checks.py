"""Values and combinations of the online groups that cannot work, refused before anything loads; see `checks.py`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from saferlhf.config.online_schema import (
    ADVANTAGES,
    CONSTRAINTS,
    AdvantageConfig,
    ConstraintConfig,
    FixedConfig,
    GaeConfig,
    LagrangianConfig,
    MultiplierConfig,
    PidConfig,
    PpoConfig,
    RectifiedConfig,
    UpperBoundConfig,
)
from saferlhf.errors import UserError


def check_online(
    ppo: PpoConfig, advantage: AdvantageConfig, constraint: ConstraintConfig, *, samples: int | None = None
) -> None:
    """Raise `UserError` at the first value or combination that cannot work.

    Args:
        ppo, advantage, constraint: the groups of the run.
        samples: responses per prompt; None: not known here.
    """
    check_ppo(ppo)
    check_advantage(advantage)
    check_constraint(constraint)
    if isinstance(advantage, GaeConfig):
        return
    if ppo.truncation == "bootstrap":
        raise UserError(
            f"advantage={advantage.name} has no critic to bootstrap with",
            "task.truncation",
            "task.truncation=penalty, or advantage=gae",
        )
    if ppo.critic.warmup_rollouts:
        raise UserError(
            f"advantage={advantage.name} has no critic to warm up", "task.critic.warmup_rollouts", "leave it at 0"
        )
    if samples is not None and samples < 2:
        raise UserError(
            f"advantage={advantage.name} compares the responses to a prompt, and there is {samples} per prompt",
            "rollout.samples",
            "two or more, or advantage=gae",
        )


def check_ppo(config: PpoConfig) -> None:
    """The knobs of the PPO step."""
    _counts({"task.epochs": config.epochs, "task.mini_batches": config.mini_batches})
    _counts({"task.ptx_batch_size": config.ptx_batch_size})
    _counts({"task.critic.warmup_rollouts": config.critic.warmup_rollouts}, least=0)
    _between({"task.clip_ratio": config.clip_ratio}, above=0, below=1)
    _between(
        {
            "task.clip_ratio_high": config.clip_ratio_high,
            "task.clip_value": config.clip_value,
            "task.clip_score": config.clip_score,
            "task.stop_kl": config.stop_kl,
            "task.kl.target": config.kl.target,
            "task.kl.horizon": config.kl.horizon,
            "task.critic.lr": config.critic.lr,
            "task.critic.gradient_clip": config.critic.gradient_clip,
        },
        above=0,
    )
    _between({"task.dual_clip": config.dual_clip}, above=1)
    _between(
        {
            "task.entropy_coefficient": config.entropy_coefficient,
            "task.ptx_coefficient": config.ptx_coefficient,
            "task.truncation_penalty": config.truncation_penalty,
            "task.kl.coefficient": config.kl.coefficient,
            "task.critic.weight_decay": config.critic.weight_decay,
        },
        least=0,
    )
    _one_of(config.loss_mean, "task.loss_mean", ["token", "response"])
    _one_of(config.truncation, "task.truncation", ["penalty", "bootstrap", "none"])
    _one_of(config.kl.enters, "task.kl.enters", ["reward", "loss"])
    _one_of(config.kl.estimator, "task.kl.estimator", ["k1", "k2", "k3"])
    _one_of(config.critic.schedule, "task.critic.schedule", ["constant", "cosine", "linear"])
    if config.kl.enters == "loss" and config.kl.estimator == "k1":
        raise UserError(
            "k1 as a loss holds nothing: its expected gradient is 0",
            "task.kl.estimator",
            "task.kl.estimator=k3, or task.kl.enters=reward",
        )
    if config.kl.target is not None and config.kl.coefficient == 0:
        raise UserError(
            "a coefficient of 0 cannot adapt: it moves by factors",
            "task.kl.coefficient",
            "a number above zero, or task.kl.target=null",
        )


def check_advantage(config: AdvantageConfig) -> None:
    """How advantages are estimated."""
    _one_of(config.name, "advantage.name", ADVANTAGES)
    _one_of(config.whiten, "advantage.whiten", ["none", "scale", "standard"])
    if isinstance(config, GaeConfig):
        _between({"advantage.gamma": config.gamma, "advantage.lam": config.lam}, least=0, most=1)


def check_constraint(config: ConstraintConfig) -> None:
    """The constraint's values; which costs there are is checked where it is built."""
    _one_of(config.name, "constraint.name", CONSTRAINTS)
    _numbers({"constraint.threshold": config.threshold})
    _counts({"constraint.history": config.history}, least=2)
    if isinstance(config, FixedConfig):
        _numbers({"constraint.weight": config.weight}, least=0)
    if isinstance(config, MultiplierConfig):
        _check_multiplier(config)
    if isinstance(config, LagrangianConfig):
        _one_of(config.rule, "constraint.rule", ["log_gradient", "multiplicative"])
        _numbers({"constraint.lambda_lr": config.lambda_lr}, above=0)
        _between({"constraint.max_step": config.max_step}, above=0)
    if isinstance(config, PidConfig):
        gains = {
            "constraint.proportional": config.proportional,
            "constraint.integral": config.integral,
            "constraint.derivative": config.derivative,
        }
        _between(gains, least=0)
        _between({"constraint.smoothing": config.smoothing}, least=0, below=1)
        if not any(gains.values()):
            raise UserError("with all three gains 0 lambda never moves", "constraint", "constraint.integral=0.1")
    if isinstance(config, RectifiedConfig):
        _numbers({"constraint.slack": config.slack}, least=0)
    if isinstance(config, UpperBoundConfig):
        _check_upper_bound(config)


def _check_multiplier(config: MultiplierConfig) -> None:
    _counts({"constraint.delay": config.delay}, least=0)
    _counts({"constraint.window": config.window})
    _numbers({"constraint.lambda_init": config.lambda_init, "constraint.lambda_max": config.lambda_max}, above=0)
    if isinstance(config, PidConfig):
        _numbers({"constraint.lambda_min": config.lambda_min}, least=0)
    else:
        _numbers({"constraint.lambda_min": config.lambda_min}, above=0)


def _check_upper_bound(config: UpperBoundConfig) -> None:
    _one_of(config.bound, "constraint.bound", ["student", "hoeffding", "bernstein"])
    _between({"constraint.confidence": config.confidence}, above=0.5, below=1)
    _between({"constraint.inflation": config.inflation}, above=0)
    _counts({"constraint.test_prompts": config.test_prompts}, least=2)
    ends = config.cost_range
    if ends is None:
        if config.bound != "student":
            raise UserError(
                f"{config.bound} needs to know the lowest and highest possible cost",
                "constraint.cost_range",
                "constraint.cost_range=[LOW,HIGH], or constraint.bound=student",
            )
    elif len(ends) != 2 or not -math.inf < ends[0] < ends[1] < math.inf:
        raise UserError(f"{ends} is no range", "constraint.cost_range", "two numbers, the lower first, as [0,1]")


# ------------------------------------------------------------------------------------------------ helpers
def _one_of(value: str, where: str, choices: Iterable[str]) -> None:
    options = list(choices)
    if value not in options:
        raise UserError(f"'{value}' is not possible", where, "choose one of: " + " | ".join(options))


def _counts(values: Mapping[str, int | None], *, least: int = 1) -> None:
    for where, value in values.items():
        if value is not None and value < least:
            raise UserError(f"{value} is too small", where, f"use {least} or more")


def _numbers(values: Mapping[str, Any], **limits: float) -> None:
    """Each value is one number, or a mapping from cost names to numbers."""
    for where, value in values.items():
        parts = {f"{where}.{name}": part for name, part in value.items()} if isinstance(value, dict) else {where: value}
        for place, part in parts.items():
            if isinstance(part, bool) or not isinstance(part, int | float):
                raise UserError(f"{part!r} is not a number", place, "give a number, or {cost: number}")
        _between(parts, **limits)


def _between(
    values: Mapping[str, float | None],
    *,
    above: float = -math.inf,
    least: float = -math.inf,
    below: float = math.inf,
    most: float = math.inf,
) -> None:
    """Finite numbers within the limits; None is left alone."""
    wanted = [
        words
        for limit, words in (
            (above, f"above {above:g}"),
            (least, f"from {least:g} up"),
            (below, f"below {below:g}"),
            (most, f"up to {most:g}"),
        )
        if math.isfinite(limit)
    ]
    for where, value in values.items():
        # NaN fails every comparison
        if value is not None and not (above < value < below and least <= value <= most and math.isfinite(value)):
            mend = "a number " + " and ".join(wanted) if wanted else "a finite number"
            raise UserError(f"{value:g} is not possible", where, mend)
