"""Means of costs that do not depend on order, split or number of processes.

Every sum here is `math.fsum`: exactly rounded, so the same costs in any order give the same bits. A multiplier driven
by them takes the same path however a rollout was split.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from saferlhf.errors import UserError

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """Summary of independent observations; summaries of several rollouts pool into one."""

    count: int
    mean: float
    squares: float  # sum of squared deviations from the mean

    @property
    def deviation(self) -> float:
        """Standard deviation, dividing by count - 1; NaN for fewer than two."""
        return math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else math.nan


def sample(values: Sequence[float]) -> Sample:
    """Summary of the values, in whatever order; an empty one has mean NaN."""
    if not values:
        return Sample(0, math.nan, 0.0)
    mean = math.fsum(values) / len(values)
    return Sample(len(values), mean, math.fsum((value - mean) ** 2 for value in values))


def pooled(samples: Iterable[Sample]) -> Sample:
    """One summary of all observations together."""
    parts = [part for part in samples if part.count]
    if len(parts) < 2:
        return parts[0] if parts else Sample(0, math.nan, 0.0)
    count = sum(part.count for part in parts)
    mean = math.fsum(part.count * part.mean for part in parts) / count
    squares = math.fsum(part.squares + part.count * (part.mean - mean) ** 2 for part in parts)
    return Sample(count, mean, squares)


def vector(values: Any, where: str) -> Floats:
    """Costs as float64 (N,), from a tensor, an array or a list; NaN stays: no score.

    Raises:
        ValueError: not one number per response, or an infinite one.
    """
    raw = values.detach().cpu().double().numpy() if isinstance(values, torch.Tensor) else values
    numbers = np.asarray(raw, dtype=np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"{where} must have one number per response, got shape {numbers.shape}")
    if np.isinf(numbers).any():
        raise ValueError(f"{where} holds an infinite number")
    return numbers


def by_prompt(costs: Floats, groups: Sequence[Any] | torch.Tensor | None) -> dict[Any, float]:
    """Mean cost of each prompt's scored responses; prompts without any are left out.

    Args:
        costs: (N,), NaN = no score.
        groups: (N,) the prompt of each response; None: every response is a prompt of its own.
    """
    if groups is None:
        return {row: float(cost) for row, cost in enumerate(costs) if not math.isnan(cost)}
    rows = groups.tolist() if isinstance(groups, torch.Tensor | np.ndarray) else list(groups)
    if len(rows) != len(costs):
        raise ValueError(f"{len(rows)} prompts are named for {len(costs)} responses")
    members: dict[Any, list[float]] = {}
    for prompt, cost in zip(rows, costs.tolist(), strict=True):
        if not math.isnan(cost):
            members.setdefault(prompt, []).append(cost)
    return {prompt: math.fsum(values) / len(values) for prompt, values in members.items()}


def per_cost(value: float | Mapping[str, float], names: Sequence[str], where: str) -> dict[str, float]:
    """A number for every cost, from one number for all or a mapping.

    Raises:
        UserError: a cost without a number, or a number without a cost, or no number at all.
    """
    if isinstance(value, Mapping):
        known = ", ".join(names)
        for name in value:
            if name not in names:
                raise UserError(f"there is no cost '{name}'", where, f"the costs of this run: {known}")
        for name in names:
            if name not in value:
                raise UserError(f"cost '{name}' has no value", where, f"give one for each of: {known}; or one number")
        items = [(name, value[name]) for name in names]
    else:
        items = [(name, value) for name in names]
    for _, number in items:
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            raise UserError(f"{number!r} is not a number", where, "give a number, or {cost: number}")
    return {name: float(number) for name, number in items}
