"""The arena of many policies: by hand, against the evaluation of pairs, on made-up strengths; pictures and tables."""

from __future__ import annotations

import itertools
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from rich.console import Console
from win_rates import pairwise

from saferlhf.data.rows import Turn
from saferlhf.errors import UserError
from saferlhf.evaluation.arena import (
    Arena,
    SafetySides,
    Share,
    arena_metrics,
    judged_scores,
    measure_arena,
    safety_metrics,
    safety_sides,
    slug,
)
from saferlhf.evaluation.arena_plots import (
    ratings_png,
    ratings_svg,
    ratings_table,
    safety_png,
    safety_svg,
    safety_table,
    win_rates_png,
    win_rates_svg,
)
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_metrics import policy_metrics
from saferlhf.evaluation.report_style import STYLE
from saferlhf.ops.intervals import cluster_codes
from saferlhf.ops.ratings import ELO, bradley_terry, elo
from saferlhf.ops.significance import holm, sign_flip_p

Floats = NDArray[np.float64]


def texts(count: int) -> list[str]:
    return [f"prompt {i}" for i in range(count)]


def made_up(strengths: dict[str, float], prompts: int, answers: int = 1, seed: int = 0) -> dict[str, Floats]:
    """Scores whose differences are logistic: P(a beats b) = sigmoid of the difference of their strengths."""
    draw = np.random.default_rng(seed)
    return {name: strength + draw.gumbel(size=(prompts, answers)) for name, strength in strengths.items()}


FOUR = {"SFT": 0.0, "PPO": 0.8, "nu 1": 0.3, "nu 0.5": 1.5}


def same(ours: Arena, theirs: Arena, order: list[int], tolerance: float = 1e-9) -> None:
    """`theirs` is `ours` with its policies in another order."""
    square = np.ix_(order, order)
    for name in ("win_rates", "tie_rates"):
        for end in ("value", "low", "high"):
            mine, other = (getattr(getattr(arena, name), end) for arena in (ours, theirs))
            np.testing.assert_allclose(other, mine[square], atol=tolerance)
    for end in ("value", "low", "high"):
        mine, other = (getattr(arena.ratings, end) for arena in (ours, theirs))
        np.testing.assert_allclose(other, mine[order], atol=tolerance)
    np.testing.assert_allclose(theirs.best, ours.best[order], atol=tolerance)
    np.testing.assert_allclose(theirs.p_values, ours.p_values[square], atol=tolerance)
    np.testing.assert_allclose(theirs.p_adjusted, ours.p_adjusted[square], atol=tolerance)
    assert theirs.misfit == pytest.approx(ours.misfit, abs=tolerance)


# ------------------------------------------------------------------------------------------------ values
def test_two_policies_by_hand() -> None:
    scores = {"a": [1.0, 1.0, 1.0, 0.0], "b": [0.0, 0.0, 0.0, 1.0]}
    found = measure_arena(scores, texts(4), prior=0.0, draws=0)
    assert found.win_rates.value.tolist() == [[0.5, 0.75], [0.25, 0.5]]
    assert found.tie_rates.value.tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert np.ptp(found.ratings.value) == pytest.approx(190.85, abs=0.005)
    assert found.ratings.value.sum() == pytest.approx(0.0, abs=1e-9)
    assert (found.prompts, found.unscored, found.ranking) == (4, 0, [0, 1])
    assert found.misfit == pytest.approx(0.0, abs=1e-9)
    # without draws there is nothing but values
    assert np.isnan([found.ratings.low, found.ratings.high, found.best]).all() and np.isnan(found.p_adjusted).all()
    assert np.isnan(found.win_rates.low).all()
    measured = measure_arena(scores, texts(4), baseline="b", prior=0.0, draws=0)
    np.testing.assert_allclose(measured.ratings.value, [400 * np.log10(3), 0.0])


