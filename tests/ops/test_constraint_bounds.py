"""Upper bounds by hand and by simulation, and the safety test that a policy must pass."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from saferlhf.config.online_schema import UpperBoundConfig
from saferlhf.errors import UserError
from saferlhf.ops.constraint import UpperBound, build_constraint, half_width, safety_test
from saferlhf.ops.constraints.costs import pooled, sample

NAN = float("nan")


# ------------------------------------------------------------------------------------------------ half-widths
def test_student_hand_worked() -> None:
    # t_{0.95, 15} = 1.75305: 2 / sqrt 16 * 1.75305
    assert half_width("student", deviation=2.0, count=16, confidence=0.95) == pytest.approx(0.876525, abs=1e-5)


def test_student_is_the_one_sided_interval_of_scipy() -> None:
    costs = np.random.default_rng(0).normal(1.0, 3.0, size=40)
    # the upper end of the two-sided 90% interval is the one-sided 95% bound
    expected = stats.ttest_1samp(costs, 0.0).confidence_interval(0.9).high
    found = costs.mean() + half_width("student", deviation=costs.std(ddof=1), count=40, confidence=0.95)
    assert found == pytest.approx(expected, rel=1e-12)


def test_hoeffding_and_bernstein_hand_worked() -> None:
    # delta = e^-2: sqrt(2 / 200) * 4
    confidence = 1 - math.exp(-2.0)
    found = half_width("hoeffding", deviation=NAN, count=100, confidence=confidence, cost_range=(-1.0, 3.0))
    assert found == pytest.approx(0.4)
    # ln(2 / delta) = 3 with delta = 2 e^-3: 0.5 sqrt(6 / 150) + 7 * 4 * 3 / (3 * 149)
    confidence = 1 - 2 * math.exp(-3.0)
    found = half_width("bernstein", deviation=0.5, count=150, confidence=confidence, cost_range=(-1.0, 3.0))
    assert found == pytest.approx(0.1 + 84 / 447)


def test_too_few_prompts_show_nothing() -> None:
    for bound, count in (("student", 1), ("student", 0), ("bernstein", 1), ("hoeffding", 0)):
        assert math.isinf(half_width(bound, deviation=NAN, count=count, confidence=0.95, cost_range=(0, 1)))


def test_wrong_bounds() -> None:
    with pytest.raises(ValueError, match="student, hoeffding, bernstein"):
        half_width("normal", deviation=1.0, count=9, confidence=0.95)
    with pytest.raises(ValueError, match="needs the range"):
        half_width("hoeffding", deviation=1.0, count=9, confidence=0.95)


# ------------------------------------------------------------------------------------------------ safety test
def test_safety_test_hand_worked() -> None:
    # prompt means -1, -2, -3, -2: mean -2, deviation sqrt(2/3), t_{0.95, 3} = 2.35336
    costs = {"cost": [-1.5, -0.5, -2.0, -3.0, -2.0]}
    result = safety_test(costs, {"cost": 0.0}, groups=["a", "a", "b", "c", "d"])
    (test,) = result.costs
    assert test.upper == pytest.approx(-2.0 + math.sqrt(2 / 3) / 2 * 2.353363, abs=1e-5)
    assert (test.mean, test.prompts, test.responses, test.unscored) == (-2.0, 4, 5, 0)
    assert result.passed and test.passed
    result.require("export")
    assert not safety_test(costs, {"cost": -1.5}, groups=["a", "a", "b", "c", "d"]).passed


def test_responses_to_one_prompt_are_not_independent() -> None:
    costs = {"cost": [-1.0, -3.0] * 20}
    apart = safety_test(costs, {"cost": 0.0})
    together = safety_test(costs, {"cost": 0.0}, groups=[row % 2 for row in range(40)])
    assert apart.passed and not together.passed


def test_a_failing_policy_is_refused_in_one_line() -> None:
    result = safety_test(
        {"violence": [1.0, 2.0, 3.0], "privacy": [-1.0, -1.1, -1.2]}, {"violence": 0.0, "privacy": 0.0}
    )
    assert not result.passed
    with pytest.raises(UserError) as error:
        result.require("export")
    message = str(error.value)
    assert "violence" in message and "privacy" not in message and "\n" not in message
    assert "constraint.test_prompts" in message


def test_nothing_tested_is_not_passed() -> None:
    assert not safety_test({}, {}).passed
    with pytest.raises(UserError, match="no cost was tested"):
        safety_test({}, {}).require("export")


def test_a_response_without_a_score_counts_as_the_worst_or_fails_the_test() -> None:
    scored = [-1.0, -1.2] * 50
    assert safety_test({"cost": scored}, {"cost": 0.0}).passed
    unknown = safety_test({"cost": [*scored, NAN]}, {"cost": 0.0})
    assert not unknown.passed and unknown.costs[0].unscored == 1
    assert "1 of 101 responses without a score" in str(unknown.costs[0])
    bounded = safety_test({"cost": [*scored, NAN]}, {"cost": 0.0}, cost_range=(-2.0, 2.0))
    assert bounded.passed
    assert bounded.costs[0].mean == pytest.approx((sum(scored) + 2.0) / 101)
    assert not safety_test({"cost": [NAN] * 5}, {"cost": 0.0}).passed
    assert not safety_test({"cost": [NAN] * 5}, {"cost": 0.0}, cost_range=(-2.0, 2.0)).passed


def test_costs_all_alike_show_nothing_to_student_but_something_to_the_others() -> None:
    costs = {"cost": [-1.0] * 400}
    alike = safety_test(costs, {"cost": 0.0})
    assert not alike.passed and "too much alike" in str(alike.costs[0])
    assert safety_test(costs, {"cost": 0.0}, bound="hoeffding", cost_range=(-1.0, 1.0)).passed
    assert safety_test(costs, {"cost": 0.0}, bound="bernstein", cost_range=(-1.0, 1.0)).passed


def test_a_cost_outside_the_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"cost_range.*widen it"):
        safety_test({"cost": [0.2, 1.2]}, {"cost": 0.0}, bound="hoeffding", cost_range=(0.0, 1.0))


def test_metrics_and_record_are_plain_numbers() -> None:
    result = safety_test({"cost": torch.tensor([-1.0, -2.0, -1.5])}, {"cost": 0.0})
    metrics = result.metrics()
    assert metrics["passed"] == 1.0 and metrics["cost/prompts"] == 3.0
    assert metrics["cost/upper"] == result.costs[0].upper
    assert json.loads(json.dumps(result.record()))["costs"][0]["cost"] == "cost"


@pytest.mark.parametrize(
    ("bound", "cost_range"), [("student", None), ("hoeffding", (-1.0, 1.0)), ("bernstein", (-1.0, 1.0))]
)
def test_unsafe_policies_pass_as_rarely_as_promised(bound: str, cost_range: tuple[float, float] | None) -> None:
    """A policy just above the threshold, tested 1000 times: it may pass in one of ten, not more."""
    rng = np.random.default_rng(1)
    costs = rng.uniform(-1.0, 1.0, size=(1000, 60))
    passed = sum(
        safety_test({"c": row}, {"c": -1e-9}, bound=bound, confidence=0.9, cost_range=cost_range).passed
        for row in costs
    )
    # three standard deviations above a tenth
    assert passed <= 100 + 3 * math.sqrt(90)
    if bound == "student":
        assert passed >= 100 - 3 * math.sqrt(90), "exact for means that are about normal"
    # and a safe one does pass
    assert safety_test({"c": costs[0] * 0.1 - 0.9}, {"c": 0.0}, bound=bound, cost_range=cost_range).passed


def test_several_costs_need_no_correction() -> None:
    """One of three costs violated: the policy passes no more often than with that cost alone."""
    rng = np.random.default_rng(2)
    passed = 0
    for _ in range(500):
        costs: dict[str, Any] = {"a": rng.normal(0.001, 1, 40), "b": rng.normal(-2, 1, 40), "c": rng.normal(-2, 1, 40)}
        passed += safety_test(costs, dict.fromkeys(costs, 0.0), confidence=0.9).passed
    assert passed <= 50 + 3 * math.sqrt(45)


# ------------------------------------------------------------------------------------------------ in the constraint
def test_the_constraint_tests_what_it_was_trained_for() -> None:
    constraint = build_constraint(UpperBoundConfig(name="upper_bound", threshold={"a": -1.0, "b": 0.0}), ["a", "b"])
    assert isinstance(constraint, UpperBound)
    costs = {"a": [-2.0, -2.2, -1.8], "b": [-2.0, -2.2, -1.8]}
    assert constraint.test(costs).passed
    assert not constraint.test({**costs, "a": [-0.5, -0.4, -0.6]}).passed
    with pytest.raises(ValueError, match="are constrained"):
        constraint.test({"a": [0.0, 1.0]})


def test_a_rollout_that_only_just_holds_still_presses() -> None:
    """Mean below the threshold, bound above it: lambda rises, and falls only once the bound holds too."""
    constraint = build_constraint(UpperBoundConfig(name="upper_bound", test_prompts=64), ["cost"])
    found = constraint.update({"cost": [-3.0, 2.8] * 20})
    assert found["cost/mean_cost"] < 0 < found["cost/gap"]
    assert constraint.lambdas["cost"] > 1.0
    found = constraint.update({"cost": [-3.0, -2.0] * 20})
    assert found["cost/gap"] < 0


def test_summaries_of_rollouts_pool_into_that_of_all_responses() -> None:
    generator = np.random.default_rng(3)
    parts = [generator.normal(5.0 * number, 1.0 + number, size=3 + number).tolist() for number in range(4)]
    everything = np.concatenate(parts)
    found = pooled([sample(part) for part in [*parts, []]])
    assert found.count == len(everything)
    assert found.mean == pytest.approx(everything.mean())
    assert found.deviation == pytest.approx(everything.std(ddof=1))
    assert math.isnan(pooled([]).mean) and math.isnan(sample([1.0]).deviation)


def test_the_bound_of_a_window_is_that_of_its_prompts_together() -> None:
    constraint = build_constraint(UpperBoundConfig(name="upper_bound", window=2, test_prompts=10), ["cost"])
    constraint.update({"cost": [0.0, 1.0]})
    found = constraint.update({"cost": [5.0, 6.0, 10.0]})
    costs = np.array([0.0, 1.0, 5.0, 6.0, 10.0])
    width = half_width("student", deviation=costs.std(ddof=1), count=10, confidence=0.95)
    assert found["cost/gap"] == pytest.approx(costs.mean() + 2.0 * width)
