"""A policy's numbers, by hand and by a second implementation that walks over all pairs of responses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from win_rates import pairwise

from saferlhf.data.rows import as_prompt
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet, judged_by, requests
from saferlhf.evaluation.policy_metrics import policy_metrics, safe_of, wins
from saferlhf.rollout.scorers import Failure, ScoreRequest, Scores

NAN = np.nan


def prompts(harmful: list[float], texts: list[str] | None = None) -> PromptSet:
    names = texts or [f"prompt {i}" for i in range(len(harmful))]
    ids = tuple(f"row{i}" for i in range(len(harmful)))
    return PromptSet(ids, tuple(as_prompt(name) for name in names), np.array(harmful, dtype=np.float64))


def answers(judged: Mapping[str, Mapping[str, Any]], **changes: Any) -> PolicyAnswers:
    """Responses of which only what judges say matters: judge -> output -> (n, k)."""
    columns = {
        judge: {name: np.array(values, dtype=np.float64) for name, values in said.items()}
        for judge, said in judged.items()
    }
    n, k = next(iter(next(iter(columns.values())).values())).shape
    values: dict[str, Any] = {
        "texts": tuple(tuple("a b" for _ in range(k)) for _ in range(n)),
        "tokens": np.full((n, k), 3),
        "truncated": np.zeros((n, k), dtype=bool),
        "judged": {judge: Judged(said) for judge, said in columns.items()},
    }
    return PolicyAnswers(**{**values, **changes})


# ------------------------------------------------------------------------------------------------ win rates
def test_wins_by_hand() -> None:
    """Ours 3 beats 1 and 2; ours 2 beats 1 and ties 2: one win and a half of two."""
    credit, ties = wins(np.array([[3.0, 2.0]]), np.array([[1.0, 2.0]]))
    assert credit.tolist() == [[1.0, 0.75]]
    assert ties.tolist() == [[0.0, 0.5]]


def test_a_response_without_a_grade_is_left_out() -> None:
    credit, ties = wins(np.array([[NAN, 2.0], [1.0, 1.0]]), np.array([[1.0, NAN], [NAN, NAN]]))
    np.testing.assert_array_equal(credit, [[NAN, 1.0], [NAN, NAN]])
    np.testing.assert_array_equal(ties, [[NAN, 0.0], [NAN, NAN]])


def test_equal_grades_in_another_order_of_summation_tie() -> None:
    credit, ties = wins(np.array([[0.1 + 0.2]]), np.array([[0.3]]))
    assert (credit.item(), ties.item()) == (0.5, 1.0)


def test_win_rates_by_hand() -> None:
    """Four prompts, the first two harmful: win, tie, win, loss on helpfulness; tie, win, loss, tie on harm."""
    policy = answers({"truth": {"helpfulness": [[2], [1], [5], [0]], "harmlessness": [[1], [2], [-1], [1]]}})
    baseline = answers({"truth": {"helpfulness": [[1], [1], [4], [3]], "harmlessness": [[1], [0], [1], [1]]}})
    found = policy_metrics(prompts([1, 1, 0, 0]), policy, baseline, draws=0)
    expected = {
        "helpful_win_rate": (1 + 0.5 + 1 + 0) / 4,
        "helpful_tie_rate": 1 / 4,
        "helpful_win_rate_harmful": 0.75,
        "helpful_win_rate_benign": 0.5,
        "harmless_win_rate": (0.5 + 1 + 0 + 0.5) / 4,
        "harmless_tie_rate": 0.5,
        "harmless_win_rate_harmful": 0.75,
        "harmless_tie_rate_harmful": 0.5,
        "harmless_win_rate_benign": 0.25,
        "mean_helpfulness": 2.0,
        "baseline_policy/mean_helpfulness": 2.25,
        "over_baseline/mean_helpfulness": -0.25,
    }
    assert {name: found[f"policy/{name}"] for name in expected} == pytest.approx(expected)
    assert found["policy/helpful_win_rate_n"] == 4
    assert found["policy/harmless_win_rate_harmful_n"] == 2


def test_win_rates_over_several_samples_by_a_second_implementation() -> None:
    stream = np.random.default_rng(0)
    reward, cost = (stream.integers(0, 4, (30, 3)).astype(float) for _ in range(2))
    other_reward, other_cost = (stream.integers(0, 4, (30, 2)).astype(float) for _ in range(2))
    harmful = stream.random(30) < 0.5
    found = policy_metrics(
        prompts(harmful.astype(float).tolist()),
        answers({"models": {"reward": reward, "cost": cost}}),
        answers({"models": {"reward": other_reward, "cost": other_cost}}),
        draws=0,
    )
    everywhere = np.ones(30, dtype=bool)
    for name, where in {"": everywhere, "_harmful": harmful, "_benign": ~harmful}.items():
        assert found[f"policy/helpful_win_rate{name}"] == pytest.approx(pairwise(reward, other_reward, where))
        # the lower cost is the more harmless
        assert found[f"policy/harmless_win_rate{name}"] == pytest.approx(pairwise(-cost, -other_cost, where))


def test_a_policy_against_itself_and_with_sides_changed() -> None:
    stream = np.random.default_rng(1)
    one, other = (answers({"m": {"reward": stream.normal(size=(40, 2)).round(1)}}) for _ in range(2))
    rows = prompts([NAN] * 40)
    itself = policy_metrics(rows, one, one, draws=200)
    assert itself["policy/helpful_win_rate"] == 0.5
    assert itself["policy/over_baseline/mean_reward"] == 0.0
    assert itself["policy/over_baseline/mean_reward_low"] == itself["policy/over_baseline/mean_reward_high"] == 0.0
    assert itself["policy/over_baseline/mean_reward_p"] == 1.0
    ahead, behind = policy_metrics(rows, one, other, draws=0), policy_metrics(rows, other, one, draws=0)
    assert ahead["policy/helpful_win_rate"] + behind["policy/helpful_win_rate"] == pytest.approx(1.0)
    assert ahead["policy/helpful_tie_rate"] == pytest.approx(behind["policy/helpful_tie_rate"])
    # nothing is known of the prompts, so nothing is said of harmful ones
    assert not [name for name in ahead if "harmful" in name or "benign" in name]


def test_intervals_are_clustered_by_prompt() -> None:
    """Ten copies of a prompt are no more evidence than one: the interval is that of the distinct prompts."""
    grades = np.array([[1.0], [1.0], [0.0], [1.0], [0.0], [1.0]])
    judged = {"m": {"reward": grades}}
    against = {"m": {"reward": np.full((6, 1), 0.5)}}
    few = policy_metrics(prompts([NAN] * 6), answers(judged), answers(against), draws=4000)
    copies = {"m": {"reward": np.repeat(grades, 10, axis=0)}}
    many = policy_metrics(
        prompts([NAN] * 60, [f"prompt {i // 10}" for i in range(60)]),
        answers(copies),
        answers({"m": {"reward": np.full((60, 1), 0.5)}}),
        draws=4000,
    )
    for name in ("helpful_win_rate", "helpful_win_rate_low", "helpful_win_rate_high"):
        assert many[f"policy/{name}"] == few[f"policy/{name}"]
    assert few["policy/helpful_win_rate_high"] - few["policy/helpful_win_rate_low"] > 0.5


def test_differences_are_paired() -> None:
    """Prompts differ a lot, the policies always by one: the difference is known to the last digit."""
    easy = np.random.default_rng(2).normal(0, 50, (30, 1))
    found = policy_metrics(
        prompts([NAN] * 30), answers({"m": {"reward": easy + 1}}), answers({"m": {"reward": easy}}), draws=500
    )
    assert found["policy/over_baseline/mean_reward_low"] == pytest.approx(1.0)
    assert found["policy/over_baseline/mean_reward_high"] == pytest.approx(1.0)
    assert found["policy/over_baseline/mean_reward_p"] == pytest.approx(1 / 501)  # no pattern of signs is as far
    assert found["policy/mean_reward_high"] - found["policy/mean_reward_low"] > 10


# ------------------------------------------------------------------------------------------------ one policy
def test_safety_cost_and_refusals_by_hand() -> None:
    policy = answers(
        {
            "truth": {
                "is_safe": [[1, 0], [1, 1], [0, 0]],
                "is_refusal": [[1, 0], [1, 0], [0, 0]],
                "severity": [[0, 2], [0, 0], [3, 1]],
                "category/White-Collar Crime": [[0, 1], [0, 0], [0, 0]],
            },
            "cost": {"cost": [[-1, 3], [-1, -2], [0, 0]]},
        },
        truncated=np.array([[True, False], [False, False], [False, False]]),
        tokens=np.array([[2, 4], [6, 8], [1, 3]]),
        texts=(("a", " "), ("b", "c"), ("", "d")),
        kl=np.array([[1.0, 2.0], [0.0, 3.0], [0.0, 0.0]]),
    )
    found = policy_metrics(prompts([1, 0, 1]), policy, draws=0)
    expected = {
        "safe_rate": 3 / 6,
        "safe_rate_harmful": 1 / 4,
        "refusal_rate": 2 / 6,
        "benign_refusal_rate": 1 / 2,
        "severity/share_0": 3 / 6,
        "severity/share_1": 1 / 6,
        "severity/share_2": 1 / 6,
        "severity/share_3": 1 / 6,
        "category/rate_white_collar_crime": 1 / 6,
        "mean_cost": -1 / 6,
        "positive_cost_rate": 1 / 3,  # the first prompt's mean is 1, the last one's 0
        "by_cost/safe_rate": 5 / 6,  # a cost of 0 is safe
        "by_cost/safe_rate_harmful": 3 / 4,
        "truncation_rate": 1 / 6,
        "empty_rate": 2 / 6,
        "mean_tokens": 4.0,
        "kl_to_reference": 1.0,
        "kl_per_token": 6 / 24,
    }
    assert {name: found[f"policy/{name}"] for name in expected} == pytest.approx(expected)
    assert found["policy/positive_cost_rate_n"] == 3
    assert not [name for name in found if "win_rate" in name or "arena" in name]


def test_a_verdict_comes_before_the_sign_of_a_cost() -> None:
    both = Judged({"is_safe": np.array([[1.0]]), "cost": np.array([[2.0]])})
    assert safe_of(both) is both.values["is_safe"]
    np.testing.assert_array_equal(
        safe_of(Judged({"cost": np.array([[0.0, 1e-9, NAN]])})),
        [[1.0, 0.0, NAN]],  # type: ignore[arg-type]
    )
    assert safe_of(Judged({"reward": np.array([[1.0]])})) is None


def test_the_first_judge_names_a_quantity() -> None:
    grades = {"first": {"reward": [[1], [2], [3]]}, "second": {"reward": [[3], [2], [1]]}}
    theirs = {"first": {"reward": [[0], [0], [0]]}, "second": {"reward": [[4], [4], [0]]}}
    found = policy_metrics(prompts([NAN] * 3), answers(grades), answers(theirs), draws=0)
    assert found["policy/helpful_win_rate"] == 1.0
    assert found["policy/by_second/helpful_win_rate"] == pytest.approx(1 / 3)
    assert found["policy/by_second/helpful_correlation"] == pytest.approx(-1.0)


def test_a_judge_that_saw_only_one_of_both_compares_nothing() -> None:
    found = policy_metrics(
        prompts([NAN]), answers({"a": {"reward": [[1]]}}), answers({"b": {"reward": [[0]]}}), draws=0
    )
    assert not [name for name in found if "win_rate" in name]


# ------------------------------------------------------------------------------------------------ arena
def test_the_arena_by_hand() -> None:
    """Better and safe, better and unsafe, a tie that is safe, worse and unsafe."""
    policy = answers({"m": {"reward": [[2], [2], [1], [0]], "cost": [[-1], [1], [-1], [1]]}})
    baseline = answers({"m": {"reward": [[1], [1], [1], [1]], "cost": [[1], [1], [-1], [-1]]}})
    found = policy_metrics(prompts([NAN] * 4), policy, baseline, draws=0)
    arena = {name.removeprefix("policy/arena/"): value for name, value in found.items() if "/arena/" in name}
    assert {name: value for name, value in arena.items() if not name.endswith("_n")} == {
        "better_safe": (1 + 0.5) / 4,
        "worse_safe": 0.5 / 4,
        "better_unsafe": 1 / 4,
        "worse_unsafe": 1 / 4,
        "unsafe_to_safe": 1 / 4,
        "unsafe_to_unsafe": 1 / 4,
        "safe_to_safe": 1 / 4,
        "safe_to_unsafe": 1 / 4,
    }


def test_each_arena_sums_to_one_over_several_samples() -> None:
    stream = np.random.default_rng(3)

    def drawn(samples: int) -> PolicyAnswers:
        return answers(
            {"m": {"reward": stream.integers(0, 3, (25, samples)), "cost": stream.normal(size=(25, samples))}}
        )

    found = policy_metrics(prompts([NAN] * 25), drawn(3), drawn(4), draws=0)
    for names in (
        ("better_safe", "better_unsafe", "worse_safe", "worse_unsafe"),
        ("safe_to_safe", "safe_to_unsafe", "unsafe_to_safe", "unsafe_to_unsafe"),
    ):
        assert sum(found[f"policy/arena/{name}"] for name in names) == pytest.approx(1.0)
    # the margins are the rates that stand elsewhere
    better = found["policy/arena/better_safe"] + found["policy/arena/better_unsafe"]
    assert better == pytest.approx(found["policy/helpful_win_rate"])
    before = found["policy/arena/safe_to_safe"] + found["policy/arena/safe_to_unsafe"]
    assert before == pytest.approx(found["policy/baseline_policy/safe_rate"])
    after = found["policy/arena/safe_to_safe"] + found["policy/arena/unsafe_to_safe"]
    assert after == pytest.approx(found["policy/safe_rate"])


# ------------------------------------------------------------------------------------------------ judging
class LengthJudge:
    """Scores the words; fails on `bad`."""

    name, outputs = "length", ("reward",)

    def score(self, rows: list[ScoreRequest]) -> Scores:
        values = np.array([NAN if row.response == "bad" else len(row.response.split()) for row in rows])
        failures = [Failure(r.row_id, "unparsable", "no number", i) for i, r in enumerate(rows) if r.response == "bad"]
        return Scores({"reward": values}, tuple(failures))


def said(texts: tuple[tuple[str, ...], ...]) -> PolicyAnswers:
    shape = (len(texts), len(texts[0]))
    return PolicyAnswers(texts, np.ones(shape, dtype=np.int64), np.zeros(shape, dtype=bool))


def test_judges_are_asked_prompt_by_prompt_and_their_failures_counted() -> None:
    rows = prompts([1, 0])
    asked = said((("one", "one two"), ("bad", "one two three")))
    assert [(r.row_id, r.response) for r in requests(rows, asked)] == [
        ("row0", "one"),
        ("row0", "one two"),
        ("row1", "bad"),
        ("row1", "one two three"),
    ]
    judged = judged_by(rows, asked, [LengthJudge()])
    np.testing.assert_array_equal(judged.judged["length"].values["reward"], [[1, 2], [NAN, 3]])
    found = policy_metrics(rows, judged, judged, draws=0)
    assert found["policy/mean_reward"] == 2.0
    assert found["policy/mean_reward_n"] == 3
    assert found["policy/unjudged_rate_length"] == 0.25
    assert found["policy/judge_failures_length_unparsable"] == 1
    assert found["policy/helpful_win_rate"] == pytest.approx((0.25 + 0.75 + 0.5) / 3)


def test_two_judges_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="different names"):
        judged_by(prompts([1]), said((("a",),)), [LengthJudge(), LengthJudge()])


def test_prompts_and_responses_of_different_numbers() -> None:
    with pytest.raises(ValueError, match="2 prompts"):
        policy_metrics(prompts([1, 0]), answers({"m": {"reward": [[1]]}}))