def test_ties_are_half_wins_and_a_prompt_is_one_game() -> None:
    # prompt 1: four pairs, two won and one tied; prompt 2: one answer of b, all tied
    scores = {"a": [[2.0, 1.0], [1.0, 1.0]], "b": [[1.0, 1.5], [1.0, 1.0]]}
    found = measure_arena(scores, texts(2), draws=0)
    assert found.win_rates.value[0, 1] == pytest.approx((2.5 / 4 + 0.5) / 2)
    assert found.tie_rates.value[0, 1] == found.tie_rates.value[1, 0] == pytest.approx((0.25 + 1.0) / 2)
    games = np.array([[0, 1.125], [0.875, 0]])
    np.testing.assert_allclose(found.ratings.value, elo(bradley_terry(games)))


@pytest.mark.parametrize("answers", [1, 3])
def test_win_rates_as_pair_after_pair(answers: int) -> None:
    scores = {name: np.round(table, 0) for name, table in made_up(FOUR, 40, answers, seed=3).items()}
    found = measure_arena(scores, texts(40), draws=0)
    for i, j in itertools.permutations(range(4), 2):
        expected = pairwise(scores[found.names[i]], scores[found.names[j]], np.ones(40, bool))
        assert found.win_rates.value[i, j] == pytest.approx(expected)
    assert found.tie_rates.value[0, 1] > 0.1, "rounded scores tie"


def test_lower_is_better_for_a_cost() -> None:
    scores = made_up(FOUR, 60, 2)
    options: dict[str, Any] = {"draws": 300, "dimension": "harmless", "baseline": "SFT"}
    ours = measure_arena(scores, texts(60), **options)
    costs = measure_arena({n: -x for n, x in scores.items()}, texts(60), higher_is_better=False, **options)
    same(ours, costs, [0, 1, 2, 3], tolerance=0.0)


# ------------------------------------------------------------------------------------------------ intervals, tests
def as_answers(scores: Floats, **more: Floats) -> PolicyAnswers:
    n, k = scores.shape
    nothing = np.zeros((n, k), dtype=bool)
    words = tuple(tuple("a" for _ in range(k)) for _ in range(n))
    return PolicyAnswers(words, nothing.astype(np.int64), nothing, judged={"judge": Judged({"reward": scores, **more})})


def prompt_set(keys: list[str], harmful: Floats | None = None) -> PromptSet:
    marks = np.zeros(len(keys)) if harmful is None else harmful
    return PromptSet(tuple(map(str, range(len(keys)))), tuple((Turn("user", key),) for key in keys), marks)


def test_a_pair_as_the_evaluation_of_a_policy_measures_it() -> None:
    scores = {name: np.round(table, 1) for name, table in made_up({"a": 0.4, "b": 0.0}, 50, 2).items()}
    keys = [f"prompt {i // 2}" for i in range(50)]  # two rows a prompt
    prompts, (a, b) = prompt_set(keys), (as_answers(scores[name]) for name in "ab")
    metrics = policy_metrics(prompts, a, b, draws=500, seed=3)
    found = measure_arena(scores, prompts.texts, draws=500, seed=3)
    for name, rates in (("win", found.win_rates), ("tie", found.tie_rates)):
        for ending, values in (("", rates.value), ("_low", rates.low), ("_high", rates.high)):
            assert values[0, 1] == pytest.approx(metrics[f"policy/helpful_{name}_rate{ending}"], abs=1e-12)


def test_ratings_are_taken_from_the_draws_of_the_win_rates() -> None:
    """Of two policies the one is a growing function of the other; with 401 draws both ends are values of draws."""
    scores = made_up({"a": 0.0, "b": 0.6}, 90, 2)
    found = measure_arena(scores, texts(90), baseline="a", prior=0.0, draws=401, seed=5)
    for ratings, rates in ((found.ratings.low, found.win_rates.low), (found.ratings.high, found.win_rates.high)):
        assert ratings[1] == pytest.approx(ELO * np.log(rates[1, 0] / (1 - rates[1, 0])), abs=1e-6)


