"""Constraints: from the `constraint` group of the configuration to the object that carries it out.

    none          PPO on the reward; costs are reported
    fixed         reward shaping, R - sum of nu_k C_k
    lagrangian    ascent on ln lambda
    pid           proportional, integral and derivative control of lambda
    rectified     the positive part of the cost of each prompt
    upper_bound   mean cost plus a confidence term, and a safety test at the end

One interface for all, `Constraint`; the formulas stand with each kind in `saferlhf.ops.constraints`. Several costs have
each its own threshold, multiplier and diagnostics. Cost > 0 means unsafe.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from saferlhf.config.online_schema import (
    ConstraintConfig,
    FixedConfig,
    LagrangianConfig,
    MultiplierConfig,
    PidConfig,
    RectifiedConfig,
    UpperBoundConfig,
)
from saferlhf.errors import UserError
from saferlhf.ops.constraints.base import Constraint, FixedWeights
from saferlhf.ops.constraints.bounds import BOUNDS, CostTest, SafetyTest, half_width, safety_test
from saferlhf.ops.constraints.costs import per_cost
from saferlhf.ops.constraints.multipliers import Lagrangian, Limits, Multiplier, Pid, Rectified, UpperBound

__all__ = [
    "BOUNDS",
    "Constraint",
    "CostTest",
    "FixedWeights",
    "Lagrangian",
    "Limits",
    "Multiplier",
    "Pid",
    "Rectified",
    "SafetyTest",
    "UpperBound",
    "build_constraint",
    "half_width",
    "safety_test",
]


def build_constraint(config: ConstraintConfig, names: Sequence[str]) -> Constraint:
    """The constraint of a run.

    Args:
        config: one of `online_schema.CONSTRAINTS`.
        names: the costs of the run, in a fixed order.

    Raises:
        UserError: a kind that needs a cost and has none; a cost without a value, or a value without a cost; bounds
            that do not hold the start.
    """
    builder = _BUILDERS.get(config.name)
    if builder is None:
        raise UserError(
            f"'{config.name}' is not possible", "constraint.name", f"choose one of: {' | '.join(_BUILDERS)}"
        )
    if len(set(names)) < len(names):
        raise UserError(f"{list(names)} are no distinct names", "costs", "name each cost once")
    if not names and config.name != "none":
        raise UserError("there is no cost to constrain", f"constraint={config.name}", "name a cost, or constraint=none")
    return builder(config, names)


def _common(config: ConstraintConfig, names: Sequence[str]) -> dict[str, Any]:
    threshold = per_cost(config.threshold, names, "constraint.threshold")
    return {"names": names, "threshold": threshold, "history": config.history}


def _multiplier(config: MultiplierConfig, names: Sequence[str]) -> dict[str, Any]:
    initial = per_cost(config.lambda_init, names, "constraint.lambda_init")
    low = per_cost(config.lambda_min, names, "constraint.lambda_min")
    high = per_cost(config.lambda_max, names, "constraint.lambda_max")
    for name in names:
        if low[name] < 0 or (low[name] == 0 and not isinstance(config, PidConfig)):
            mend = "a number from zero up" if isinstance(config, PidConfig) else "a number above zero, as 0.01"
            raise UserError(f"{low[name]:g} is no lower bound of a multiplier", "constraint.lambda_min", mend)
        if not low[name] <= initial[name] <= high[name] or low[name] == high[name]:
            raise UserError(
                f"lambda of '{name}' starts at {initial[name]:g}, bounds {low[name]:g} to {high[name]:g}",
                "constraint.lambda_init",
                "choose lambda_min <= lambda_init <= lambda_max, and not all the same",
            )
    limits = {name: Limits(initial[name], low[name], high[name]) for name in names}
    return _common(config, names) | {"limits": limits, "delay": config.delay, "window": config.window}


def _lagrangian(config: LagrangianConfig, names: Sequence[str]) -> dict[str, Any]:
    lr = per_cost(config.lambda_lr, names, "constraint.lambda_lr")
    return _multiplier(config, names) | {"lr": lr, "rule": config.rule, "max_step": config.max_step}


def _build_fixed(config: FixedConfig, names: Sequence[str]) -> Constraint:
    return FixedWeights(**_common(config, names), weight=per_cost(config.weight, names, "constraint.weight"))


def _build_pid(config: PidConfig, names: Sequence[str]) -> Constraint:
    return Pid(
        **_multiplier(config, names),
        proportional=config.proportional,
        integral=config.integral,
        derivative=config.derivative,
        smoothing=config.smoothing,
    )


def _build_rectified(config: RectifiedConfig, names: Sequence[str]) -> Constraint:
    return Rectified(**_lagrangian(config, names), slack=per_cost(config.slack, names, "constraint.slack"))


def _build_upper_bound(config: UpperBoundConfig, names: Sequence[str]) -> Constraint:
    return UpperBound(
        **_lagrangian(config, names),
        bound=config.bound,
        confidence=config.confidence,
        inflation=config.inflation,
        test_prompts=config.test_prompts,
        cost_range=config.cost_range,
    )


_BUILDERS: dict[str, Callable[[Any, Sequence[str]], Constraint]] = {
    "none": lambda config, names: Constraint(**_common(config, names)),
    "fixed": _build_fixed,
    "lagrangian": lambda config, names: Lagrangian(**_lagrangian(config, names)),
    "pid": _build_pid,
    "rectified": _build_rectified,
    "upper_bound": _build_upper_bound,
}
