r"""Learned multipliers: maximise E[R] subject to mean cost <= threshold, for each cost.

The policy ascends, for multipliers lambda_k >= 0 that are held fixed while it does,

    A = (A_r - sum_k lambda_k A_k) / (1 + sum_k lambda_k)

and once per rollout each lambda answers to the gap J = mean cost - threshold of the fresh costs (Safe RLHF, arXiv
2310.12773, section 3.3; its d is minus our threshold):

    log_gradient     ln lambda <- ln lambda + lr lambda J     equation 31: gradient ascent of lambda J in ln lambda
    multiplicative   ln lambda <- ln lambda + lr J            the same speed at every lambda
    pid              lambda <- kp P + ki I + kd D             Stooke et al. 2020, arXiv 2007.03964, algorithm 2

with J smoothed in P, I <- max(0, I + J), D = the smoothed rise of the mean cost where it rises. Known value: lambda 1,
lr 0.1, J 2 -> 1.2214 with either of the first two.

What differs from the reference code: it steps lambda per micro-batch and pass, on an average that has not changed
since, without a lower bound, so that lambda's speed depends on accumulation, and saturates in a few calls or sticks
near zero. Here: once per rollout, a function of the global costs alone, bounded both ways.

Legend: `S` sequences, `T` tokens. All arithmetic of multipliers is float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from saferlhf.ops.constraints.base import ActsOn, Constraint
from saferlhf.ops.constraints.bounds import SafetyTest, half_width, safety_test
from saferlhf.ops.constraints.costs import Sample, by_prompt, pooled, sample, vector

Rule = Literal["log_gradient", "multiplicative"]


@dataclass(frozen=True)
class Limits:
    """Where one multiplier starts and what it stays within."""

    initial: float
    low: float
    high: float


class Multiplier(Constraint, ABC):
    """What learned multipliers share: mixing by lambda, window, delay and bounds.

    Args:
        names, threshold, history: as `Constraint`.
        limits: cost -> start and bounds.
        delay: rollouts before lambda moves.
        window: rollouts whose costs are pooled; 1 = the fresh one.
    """

    acts_on: ActsOn = "advantages"

    def __init__(
        self,
        names: Sequence[str],
        threshold: Mapping[str, float],
        limits: Mapping[str, Limits],
        *,
        delay: int = 0,
        window: int = 1,
        history: int = 20,
    ) -> None:
        super().__init__(names, threshold, history)
        self.limits = {name: limits[name] for name in self.names}
        self.delay, self.window = delay, window
        self._lambda = {name: self.limits[name].initial for name in self.names}
        self._samples: dict[str, list[Sample]] = {name: [] for name in self.names}
        self._past: dict[str, list[float]] = {name: [] for name in self.names}

    # -------------------------------------------------------------------------------------------- in the update
    def combine(
        self, rewards: Tensor, costs: Mapping[str, Tensor], *, applies: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """(A_r - sum lambda_k A_k) / (1 + sum lambda_k); see `Constraint.combine`."""
        mixed, total = rewards, torch.ones((), dtype=rewards.dtype, device=rewards.device)
        for name in self.names:
            weight = self._weight(name, rewards, applies)
            mixed = mixed - weight * costs[name]
            total = total + weight
        return mixed / total

    def _weight(self, name: str, like: Tensor, applies: Mapping[str, Tensor] | None) -> Tensor:
        """The lambda of each row, shaped to multiply `like`: () or (S, 1..)."""
        weight = torch.tensor(self._lambda[name], dtype=like.dtype, device=like.device)
        if applies is None:
            return weight
        return weight * applies[name].to(like).reshape(-1, *[1] * (like.dim() - 1))

    @property
    def lambdas(self) -> dict[str, float]:
        """The multiplier of each cost."""
        return dict(self._lambda)

    # -------------------------------------------------------------------------------------------- once per rollout
    def _gap(self, name: str, scored: Sequence[float], prompts: Mapping[Any, float]) -> float:
        fresh = sample(self._observations(name, scored, prompts))
        self._samples[name] = [*self._samples[name], fresh][-self.window :]
        return self._statistic(name, pooled(self._samples[name])) - self._allowed(name)

    def _observations(self, name: str, scored: Sequence[float], prompts: Mapping[Any, float]) -> list[float]:
        """What the mean is taken of."""
        return list(scored)

    def _statistic(self, name: str, seen: Sample) -> float:
        """What is compared with what is allowed."""
        return seen.mean

    def _allowed(self, name: str) -> float:
        return self.threshold[name]

    def _move(self, name: str, gap: float) -> None:
        if self.rollouts >= self.delay and not math.isnan(gap):
            limits = self.limits[name]
            self._lambda[name] = min(max(self._step(name, gap), limits.low), limits.high)
        self._past[name] = [*self._past[name], self._lambda[name]][-self.history :]

    @abstractmethod
    def _step(self, name: str, gap: float) -> float:
        """The new lambda, before the bounds."""

    def _multiplier_diagnostics(self, name: str) -> dict[str, float]:
        past = self._past[name]
        sides = [self._side(name, value) for value in past]
        return {
            "lambda": self._lambda[name],
            "at_bound": float(sides[-1]),
            "saturation": sum(map(abs, sides)) / len(sides),
            "swing": max(past) - min(past),
        }

    def _side(self, name: str, value: float) -> int:
        limits = self.limits[name]
        return int(value >= limits.high) - int(value <= limits.low)

    # -------------------------------------------------------------------------------------------- checkpoint
    def _cost_state(self, name: str) -> dict[str, Any]:
        return super()._cost_state(name) | {
            "lambda": self._lambda[name],
            "samples": [[part.count, part.mean, part.squares] for part in self._samples[name]],
            "past": list(self._past[name]),
        }

    def _load_cost_state(self, name: str, state: Mapping[str, Any]) -> None:
        super()._load_cost_state(name, state)
        self._lambda[name] = float(state["lambda"])
        self._samples[name] = [
            Sample(int(count), float(mean), float(squares)) for count, mean, squares in state["samples"]
        ]
        self._past[name] = [float(value) for value in state["past"]]


class Lagrangian(Multiplier):
    """Ascent on ln lambda.

    Args:
        lr: cost -> step size, per rollout and unit of cost.
        rule: "log_gradient" (the paper's) | "multiplicative".
        max_step: ln lambda moves at most so far in one rollout; None: no limit.
        names, threshold, limits, delay, window, history: as `Multiplier`; the lower bound is above 0.
    """

    kind = "lagrangian"

    def __init__(
        self,
        names: Sequence[str],
        threshold: Mapping[str, float],
        limits: Mapping[str, Limits],
        *,
        lr: Mapping[str, float],
        rule: str = "log_gradient",
        max_step: float | None = None,
        delay: int = 0,
        window: int = 1,
        history: int = 20,
    ) -> None:
        super().__init__(names, threshold, limits, delay=delay, window=window, history=history)
        self.lr, self.rule, self.max_step = {name: float(lr[name]) for name in self.names}, rule, max_step

    def _step(self, name: str, gap: float) -> float:
        now, limits = self._lambda[name], self.limits[name]
        step = self.lr[name] * gap * (now if self.rule == "log_gradient" else 1.0)
        if self.max_step is not None:
            step = min(max(step, -self.max_step), self.max_step)
        # far enough to pass either bound, and a huge gap does not overflow
        reach = math.log(limits.high / limits.low) + 1.0
        return now * math.exp(min(max(step, -reach), reach))


class Rectified(Lagrangian):
    """Only prompts that are violated press, and safe ones cannot make up for them.

    After Rectified Policy Optimization (Peng et al. 2024, arXiv 2410.19933): the constraint is on the mean over prompts
    of (C_x - threshold)+, C_x the mean cost of the responses to prompt x, which is to stay at or below `slack`. Its
    gradient is that of the cost on prompts with C_x above the threshold and zero on others, so lambda applies to those
    alone: A = (A_r - lambda_x A_c) / (1 + lambda_x) with lambda_x = lambda or 0. There the positive part is taken of
    each response, with one response per prompt it is the same; and slack is 0, so that lambda can never fall.

    Args:
        slack: cost -> mean positive part that is allowed, in cost units.
        others: as `Lagrangian`.
    """

    kind = "rectified"

    def __init__(
        self,
        names: Sequence[str],
        threshold: Mapping[str, float],
        limits: Mapping[str, Limits],
        *,
        slack: Mapping[str, float],
        **others: Any,
    ) -> None:
        super().__init__(names, threshold, limits, **others)
        self.slack = {name: float(slack[name]) for name in self.names}

    def applies(self, costs: Mapping[str, Any], groups: Sequence[Any] | Tensor | None = None) -> dict[str, Tensor]:
        """1 at the responses to prompts whose mean cost is above the threshold; see `Constraint.applies`."""
        result = {}
        for name in self.names:
            prompts = by_prompt(vector(costs[name], name), groups)
            rows = range(len(costs[name])) if groups is None else groups
            keys = rows.tolist() if isinstance(rows, Tensor) else list(rows)
            pressed = [prompts.get(key, -math.inf) > self.threshold[name] for key in keys]
            result[name] = torch.tensor(pressed, dtype=torch.float32)
        return result

    def combine(
        self, rewards: Tensor, costs: Mapping[str, Tensor], *, applies: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """As `Multiplier.combine`, with lambda only where it applies."""
        if applies is None:
            raise ValueError("a rectified constraint presses on single prompts: hand over what `applies` returned")
        return super().combine(rewards, costs, applies=applies)

    def _observations(self, name: str, scored: Sequence[float], prompts: Mapping[Any, float]) -> list[float]:
        return [max(cost - self.threshold[name], 0.0) for cost in prompts.values()]

    def _allowed(self, name: str) -> float:
        return self.slack[name]


class UpperBound(Lagrangian):
    """The constraint is on an upper confidence bound of the mean cost; `bounds.py` has the formulas and the test.

    Args:
        bound, confidence, cost_range: as `half_width`.
        inflation: of the confidence term in training; above 1, since the test is taken once and on other prompts.
        test_prompts: prompts of the test, for which the term is sized.
        others: as `Lagrangian`.
    """

    kind = "upper_bound"

    def __init__(
        self,
        names: Sequence[str],
        threshold: Mapping[str, float],
        limits: Mapping[str, Limits],
        *,
        bound: str = "student",
        confidence: float = 0.95,
        inflation: float = 2.0,
        test_prompts: int = 512,
        cost_range: Sequence[float] | None = None,
        **others: Any,
    ) -> None:
        super().__init__(names, threshold, limits, **others)
        self.bound, self.confidence, self.cost_range = bound, confidence, cost_range
        self.inflation, self.test_prompts = inflation, test_prompts

    def _observations(self, name: str, scored: Sequence[float], prompts: Mapping[Any, float]) -> list[float]:
        return list(prompts.values())

    def _statistic(self, name: str, seen: Sample) -> float:
        # one prompt has no deviation: nothing can be said, and lambda stays
        return seen.mean + self.inflation * half_width(
            self.bound,
            deviation=seen.deviation,
            count=self.test_prompts,
            confidence=self.confidence,
            cost_range=self.cost_range,
        )

    def test(self, costs: Mapping[str, Any], groups: Sequence[Any] | Tensor | None = None) -> SafetyTest:
        """The safety test at the end, on prompts that no earlier step has seen; see `safety_test`."""
        if set(costs) != set(self.names):
            raise ValueError(f"costs {sorted(costs)} are given, {sorted(self.names)} are constrained")
        return safety_test(
            costs,
            self.threshold,
            groups=groups,
            bound=self.bound,
            confidence=self.confidence,
            cost_range=self.cost_range,
        )


class Pid(Multiplier):
    """Proportional, integral and derivative control of lambda.

    The integral is kept between what the bounds of lambda allow it to contribute (no wind-up), and starts where it
    alone gives the initial lambda.

    Args:
        proportional, integral, derivative: kp, ki, kd.
        smoothing: weight of the past in the running means behind P and D, in [0, 1).
        names, threshold, limits, delay, window, history: as `Multiplier`; the lower bound may be 0.
    """

    kind = "pid"

    def __init__(
        self,
        names: Sequence[str],
        threshold: Mapping[str, float],
        limits: Mapping[str, Limits],
        *,
        proportional: float,
        integral: float,
        derivative: float,
        smoothing: float = 0.0,
        delay: int = 0,
        window: int = 1,
        history: int = 20,
    ) -> None:
        super().__init__(names, threshold, limits, delay=delay, window=window, history=history)
        self.gains = (proportional, integral, derivative)
        self.smoothing = smoothing
        self._sum = {name: limits[name].initial / integral if integral else 0.0 for name in self.names}
        self._smooth: dict[str, float | None] = dict.fromkeys(self.names)  # running mean of the gap; None: none yet

    def _step(self, name: str, gap: float) -> float:
        kp, ki, kd = self.gains
        before = self._smooth[name]
        now = gap if before is None else self.smoothing * before + (1 - self.smoothing) * gap
        # the threshold is constant: the gap rises as the mean cost does
        rise = 0.0 if before is None else max(now - before, 0.0)
        self._smooth[name] = now
        most = self.limits[name].high / ki if ki else math.inf
        self._sum[name] = min(max(self._sum[name] + gap, 0.0), most)
        return kp * now + ki * self._sum[name] + kd * rise

    def _cost_state(self, name: str) -> dict[str, Any]:
        return super()._cost_state(name) | {"sum": self._sum[name], "smooth": self._smooth[name]}

    def _load_cost_state(self, name: str, state: Mapping[str, Any]) -> None:
        super()._load_cost_state(name, state)
        self._sum[name] = float(state["sum"])
        self._smooth[name] = None if state["smooth"] is None else float(state["smooth"])