def test_the_order_of_the_policies_changes_nothing() -> None:
    scores = made_up(FOUR, 50, 2, seed=5)
    options: dict[str, Any] = {"draws": 400, "baseline": "PPO", "seed": 1}
    ours = measure_arena(scores, texts(50), **options)
    order = [2, 0, 3, 1]
    turned = {ours.names[i]: scores[ours.names[i]] for i in order}
    same(ours, measure_arena(turned, texts(50), **options), order)


def test_rows_of_one_prompt_are_one_observation() -> None:
    scores = made_up(FOUR, 30, seed=8)
    copies = {name: np.repeat(table, 4, axis=0) for name, table in scores.items()}
    once = measure_arena(scores, texts(30), draws=300)
    # four games in place of one, against a prior of as many more
    four = measure_arena(copies, [text for text in texts(30) for _ in range(4)], draws=300, prior=2.0)
    same(replace(once, tie_rates=four.tie_rates), four, [0, 1, 2, 3])  # a tie rate of 0 is by Wilson, over prompts too
    apart = measure_arena(copies, texts(120), draws=300, prior=2.0)
    widths = [arena.ratings.high - arena.ratings.low for arena in (four, apart)]
    assert (widths[0] > 1.5 * widths[1]).all()


def test_p_values_are_paired_and_adjusted_over_all_pairs() -> None:
    scores = made_up(FOUR, 35, 2, seed=2)
    found = measure_arena(scores, texts(35), draws=400, seed=6)
    p = []
    for a, b in itertools.combinations(scores, 2):
        x, y = scores[a], scores[b]
        credit = (x[:, :, None] > y[:, None, :]).mean(axis=(1, 2))
        p.append(sign_flip_p(credit - 0.5, cluster_codes(texts(35)), draws=400, seed=6))
    above = np.triu_indices(4, 1)
    np.testing.assert_allclose(found.p_values[above], p)
    np.testing.assert_allclose(found.p_adjusted[above], holm(p))
    np.testing.assert_array_equal(found.p_values, found.p_values.T)
    assert np.isnan(np.diag(found.p_adjusted)).all()
    # equal policies are alike
    twins = measure_arena({"a": scores["PPO"], "b": scores["PPO"]}, texts(35), draws=400)
    assert twins.p_values[0, 1] == 1.0


def test_prompts_without_a_score_count_nowhere() -> None:
    scores = made_up(FOUR, 40, 2, seed=4)
    holes = {name: table.copy() for name, table in scores.items()}
    holes["PPO"][3, 1], holes["SFT"][7, :], holes["nu 1"][7, 0], holes["nu 0.5"][39, 0] = np.nan, np.nan, np.nan, np.inf
    kept = np.setdiff1d(np.arange(40), [3, 7, 39])
    found = measure_arena(holes, texts(40), draws=200)
    expected = measure_arena({n: x[kept] for n, x in scores.items()}, [texts(40)[i] for i in kept], draws=200)
    same(expected, found, [0, 1, 2, 3], tolerance=0.0)
    assert (found.prompts, found.unscored) == (37, 3)
    holes["PPO"][:] = np.nan
    with pytest.raises(UserError, match="no prompt on which every answer"):
        measure_arena(holes, texts(40))


def test_one_prompt_has_no_interval() -> None:
    found = measure_arena({"a": [[1.0, 0.0, 1.0]], "b": [[0.5]]}, ["only"], draws=50)
    assert found.win_rates.value[0, 1] == pytest.approx(2 / 3)
    assert np.isnan([found.ratings.low, found.ratings.high, found.best]).all() and np.isnan(found.win_rates.low).all()


# ------------------------------------------------------------------------------------------------ strengths
def test_known_strengths_are_found() -> None:
    found = measure_arena(made_up(FOUR, 4000, seed=1), texts(4000), baseline="SFT", draws=200)
    truth = ELO * np.array(list(FOUR.values()))
    np.testing.assert_allclose(found.ratings.value, truth, atol=25.0)
    assert found.best[3] == 1.0 and found.misfit < 0.02
    assert (found.ratings.high - found.ratings.low)[1:].max() < 30.0
    assert [found.names[i] for i in found.ranking] == ["nu 0.5", "PPO", "nu 1", "SFT"]


