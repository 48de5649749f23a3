"""Scores against a fake oracle whose grades are written in the replies, and against the toy world's own."""

from dataclasses import dataclass

import numpy as np
import pytest

from saferlhf.data.rows import PreferencePair, QuestionAnswer, as_prompt
from saferlhf.evaluation.truth import evaluate_against_truth, evaluate_damaged


@dataclass(frozen=True)
class Grades:
    helpfulness: float
    harmlessness: float
    is_safe: bool


def fake_judge(prompt, reply):
    """Reply `help harm`: two numbers; safe from harmlessness 0 on."""
    helpfulness, harmlessness = (float(word) for word in reply.split())
    return Grades(helpfulness, harmlessness, harmlessness >= 0)


def pair(index, first, second, better=None, safer=None, single=None):
    return PreferencePair(
        id=f"r{index}",
        prompt=as_prompt(f"prompt {index}"),
        response_0=first,
        response_1=second,
        better_response_id=better,
        safer_response_id=safer,
        single_response_id=single,
    )


ROWS = [
    pair(0, "3 -1", "1 1", better=0, safer=1, single=0),
    pair(1, "1 2", "2 -2", better=0, safer=0, single=1),  # the helpfulness label is wrong
    pair(2, "5 1", "5 -1", better=1, safer=1, single=0),  # tied in helpfulness; the harmlessness label is wrong
    pair(3, "0 1", "4 1", better=1, safer=0, single=1),  # tied in harmlessness
]


def test_reward_against_truth_by_hand():
    # true order of help: 0, 1, tie, 1. scores: right, right, (tie in truth), wrong
    scores = [[2.0, 1.0], [0.0, 3.0], [9.0, 0.0], [1.0, -1.0]]
    found = evaluate_against_truth(ROWS, scores, kind="reward", judge=fake_judge, draws=200)
    assert found["test/reward/truth_pair_accuracy"] == pytest.approx(2 / 3)
    assert found["test/reward/truth_pair_accuracy_n"] == 3
    assert found["test/reward/truth_ties"] == 1
    assert found["test/reward/annotator_truth_agreement"] == pytest.approx(2 / 3)
    assert found["test/reward/truth_pair_accuracy_low"] <= 2 / 3 <= found["test/reward/truth_pair_accuracy_high"]


def test_cost_against_truth_by_hand():
    # harmlessness: 1 safer, 0 safer, 0 safer, tie. Costs: right, right, wrong
    costs = [[1.0, -1.0], [-2.0, 2.0], [3.0, 0.5], [-1.0, -2.0]]
    found = evaluate_against_truth(ROWS, costs, kind="cost", judge=fake_judge, draws=0)
    assert found["test/cost/truth_pair_accuracy"] == pytest.approx(2 / 3)
    assert found["test/cost/annotator_truth_agreement"] == pytest.approx(2 / 3)
    assert found["test/cost/truth_ties"] == 1
    # signs: all right but response 0 of row 2 (safe at 3); -1 and -2 are safe in row 3
    assert found["test/cost/truth_sign_accuracy"] == pytest.approx(7 / 8)


def test_perfect_scores_reach_one_and_their_negative_zero():
    quality = np.array(
        [[fake_judge("", text).helpfulness for text in (row.response_0, row.response_1)] for row in ROWS]
    )
    best = evaluate_against_truth(ROWS, quality, kind="reward", judge=fake_judge, draws=0)
    worst = evaluate_against_truth(ROWS, -quality, kind="reward", judge=fake_judge, draws=0)
    assert (best["test/reward/truth_pair_accuracy"], worst["test/reward/truth_pair_accuracy"]) == (1.0, 0.0)
    assert best["test/reward/truth_correlation"] == pytest.approx(1.0)
    assert worst["test/reward/truth_correlation"] == pytest.approx(-1.0)
    harm = np.array([[-fake_judge("", text).harmlessness for text in (row.response_0, row.response_1)] for row in ROWS])
    cost = evaluate_against_truth(ROWS, harm, kind="cost", judge=fake_judge, draws=0)
    assert cost["test/cost/truth_pair_accuracy"] == cost["test/cost/truth_sign_accuracy"] == 1.0
    assert cost["test/cost/truth_correlation"] == pytest.approx(1.0)  # of quality = minus cost


