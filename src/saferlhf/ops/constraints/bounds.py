"""Upper confidence bounds of a mean cost, and the test that a policy must pass before it leaves the house.

From the mean costs m_1..m_n of n prompts (prompts, not responses, are independent), with mean m, standard deviation s,
costs in [a, b] and delta = 1 - confidence, the true mean lies below m + h with probability at least 1 - delta:

    student     h = s / sqrt(n) t_{1-delta, n-1}              as far as the mean is about normal
    hoeffding   h = (b - a) sqrt(ln(1/delta) / 2n)            always, costs bounded (Hoeffding 1963)
    bernstein   h = s sqrt(2 ln(2/delta) / n) + 7 (b - a) ln(2/delta) / (3 (n - 1))
                always, costs bounded, tighter where they vary little (Maurer and Pontil 2009, theorem 4)

Two steps, as Seldonian algorithms have them (Thomas et al. 2019; for RLHF Chittepu et al. 2025, arXiv 2506.08266): in
training the constraint is on mean + inflation * h, with h sized for the number of test prompts; at the end the bound is
computed once, on prompts that no earlier step has seen, and a policy whose bound is above the threshold fails. A policy
whose true mean cost is above passes with probability at most delta.

With several costs every one must pass at the same delta, and no correction is needed: an unsafe policy must pass the
test of the very cost it violates (an intersection-union test, Berger 1982).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats
from torch import Tensor

from saferlhf.errors import UserError
from saferlhf.ops.constraints.costs import Floats, Sample, by_prompt, sample, vector

BOUNDS = ("student", "hoeffding", "bernstein")


def half_width(
    bound: str, *, deviation: float, count: int, confidence: float, cost_range: Sequence[float] | None = None
) -> float:
    """How far above the observed mean the true one may lie.

    Args:
        bound: "student" | "hoeffding" | "bernstein".
        deviation: s; not looked at by hoeffding.
        count: n, prompts.
        confidence: 1 - delta.
        cost_range: (a, b); not looked at by student.

    Returns:
        h, in cost units; infinite where n is too small for any statement.
    """
    delta = 1 - confidence
    if bound == "student":
        if count < 2:
            return math.inf
        return deviation / math.sqrt(count) * float(stats.t.ppf(confidence, count - 1))
    if bound not in BOUNDS:
        raise ValueError(f"unknown bound {bound!r}; one of {', '.join(BOUNDS)}")
    if cost_range is None:
        raise ValueError(f"{bound} needs the range of the costs")
    width = cost_range[1] - cost_range[0]
    if bound == "hoeffding":
        return width * math.sqrt(math.log(1 / delta) / (2 * count)) if count else math.inf
    if count < 2:
        return math.inf
    log = math.log(2 / delta)
    return deviation * math.sqrt(2 * log / count) + 7 * width * log / (3 * (count - 1))


@dataclass(frozen=True)
class CostTest:
    """The safety test of one cost; `upper` <= `threshold` passes."""

    cost: str
    passed: bool
    mean: float
    upper: float
    threshold: float
    prompts: int
    responses: int
    unscored: int  # responses without a score
    bound: str
    confidence: float

    def __str__(self) -> str:
        verdict = "passes" if self.passed else "FAILS"
        missing = f", {self.unscored} of {self.responses} responses without a score" if self.unscored else ""
        most = f"at most {self.upper:.4g} with {self.confidence:.4g} confidence"
        if math.isinf(self.upper):
            most = "and its costs are too few or too much alike for a bound"
        return (
            f"cost '{self.cost}' {verdict}: mean {self.mean:.4g}, {most} ({self.bound}, {self.prompts} "
            f"prompts{missing}), threshold {self.threshold:.4g}"
        )


@dataclass(frozen=True)
class SafetyTest:
    """The safety test of all costs; passed only if every one is."""

    costs: tuple[CostTest, ...]

    @property
    def passed(self) -> bool:
        """Whether every cost's bound is at or below its threshold; without costs nothing is shown."""
        return bool(self.costs) and all(test.passed for test in self.costs)

    def metrics(self) -> dict[str, float]:
        """Flat names and numbers, as for `metrics.json`."""
        numbers = {"passed": float(self.passed)}
        for test in self.costs:
            for key in ("passed", "mean", "upper", "threshold", "prompts", "unscored"):
                numbers[f"{test.cost}/{key}"] = float(getattr(test, key))
        return numbers

    def record(self) -> dict[str, Any]:
        """Everything, as plain JSON."""
        return {"passed": self.passed, "costs": [asdict(test) for test in self.costs]}

    def require(self, where: str) -> None:
        """Refuse a policy that failed.

        Raises:
            UserError: naming the costs that did.
        """
        if not self.passed:
            failed = "; ".join(str(test) for test in self.costs if not test.passed) or "no cost was tested"
            mend = "train longer, raise constraint.inflation or constraint.test_prompts, or allow a higher threshold"
            raise UserError(f"the policy did not pass its safety test: {failed}", where, mend)


def safety_test(
    costs: Mapping[str, Any],
    thresholds: Mapping[str, float],
    *,
    groups: Sequence[Any] | Tensor | None = None,
    bound: str = "student",
    confidence: float = 0.95,
    cost_range: Sequence[float] | None = None,
) -> SafetyTest:
    """Test a policy on held-out prompts.

    A response without a score could be anything: where the range is known it counts as the worst, otherwise its cost
    fails the test. Student's bound on fewer than two prompts, or on costs that are all the same, shows nothing (a
    sample without spread does not say how large the unseen part is) and fails; the other bounds hold there too.

    Args:
        costs: name -> (N,) costs of the policy's responses to prompts that neither training nor selection has seen.
        thresholds: name -> what the mean must be shown to lie at or below.
        groups: (N,) prompt of each response; None: one response per prompt.
        bound, confidence, cost_range: as `half_width`.

    Raises:
        UserError: a cost outside `cost_range`: no bound holds then.
    """
    tests = []
    for name, values in costs.items():
        numbers = vector(values, name)
        unscored = int(np.isnan(numbers).sum())
        if cost_range is not None:
            numbers = _within(numbers, cost_range, name)
        seen = sample(list(by_prompt(numbers, groups).values()))
        upper = _upper(seen, bound, confidence, cost_range)
        passed = upper <= thresholds[name] and (cost_range is not None or not unscored)
        tests.append(
            CostTest(
                name, passed, seen.mean, upper, thresholds[name], seen.count, len(numbers), unscored, bound, confidence
            )
        )
    return SafetyTest(tuple(tests))


def _upper(seen: Sample, bound: str, confidence: float, cost_range: Sequence[float] | None) -> float:
    width = half_width(bound, deviation=seen.deviation, count=seen.count, confidence=confidence, cost_range=cost_range)
    if math.isinf(width) or (bound == "student" and not seen.squares > 0):
        return math.inf
    upper = seen.mean + width
    # nothing can lie above the range
    return upper if cost_range is None else min(upper, float(cost_range[1]))


def _within(numbers: Floats, cost_range: Sequence[float], name: str) -> Floats:
    """Costs in their range, missing ones at its upper end."""
    low, high = cost_range
    known = numbers[~np.isnan(numbers)]
    if known.size and (known.min() < low or known.max() > high):
        raise UserError(
            f"cost '{name}' lies between {known.min():.4g} and {known.max():.4g}",
            "constraint.cost_range",
            f"[{low:g}, {high:g}] does not hold it, and no bound would hold; widen it, or constraint.bound=student",
        )
    return np.where(np.isnan(numbers), high, numbers)