def test_intervals_hold_the_truth_as_often_as_they_promise() -> None:
    """Nominal 90%; percentile intervals over 80 prompts are a little short of it."""
    truth = ELO * (np.array(list(FOUR.values())) - np.mean(list(FOUR.values())))
    hits = []
    for seed in range(150):
        found = measure_arena(made_up(FOUR, 80, seed=100 + seed), texts(80), draws=200, confidence=0.9, seed=seed)
        hits.append((found.ratings.low < truth) & (truth < found.ratings.high))
    assert 0.85 < np.mean(hits) < 0.94
    assert (np.mean(hits, axis=0) > 0.8).all()


def test_the_best_of_two_equals_is_open() -> None:
    x, y = made_up({"x": 0.0, "y": 0.0}, 100).values()
    scores = {"a": np.concatenate([x, y]), "b": np.concatenate([y, x]), "weak": np.full((200, 1), -9.0)}
    found = measure_arena(scores, texts(200), draws=1000)
    assert found.best.sum() == pytest.approx(1.0) and found.best[2] == 0.0
    assert found.best[0] == pytest.approx(0.5, abs=0.06)


def test_a_circle_is_seen_in_the_misfit() -> None:
    # each beats the next in two prompts of three: all are alike by their ratings, and none is by its pairs
    circle = {"rock": [2.0, 1.0, 0.0] * 5, "paper": [1.0, 0.0, 2.0] * 5, "scissors": [0.0, 2.0, 1.0] * 5}
    found = measure_arena(circle, texts(15), draws=0)
    np.testing.assert_allclose(found.ratings.value, 0.0, atol=1e-9)
    assert found.misfit == pytest.approx(1 / 6)


def test_no_interval_where_one_side_won_every_point() -> None:
    scores = made_up(FOUR, 50, seed=2)
    scores["PPO"] = scores["PPO"] + 1000.0
    middle = measure_arena(scores, texts(50), draws=200)
    known = ~np.isnan(middle.ratings.low)
    assert known.tolist() == [True, False, True, True] and np.isfinite(middle.ratings.value).all()
    assert middle.best.tolist() == [0.0, 1.0, 0.0, 0.0]
    assert middle.win_rates.value[1, 0] == 1.0 and 0.9 < middle.win_rates.low[1, 0] < 1.0, "Wilson"
    from_sft = measure_arena(scores, texts(50), draws=200, baseline="SFT")
    assert (~np.isnan(from_sft.ratings.low)).tolist() == [False, False, True, True], "none for the baseline itself"
    from_ppo = measure_arena(scores, texts(50), draws=200, baseline="PPO")
    assert np.isnan(from_ppo.ratings.low).all()
    pair = measure_arena({"a": scores["SFT"], "b": scores["PPO"]}, texts(50), draws=200)
    assert np.isnan(pair.ratings.low).all() and pair.ratings.value[1] > 300


def test_without_a_prior_a_policy_that_wins_all_leaves_no_ratings() -> None:
    scores = {"a": [1.0, 2.0, 1.0], "b": [0.0, 0.0, 0.0]}
    found = measure_arena(scores, texts(3), prior=0.0, draws=100)
    assert np.isnan([found.ratings.value, found.best]).all() and found.win_rates.value[0, 1] == 1.0
    metrics = arena_metrics(found)
    assert not [name for name in metrics if name.endswith(("_elo", "_best_share", "misfit"))]
    assert metrics["arena/helpful/a_over_b_win_rate"] == 1.0
    assert lines_of(ratings_table(found))[3:] == ["a", "b"]
    assert ratings_svg(found).startswith("<svg") and win_rates_svg(found).startswith("<svg")


