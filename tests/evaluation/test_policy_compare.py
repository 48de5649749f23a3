"""Policies held against each other from their samples, and a policy against the front of others, by hand."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from expanded import expanded
from win_rates import pairwise

from saferlhf.data.rows import as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_compare import against, height_of_front, over_front, points_of, same_prompts

NAN = np.nan


def prompts(count: int, texts: list[str] | None = None, harmful: Any = None) -> PromptSet:
    names = texts or [f"prompt {i}" for i in range(count)]
    known = np.full(count, NAN) if harmful is None else np.array(harmful, dtype=np.float64)
    return PromptSet(tuple(f"row{i}" for i in range(count)), tuple(as_prompt(name) for name in names), known)


def answers(judge: str = "truth", **outputs: Any) -> PolicyAnswers:
    """Responses of which only what one judge says matters: output -> (n, k)."""
    columns = {name: np.array(values, dtype=np.float64) for name, values in outputs.items()}
    n, k = next(iter(columns.values())).shape
    texts = tuple(tuple("a b" for _ in range(k)) for _ in range(n))
    judged = {judge: Judged(columns)}
    return PolicyAnswers(texts, np.full((n, k), 3), np.zeros((n, k), dtype=bool), judged=judged)


# ------------------------------------------------------------------------------------------------ pairs
def test_two_policies_by_a_second_implementation() -> None:
    stream = np.random.default_rng(0)
    harmful = stream.random(40) < 0.5
    ours, theirs = (
        {
            "helpfulness": stream.integers(0, 4, (40, k)).astype(float),
            "harmlessness": stream.integers(0, 4, (40, k)).astype(float),
            "is_safe": (stream.random((40, k)) < share).astype(float),
        }
        for k, share in ((3, 0.8), (2, 0.4))
    )
    found = against(prompts(40, harmful=harmful), answers(**ours), answers(**theirs), draws=200)
    for name, where in {"": np.ones(40, dtype=bool), "_harmful": harmful, "_benign": ~harmful}.items():
        for output, grade in (("helpful", "helpfulness"), ("harmless", "harmlessness")):
            expected = pairwise(ours[grade], theirs[grade], where)
            assert found[f"{output}_win_rate{name}"] == pytest.approx(expected)
    equal = [
        np.mean([a == b for a, b in itertools.product(x, y)]) for x, y in zip(*_helpful(ours, theirs), strict=True)
    ]
    assert found["helpful_tie_rate"] == pytest.approx(np.mean(equal))
    for output, name in (("helpfulness", "mean_helpfulness"), ("is_safe", "safe_rate")):
        gap = float(np.mean(ours[output].mean(axis=1) - theirs[output].mean(axis=1)))
        assert found[f"difference/{name}"] == pytest.approx(gap)
        assert found[f"difference/{name}_low"] < gap < found[f"difference/{name}_high"]
        assert found[f"difference/{name}_n"] == 40
    gap = ours["is_safe"][harmful].mean() - theirs["is_safe"][harmful].mean()
    assert found["difference/safe_rate_harmful"] == pytest.approx(gap)
    # nothing else: neither a policy's own numbers nor those of the other one
    assert {name.partition("_win_rate")[0].partition("_tie_rate")[0] for name in found if "/" not in name} == {
        "helpful",
        "harmless",
    }
    assert all(name.startswith("difference/") for name in found if "/" in name)


def _helpful(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[Any, Any]:
    return ours["helpfulness"], theirs["helpfulness"]


def test_sides_changed_and_a_policy_against_itself() -> None:
    one, other = answers(reward=[[1.0], [2.0], [5.0]]), answers(reward=[[0.0], [2.0], [9.0]])
    ahead, behind = against(prompts(3), one, other, draws=0), against(prompts(3), other, one, draws=0)
    assert ahead["helpful_win_rate"] == behind["helpful_win_rate"] == 0.5
    assert ahead["difference/mean_reward"] == pytest.approx((1 + 0 - 4) / 3)
    assert behind["difference/mean_reward"] == pytest.approx((-1 + 0 + 4) / 3)
    itself = against(prompts(3), one, one, draws=100)
    assert (itself["difference/mean_reward_low"], itself["difference/mean_reward_high"]) == (0, 0)
    assert itself["helpful_tie_rate"] == 1.0


def test_differences_are_paired_and_the_seed_is_theirs() -> None:
    """Prompts differ a lot, the policies always by one: the difference is known to the last digit."""
    easy = np.random.default_rng(2).normal(0, 50, (30, 1))
    found = against(prompts(30), answers(reward=easy + 1), answers(reward=easy), draws=300)
    ends = (found["difference/mean_reward_low"], found["difference/mean_reward_high"])
    assert ends == pytest.approx((1.0, 1.0))
    noisy = answers(reward=easy + np.random.default_rng(3).normal(0, 1, (30, 1)))
    lows = [
        against(prompts(30), noisy, answers(reward=easy), draws=100, seed=seed)["difference/mean_reward_low"]
        for seed in (0, 0, 1)
    ]
    assert lows[0] == lows[1] != lows[2]


def test_the_same_prompts() -> None:
    rows = prompts(2)
    assert same_prompts({"A": (rows, {}), "B": (prompts(2), {})}) is rows
    other = PromptSet(rows.ids[::-1], rows.prompts[::-1], rows.harmful)
    with pytest.raises(UserError, match="A and C answered different prompts") as caught:
        same_prompts({"A": (rows, {}), "B": (rows, {}), "C": (other, {})})
    assert "\n" not in str(caught.value) and caught.value.mend


# ------------------------------------------------------------------------------------------------ points
def test_points_of_a_policy() -> None:
    x, y = points_of(answers(is_safe=[[1, 0], [1, NAN]], helpfulness=[[1, 2], [NAN, 4]], reward=[[9, 9], [9, 9]]))
    assert (x.tolist(), y.tolist()) == ([0.5, 1.0], [1.5, 4.0])
    # without truth: a cost of 0 and less is safe, and the reward says how helpful
    x, y = points_of(answers(cost=[[0.0, 0.1, -3.0]], reward=[[1.0, 2.0, 6.0]]))
    assert x == pytest.approx([2 / 3]) and y == pytest.approx([3.0])


def test_the_first_judge_that_knows_is_asked() -> None:
    both = PolicyAnswers(
        (("a",),),
        np.array([[1]]),
        np.array([[False]]),
        judged={
            "words": Judged({"harmlessness": np.array([[7.0]])}),
            "roles": Judged({"reward": np.array([[2.0]]), "cost": np.array([[1.0]])}),
            "truth": Judged({"helpfulness": np.array([[3.0]]), "is_safe": np.array([[1.0]])}),
        },
    )
    assert [values.tolist() for values in points_of(both)] == [[0.0], [2.0]]


def test_a_prompt_that_nobody_judged_is_nan_without_a_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        x, y = points_of(answers(is_safe=[[NAN], [1]], helpfulness=[[NAN], [2]]))
    np.testing.assert_array_equal(x, [NAN, 1.0])
    np.testing.assert_array_equal(y, [NAN, 2.0])


@pytest.mark.parametrize("outputs", [{"is_safe": [[1]]}, {"helpfulness": [[1]]}, {"harmlessness": [[1]]}])
def test_points_need_both_sides(outputs: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no judge says how safe and how helpful"):
        points_of(answers(**outputs))


# ------------------------------------------------------------------------------------------------ front
FRONTS = [
    # one point: its height everywhere
    ([(0.5, 2.0)], 0.1, 2.0),
    ([(0.5, 2.0)], 0.5, 2.0),
    ([(0.5, 2.0)], 0.9, 2.0),
    # a line from (0, 3) to (1, 1), half way
    ([(0.0, 3.0), (1.0, 1.0)], 0.5, 2.0),
    ([(1.0, 1.0), (0.0, 3.0)], 0.25, 2.5),
    # a point below the line is in no front, one above it bends the front: up to (0.5, 2.8), then down
    ([(0.0, 3.0), (0.5, 1.9), (1.0, 1.0)], 0.5, 2.0),
    ([(0.0, 3.0), (0.5, 2.8), (1.0, 1.0)], 0.5, 2.8),
    ([(0.0, 3.0), (0.5, 2.8), (1.0, 1.0)], 0.75, 1.9),
    ([(0.0, 3.0), (0.5, 2.8), (1.0, 1.0)], 0.25, 2.9),
    # two points that a third one hides both: (0, 4) to (1, 0) passes over (0.25, 2.9) and (0.5, 1.9)
    ([(0.0, 4.0), (0.25, 2.9), (0.5, 1.9), (1.0, 0.0)], 0.25, 3.0),
    ([(0.0, 4.0), (0.25, 2.9), (0.5, 1.9), (1.0, 0.0)], 0.5, 2.0),
    # less safe and less helpful than another: worthless
    ([(0.2, 1.0), (0.6, 3.0)], 0.2, 3.0),
    ([(0.2, 1.0), (0.6, 3.0)], 0.4, 3.0),
    ([(0.0, 1.0), (0.4, 2.0), (0.8, 3.0), (1.0, 1.0)], 0.1, 3.0),
    ([(0.0, 1.0), (0.4, 2.0), (0.8, 3.0), (1.0, 1.0)], 0.9, 2.0),
    # left and right of all points
    ([(0.4, 3.0), (0.6, 1.0)], 0.1, 3.0),
    ([(0.4, 3.0), (0.6, 1.0)], 0.9, 1.0),
    # equally safe: the higher one counts, whatever comes first
    ([(0.5, 1.0), (0.5, 2.0)], 0.5, 2.0),
    ([(0.5, 2.0), (0.5, 1.0)], 0.7, 2.0),
    ([(0.0, 4.0), (0.5, 1.0), (0.5, 3.5), (1.0, 0.0), (1.0, 1.0)], 0.75, 2.25),
    ([(0.5, 2.0), (0.5, 2.0), (1.0, 1.0)], 0.75, 1.5),
]


@pytest.mark.parametrize(("points", "at", "height"), FRONTS)
def test_heights_of_a_front(points: list[tuple[float, float]], at: float, height: float) -> None:
    for order in itertools.islice(itertools.permutations(points), 6):
        x, y = np.array(order).T
        assert height_of_front(x, y, at) == pytest.approx(height)


def best_mixture(x: Any, y: Any, at: float) -> float:
    """The most helpful mixture of any two policies that is at least as safe as asked; a slow second way."""
    best = -np.inf
    for i, j in itertools.product(range(len(x)), repeat=2):
        shares = {0.0, 1.0} | ({(at - x[j]) / (x[i] - x[j])} if x[i] != x[j] else set())
        for share in shares:
            if 0 <= share <= 1 and share * x[i] + (1 - share) * x[j] >= at - 1e-12:
                best = max(best, share * y[i] + (1 - share) * y[j])
    return best


def test_the_front_is_the_best_mixture() -> None:
    stream = np.random.default_rng(4)
    for _ in range(40):
        x, y = stream.random(5).round(1), stream.normal(size=5).round(1)
        at = float(stream.uniform(-0.1, x.max()))
        assert height_of_front(x, y, at) == pytest.approx(best_mixture(x, y, at))


# ------------------------------------------------------------------------------------------------ over the front
def coin(stream: np.random.Generator, safe: float, helpful: float, count: int = 150) -> PolicyAnswers:
    """A policy with a share of safe responses and a mean helpfulness, exactly; prompts differ."""
    flags = (np.arange(count) < round(safe * count)).astype(float)
    noise = stream.normal(0, 0.3, count)
    return answers(is_safe=stream.permutation(flags)[:, None], helpfulness=(helpful + noise - noise.mean())[:, None])


@pytest.mark.parametrize(("height", "sign"), [(2.5, 1), (1.5, -1)])
def test_above_and_below_the_front(height: float, sign: int) -> None:
    """The front goes from (0.2, 3) to (0.8, 1), so it is 2 high where half of the responses are safe."""
    stream = np.random.default_rng(5)
    fixed = [coin(stream, 0.2, 3.0), coin(stream, 0.8, 1.0)]
    found = over_front(prompts(150), coin(stream, 0.5, height), fixed, draws=400)
    assert found["over_front"] == pytest.approx(sign * 0.5)
    assert found["over_front_low"] < found["over_front"] < found["over_front_high"]
    assert sign * found["over_front_low"] > 0 and sign * found["over_front_high"] > 0
    assert found["over_front_n"] == 150


def test_the_interval_of_the_height_by_another_bootstrap() -> None:
    """Prompts drawn one by one with another generator, the points averaged and the front made anew."""
    stream = np.random.default_rng(6)
    learned, *fixed = (coin(stream, *point) for point in ((0.6, 2.0), (0.2, 3.0), (0.5, 2.2), (0.8, 1.0)))
    found = over_front(prompts(150), learned, fixed, draws=3000)
    pairs = [points_of(policy) for policy in (learned, *fixed)]
    heights = []
    for _ in range(1500):
        rows = stream.integers(0, 150, 150)
        x, y = (np.array([pair[side][rows].mean() for pair in pairs]) for side in (0, 1))
        heights.append(y[0] - best_mixture(x[1:], y[1:], x[0]))
    low, high = expanded(heights, 150)
    width = high - low
    assert found["over_front_low"] == pytest.approx(low, abs=0.15 * width)
    assert found["over_front_high"] == pytest.approx(high, abs=0.15 * width)
    narrow = over_front(prompts(150), learned, fixed, draws=3000, confidence=0.5)
    assert narrow["over_front_high"] - narrow["over_front_low"] < 0.5 * width


def test_the_policy_of_a_front_stands_on_it() -> None:
    stream = np.random.default_rng(7)
    fixed = [coin(stream, 0.2, 3.0), coin(stream, 0.5, 2.9), coin(stream, 0.8, 1.0)]
    assert over_front(prompts(150), fixed[1], fixed, draws=0) == pytest.approx({"over_front": 0.0, "over_front_n": 150})


def test_prompts_of_one_text_are_drawn_together() -> None:
    """Copies of a prompt are no more evidence than one."""
    stream = np.random.default_rng(8)
    few = [coin(stream, safe, helpful, 10) for safe, helpful in ((0.5, 2.0), (0.2, 3.0), (0.8, 1.0))]
    columns = [policy.judged["truth"].values for policy in few]
    many = [answers(**{name: np.repeat(value, 4, axis=0) for name, value in said.items()}) for said in columns]
    texts = [f"prompt {i // 4}" for i in range(40)]
    one = over_front(prompts(10), few[0], few[1:], draws=500)
    copies = over_front(prompts(40, texts), many[0], many[1:], draws=500)
    for name in ("over_front", "over_front_low", "over_front_high"):
        assert copies[name] == pytest.approx(one[name])
    # and a single prompt has no interval at all
    alone = over_front(prompts(10, ["the same"] * 10), few[0], few[1:], draws=500)
    assert set(alone) == {"over_front", "over_front_n"}


def test_prompts_of_unequal_numbers_of_rows() -> None:
    """One prompt stands once and one nine times, so draws differ in rows: means are over the rows of the draw."""
    texts = ["once", *["often"] * 9]
    learned, fixed = (answers(is_safe=np.ones((10, 1)), helpfulness=np.full((10, 1), y)) for y in (3.0, 2.0))
    found = over_front(prompts(10, texts), learned, [fixed], draws=50)
    assert [found[name] for name in ("over_front", "over_front_low", "over_front_high")] == pytest.approx([1, 1, 1])


def test_prompts_that_one_policy_has_no_score_for_are_left_out() -> None:
    fixed = [answers(is_safe=[[0], [1], [0]], helpfulness=[[2], [4], [NAN]])]
    learned = answers(is_safe=[[1], [0], [1]], helpfulness=[[5], [5], [100]])
    found = over_front(prompts(3), learned, fixed, draws=0)
    assert found == pytest.approx({"over_front": 5.0 - 3.0, "over_front_n": 2})
    nobody = answers(is_safe=[[NAN]] * 3, helpfulness=[[NAN]] * 3)
    assert over_front(prompts(3), nobody, fixed) == {}


@pytest.mark.parametrize(("fixed", "error"), [(list, ValueError), (lambda: [answers(harmlessness=[[1]])], UserError)])
def test_a_front_of_nothing(fixed: Callable[[], list[PolicyAnswers]], error: type[Exception]) -> None:
    with pytest.raises(error):
        over_front(prompts(1), answers(is_safe=[[1]], helpfulness=[[1]]), fixed())