def test_preference_chooses_the_true_order():
    scores = [[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]  # orders by harmlessness
    safer = evaluate_against_truth(ROWS, scores, kind="reward", preference="safer", judge=fake_judge, draws=0)
    assert safer["test/reward/truth_pair_accuracy"] == 1.0
    single = evaluate_against_truth(ROWS, scores, kind="reward", preference="single", judge=fake_judge, draws=0)
    assert single["test/reward/truth_pair_accuracy_harmlessness"] == 1.0
    assert single["test/reward/truth_pair_accuracy_helpfulness"] == pytest.approx(1 / 3)
    assert "test/reward/truth_pair_accuracy" not in single


def test_rounding_is_not_an_order():
    rows = [pair(0, f"{0.1 + 0.2} 0", "0.3 0", better=0)]
    found = evaluate_against_truth(rows, [[1.0, 0.0]], kind="reward", judge=fake_judge, draws=0)
    assert found["test/reward/truth_ties"] == 1
    assert "test/reward/truth_pair_accuracy" not in found


def test_damaged_replies_by_hand():
    def answer(prompt, text):
        return QuestionAnswer(id=f"{prompt} {text}", prompt=as_prompt(prompt), response=text)

    damaged = [
        ("intact", answer("a", "3 0")),
        ("padding", answer("a", "1 0")),  # truly worse, scores lower: right
        ("repetition", answer("a", "2 0")),  # truly worse, scores higher: fooled
        ("intact", answer("b", "1 0")),
        ("padding", answer("b", "1 0")),  # tied in truth
        ("repetition", answer("b", "0 0")),  # right
    ]
    scores = [5.0, 1.0, 9.0, 2.0, 3.0, 0.0]
    found = evaluate_damaged(damaged, scores, kind="reward", judge=fake_judge, draws=100)
    assert found["test/reward/truth_pair_accuracy_damaged"] == pytest.approx(2 / 3)
    assert found["test/reward/truth_pair_accuracy_damaged_padding"] == 1.0
    assert found["test/reward/truth_pair_accuracy_damaged_repetition"] == 0.5
    assert found["test/reward/score_mean_damaged_intact"] == 3.5
    assert found["test/reward/truth_mean_damaged_repetition"] == 1.0
    assert "test/reward/truth_pair_accuracy_damaged_intact" not in found
    # ranks of scores 5 2 6 3 4 1 and of grades 6 3 5 3 3 1
    expected = np.corrcoef([5, 2, 6, 3, 4, 1], [6, 3, 5, 3, 3, 1])[0, 1]
    assert found["test/reward/truth_correlation_damaged"] == pytest.approx(expected)
    cost = evaluate_damaged(damaged, scores, kind="cost", judge=fake_judge, draws=0)
    assert "test/cost/truth_correlation_damaged" not in cost  # harmlessness is constant: no correlation, no NaN


def test_toy_world_oracle_agrees_with_itself():
    toyworld = pytest.importorskip("saferlhf.data.toyworld")
    rows = toyworld.preference_pairs(60, "test", 0)
    truths = [[toyworld.judge(row.prompt, text) for text in (row.response_0, row.response_1)] for row in rows]
    reward = [[truth.helpfulness for truth in two] for two in truths]
    found = evaluate_against_truth(rows, reward, kind="reward", draws=0)
    assert found["test/reward/truth_pair_accuracy"] == 1.0
    assert 0.5 < found["test/reward/annotator_truth_agreement"] < 1.0
    cost = [[1.0 if not truth.is_safe else -1.0 for truth in two] for two in truths]
    assert evaluate_against_truth(rows, cost, kind="cost", draws=0)["test/cost/truth_sign_accuracy"] == 1.0
    damaged = toyworld.damaged_replies(20, "test", 0)
    scores = [toyworld.judge(row.prompt, row.response).helpfulness for _, row in damaged]
    found = evaluate_damaged(damaged, scores, kind="reward", draws=0)
    assert found["test/reward/truth_pair_accuracy_damaged"] == 1.0
    assert found["test/reward/truth_correlation_damaged"] == pytest.approx(1.0)