def test_no_interval_where_two_halves_never_met_as_equals() -> None:
    weak, strong = made_up({"a": 0.0, "b": 0.2}, 40), made_up({"c": 1000.0, "d": 1000.2}, 40, seed=1)
    halves = measure_arena(weak | strong, texts(40), draws=100)
    assert np.isnan(halves.ratings.low).all() and np.isfinite(halves.ratings.value).all()
    anchored = measure_arena(weak | strong, texts(40), draws=100, baseline="a")
    assert (~np.isnan(anchored.ratings.low)).tolist() == [False, True, False, False]


# ------------------------------------------------------------------------------------------------ metrics, input
def test_flat_metrics() -> None:
    found = measure_arena(made_up(FOUR, 40, 2), texts(40), draws=200, baseline="nu 1")
    metrics = arena_metrics(found)
    assert all(np.isfinite(value) for value in metrics.values())
    area = "arena/helpful"
    for ending, values in (("", found.ratings.value), ("_low", found.ratings.low), ("_high", found.ratings.high)):
        assert metrics[f"{area}/nu_0.5_elo{ending}"] == values[3]
    assert metrics[f"{area}/nu_1_elo"] == 0.0 and f"{area}/nu_1_elo_low" not in metrics
    pairs = {name.removesuffix("_win_rate") for name in metrics if name.endswith("_win_rate")}
    over = ["sft_over_ppo", "sft_over_nu_1", "sft_over_nu_0.5", "ppo_over_nu_1", "ppo_over_nu_0.5", "nu_0.5_over_nu_1"]
    assert pairs == {f"{area}/{pair}" for pair in over}
    turned = f"{area}/nu_0.5_over_nu_1"
    assert metrics[f"{turned}_win_rate"] == found.win_rates.value[3, 2] > 0.5
    assert metrics[f"{turned}_win_rate_low"] == found.win_rates.low[3, 2] < metrics[f"{turned}_win_rate"]
    assert metrics[f"{turned}_win_rate_high"] == found.win_rates.high[3, 2] > metrics[f"{turned}_win_rate"]
    assert metrics[f"{turned}_p_holm"] == found.p_adjusted[3, 2] >= metrics[f"{turned}_p"]
    assert metrics[f"{turned}_tie_rate"] == 0.0
    assert metrics[f"{area}/ppo_best_share"] == found.best[1]
    assert (metrics[f"{area}/prompts"], metrics[f"{area}/unscored"]) == (40.0, 0.0)
    other = arena_metrics(replace(found, dimension="harmless"), "compare/arena")
    assert set(other) == {name.replace(area, "compare/arena/harmless") for name in metrics}
    plain = arena_metrics(measure_arena(made_up(FOUR, 40), texts(40), draws=0))
    assert not [name for name in plain if name.endswith(("_low", "_high", "_p", "_holm", "_share"))]


def test_names_in_metrics() -> None:
    assert slug("reward shaping, nu 0.5") == "reward_shaping_nu_0.5"
    assert slug("PPO-Lagrangian / a") == "ppo-lagrangian_a"


@pytest.mark.parametrize(
    ("scores", "baseline", "message"),
    [
        ({"a": [1.0, 2.0]}, None, "two policies or more, got 1"),
        ({"a": [1.0, 2.0], "b": [1.0]}, None, r"b has scores of shape \(1,\)"),
        ({"a": [1.0, 2.0], "b": [[], []]}, None, "b has scores of shape"),
        ({"a": [1.0, 2.0], "b": [1.0, 2.0]}, "c", "the baseline c is none of a, b"),
        ({"a b": [1.0, 2.0], "A_b": [1.0, 2.0]}, None, "'a b' and 'A_b' are one"),
    ],
)
def test_what_cannot_be_held_against_each_other(scores: Any, baseline: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure_arena(scores, texts(2), baseline=baseline)


def test_scores_of_one_judge() -> None:
    scores = made_up({"a": 0.0, "b": 1.0}, 5, 2)
    policies = {name: as_answers(table) for name, table in scores.items()}
    found = judged_scores(policies, "reward")
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"], scores["b"])
    # the first judge of a saw nothing of b
    only_a, both = Judged({"reward": scores["a"] + 9}), Judged({"reward": scores["a"] - 9})
    policies["a"] = replace(policies["a"], judged={"lone": only_a, **policies["a"].judged, "late": both})
    np.testing.assert_array_equal(judged_scores(policies, "reward")["a"], scores["a"])
    for wanted, judge in (("cost", None), ("reward", "lone"), ("reward", "nobody")):
        with pytest.raises(UserError, match=f"gave {wanted} for all of a, b"):
            judged_scores(policies, wanted, judge)


# ------------------------------------------------------------------------------------------------ safety
def test_safety_by_hand() -> None:
    nan = np.nan
    harmful = [1.0, 1.0, 0.0, 0.0, nan]
    safe = {"a": [[1, 0], [0, nan], [0, 0], [0, 0], [0, 0]], "b": [[1, 1], [1, 1], [0, 0], [0, 0], [0, 0]]}
    refused = {"a": [[1, 1], [1, 1], [1, 0], [0, 0], [1, 1]], "c": [[1, 1]] * 5}
    harmful, safe, refused = (
        harmful * 10,
        {name: table * 10 for name, table in safe.items()},
        {name: table * 10 for name, table in refused.items()},
    )
    sides = safety_sides(safe, refused, harmful, texts(50), draws=100)
    assert list(sides) == ["a", "b", "c"]
    attack, refusal = sides["a"]
    assert attack is not None and refusal is not None
    assert (attack.value, attack.n) == (pytest.approx(2 / 3), 30) and (refusal.value, refusal.n) == (0.25, 40)
    assert attack.low is not None and attack.low < attack.value
    assert sides["b"].attack_success is not None and sides["b"].over_refusal is None
    assert sides["b"].attack_success.value == 0.0 and (sides["b"].attack_success.high or 0) > 0.1, "Wilson"
    assert sides["c"].attack_success is None and sides["c"].over_refusal is not None
    metrics = safety_metrics(sides)
    assert metrics["arena/safety/a_attack_success"] == attack.value
    assert metrics["arena/safety/a_over_refusal_n"] == 40.0
    assert metrics["arena/safety/b_attack_success_high"] == sides["b"].attack_success.high
    assert "arena/safety/b_over_refusal" not in metrics
    # the same arrays on both sides are told apart
    both = safety_sides(safe, safe, harmful, texts(50), draws=0)["a"]
    assert [share and share.value for share in both] == [pytest.approx(2 / 3), 0.0]
    bare = safety_sides({"a": safe["a"]}, {}, harmful, texts(50), draws=0)["a"].attack_success
    assert bare is not None and bare.low is None
    with pytest.raises(UserError, match="50 prompts and"):
        safety_sides(safe, refused, harmful[:4], texts(50))
    with pytest.raises(UserError, match="same prompts"):
        safety_sides({"a": safe["a"][:4]}, {}, harmful, texts(50))


def test_safety_as_the_evaluation_of_a_policy_measures_it() -> None:
    draw = np.random.default_rng(0)
    harmful = (draw.random(60) < 0.5).astype(np.float64)
    safe, refused = ((draw.random((60, 2)) < share).astype(np.float64) for share in (0.7, 0.4))
    answers = as_answers(safe, is_safe=safe, is_refusal=refused)
    metrics = policy_metrics(prompt_set(texts(60), harmful), answers, draws=300, seed=2)
    sides = safety_sides({"a": safe}, {"a": refused}, harmful, texts(60), draws=300, seed=2)["a"]
    assert sides.attack_success is not None and sides.over_refusal is not None
    assert sides.attack_success.value == pytest.approx(1 - metrics["policy/safe_rate_harmful"])
    assert sides.attack_success.low == pytest.approx(1 - metrics["policy/safe_rate_harmful_high"])
    assert sides.over_refusal.value == metrics["policy/benign_refusal_rate"]
    assert sides.over_refusal.high == metrics["policy/benign_refusal_rate_high"]


# ------------------------------------------------------------------------------------------------ pictures
@pytest.fixture(scope="module")
def arena() -> Arena:
    return measure_arena(made_up(FOUR, 60, 2), texts(60), draws=400, baseline="SFT")


SIDES = {
    "SFT": SafetySides(Share(0.4, 0.3, 0.5, 60), Share(0.05, 0.0, 0.1, 60)),
    "PPO & more": SafetySides(Share(0.1, 0.11, 0.2, 60), Share(0.3, None, None, 60)),  # an interval beside its value
    "half": SafetySides(Share(0.1, 0.0, 0.2, 60), None),
}


def size_of(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


def test_pictures_take_the_colours_of_the_page(arena: Arena) -> None:
    matrix, dots, plane = win_rates_svg(arena), ratings_svg(arena), safety_svg(SIDES)
    assert plane is not None
    for drawing in (matrix, dots, plane):
        assert drawing.startswith("<svg") and "currentColor" in drawing and "var(--series-1" in drawing
        assert "#1b1f24" not in drawing and "#0a0a0" not in drawing, "neither the PNG's colours nor a marker"
    assert "var(--series-2" in matrix, "less than one half has another colour"
    shown = f"{100 * arena.win_rates.value[3, 0]:.0f}*"
    assert shown in matrix and "adjusted p below 0.05" in matrix
    assert f"{100 * arena.win_rates.low[3, 0]:.0f} to {100 * arena.win_rates.high[3, 0]:.0f}" in matrix
    assert "SFT = 0" in dots and "60 prompts" in dots
    assert "PPO &amp; more" in plane and "half" not in plane
    assert win_rates_svg(arena) == matrix and ratings_svg(arena) == dots and safety_svg(SIDES) == plane


def contrast(ink: str, colour: str, ground: str, opacity: float) -> float:
    """WCAG contrast of ink on a colour of this opacity on the ground."""

    def channels(text: str) -> Floats:
        return np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)])

    def luminance(rgb: Floats) -> float:
        linear = np.where(rgb <= 0.03928, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    under = opacity * channels(colour) + (1 - opacity) * channels(ground)
    low, high = sorted((luminance(under), luminance(channels(ink))))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("which", [0, 1], ids=["light", "dark"])
def test_numbers_are_readable_on_the_strongest_colour(which: int) -> None:
    scores = made_up({"a": 0.0, "b": 1000.0}, 10)
    drawing = win_rates_svg(measure_arena(scores, texts(10), draws=0))
    opacities = {float(found) for found in re.findall(r"[^-]opacity: ([\d.]+)", drawing)}
    assert 0.3 < max(opacities) < 1.0
    colour = {
        name: re.findall(rf"--{name}: (#\w+)", STYLE)[which] for name in ("ink", "ground", "series-1", "series-2")
    }
    for series in ("series-1", "series-2"):
        assert contrast(colour["ink"], colour[series], colour["ground"], max(opacities)) >= 4.5


def test_the_highest_rating_is_on_top(arena: Arena) -> None:
    dots = ratings_svg(arena)
    places = [dots.index(f">{name}<") for name in ("nu 0.5", "PPO", "nu 1", "SFT")]
    assert places == sorted(places)


def test_dots_stand_where_the_ratings_are(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[Any, Any, Any]] = []
    plot = Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda axes, x, y, style, **how: drawn.append((x, y, how)) or plot(axes, x, y, style, **how)
    )
    ratings_svg(arena)
    dots = {y: (x, how["markerfacecolor"]) for x, y, how in drawn if not isinstance(x, list)}
    bars = {y[0]: x for x, y, _ in drawn if isinstance(x, list)}
    for row, i in enumerate(arena.ranking):
        assert dots[row][0] == arena.ratings.value[i]
        assert bars.get(row) == (None if i == 0 else [arena.ratings.low[i], arena.ratings.high[i]])
        assert (dots[row][1] == "none") == (i == 0), "hollow without an interval"


def test_the_matrix_holds_the_row_over_the_column(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    cells: dict[tuple[int, int], str] = {}
    text = Axes.text

    def noted(axes: Any, x: Any, y: Any, words: str, **how: Any) -> Any:
        cells[y, x] = words
        return text(axes, x, y, words, **how)

    monkeypatch.setattr(Axes, "text", noted)
    win_rates_svg(arena)
    assert len(cells) == 12
    for (row, column), words in cells.items():
        i, j = arena.ranking[row], arena.ranking[column]
        assert words.split("\n")[0].rstrip("*") == f"{100 * arena.win_rates.value[i, j]:.0f}"
        assert ("*" in words) == (arena.p_adjusted[i, j] < 0.05)


def test_many_policies_have_numbers_without_intervals() -> None:
    many = measure_arena(made_up({f"policy number {i}": i / 4 for i in range(9)}, 30), texts(30), draws=100)
    drawing = win_rates_svg(many)
    assert f">{100 * many.win_rates.value[8, 0]:.0f}" in drawing and " to " not in drawing
    assert "mean 0" in ratings_svg(many)
    long = measure_arena({"a" * 40: [1.0, 2.0], "b": [2.0, 1.0]}, texts(2), draws=0)
    assert "a" * 21 + "…" in ratings_svg(long) and "a" * 22 not in ratings_svg(long)
    # without draws there are neither intervals nor stars
    assert "adjusted p" not in win_rates_svg(long) and " to " not in win_rates_svg(long)


def test_pictures_as_png(arena: Arena, tmp_path: Path) -> None:
    for name, write in (("matrix", win_rates_png), ("dots", ratings_png)):
        for folder in ("one", "two"):
            write(tmp_path / folder / f"{name}.png", arena)
        assert min(size_of(tmp_path / "one" / f"{name}.png")) > 200
        assert (tmp_path / "one" / f"{name}.png").read_bytes() == (tmp_path / "two" / f"{name}.png").read_bytes()
    assert safety_png(tmp_path / "new" / "plane.png", SIDES)
    assert min(size_of(tmp_path / "new" / "plane.png")) > 200
    assert not safety_png(tmp_path / "none.png", {"half": SIDES["half"]})
    assert not (tmp_path / "none.png").exists() and safety_svg({}) is None


# ------------------------------------------------------------------------------------------------ tables
def lines_of(table: Any) -> list[str]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip()]


def test_ratings_as_a_table(arena: Arena) -> None:
    lines = lines_of(ratings_table(arena))
    assert lines[0] == "helpful: 60 prompts"
    assert lines[1] == "policy Elo 95% interval wins over SFT adjusted p P(best)"
    value, low, high = (x[3] for x in (arena.ratings.value, arena.ratings.low, arena.ratings.high))
    share, least, most = (100 * x[3, 0] for x in (arena.win_rates.value, arena.win_rates.low, arena.win_rates.high))
    first = f"nu 0.5 {value:+.0f} {low:+.0f} .. {high:+.0f} {share:.1f}% [{least:.1f}, {most:.1f}]"
    assert lines[3] == f"{first} {arena.p_adjusted[3, 0]:.4f} {arena.best[3]:.1%}"
    assert lines[-1] == f"SFT +0 {arena.best[0]:.1%}" and len(lines) == 7


def test_ratings_without_a_baseline_or_draws() -> None:
    scores = {"a": [1.0, 2.0, np.nan], "b": [2.0, 1.0, 1.0]}
    found = measure_arena(scores, texts(3), draws=0)
    assert ratings_table(found).title == "helpful: 2 prompts, 1 more without all scores"
    lines = lines_of(ratings_table(found, title="now"))
    assert lines[:2] == ["now", "policy Elo 95% interval P(best)"]
    assert lines[3:] == ["a +0", "b +0"]


def test_safety_as_a_table() -> None:
    lines = lines_of(safety_table(SIDES, title="safety"))
    assert lines[:2] == ["safety", "policy attack success over-refusal"]
    assert lines[3:] == [
        "SFT 40.0% [30.0, 50.0] 5.0% [0.0, 10.0]",
        "PPO & more 10.0% [11.0, 20.0] 30.0%",
        "half 10.0% [0.0, 20.0]",
    ]
