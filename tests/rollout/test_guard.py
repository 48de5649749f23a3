"""Nothing that nobody scored counts: NaN, exceptions, scores of another shape, responses without a word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_models import tokenizer
from rollout.tiny_policies import EOS, Chain, sampled, some_prompts

from saferlhf.data.rows import as_prompt
from saferlhf.errors import UserError
from saferlhf.rollout.experience import Experience
from saferlhf.rollout.guard import FailurePolicy, GuardedScorer
from saferlhf.rollout.scorers import FAILURES, Failure, Scorer, ScoreRequest, Scores

LENIENT = {"max_failed_share": 1.0}


class Scripted:
    """Calls a function with each call's number and rows; remembers which rows it was handed."""

    def __init__(
        self, answer: Callable[[int, Sequence[ScoreRequest]], Any], outputs: tuple[str, ...] = ("reward",)
    ) -> None:
        self.answer, self.outputs, self.name = answer, outputs, "scripted"
        self.handed: list[list[str]] = []

    def score(self, rows: Sequence[ScoreRequest]) -> Any:
        self.handed.append([row.row_id for row in rows])
        return self.answer(len(self.handed) - 1, rows)


def requests(*texts: str) -> list[ScoreRequest]:
    return [ScoreRequest(f"r{i}", as_prompt("q"), text) for i, text in enumerate(texts)]


def by_length(call: int, rows: Sequence[ScoreRequest]) -> Scores:
    return Scores({"reward": np.array([float(len(row.response)) for row in rows])})


def nan_for(*ids: str, until: int = 99) -> Callable[[int, Sequence[ScoreRequest]], Scores]:
    """NaN without a word of explanation for some rows, in the first calls."""

    def answer(call: int, rows: Sequence[ScoreRequest]) -> Scores:
        bad = [call < until and row.row_id in ids for row in rows]
        return Scores({"reward": np.where(bad, np.nan, by_length(call, rows).values["reward"])})

    return answer


# ------------------------------------------------------------------------------------------------ NaN
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_scorer_that_returns_no_number(wrong: float) -> None:
    def answer(call: int, rows: Sequence[ScoreRequest]) -> Scores:
        return Scores({"reward": np.array([1.0, wrong, 3.0])[: len(rows)]})

    guarded = GuardedScorer(Scripted(answer), FailurePolicy(on_failure="skip", **LENIENT))
    scores = guarded.score(requests("a", "b", "c"))
    assert scores.scored.tolist() == [True, False, True] and np.isnan(scores.values["reward"][1])
    assert [(f.row_id, f.kind, f.index) for f in scores.failures] == [("r1", "not_a_number", 1)]
    assert str(wrong).lstrip("-") in scores.failures[0].reason and scores.counts() == {"not_a_number": 1}
    assert guarded.report.metrics("score")["score/unscored_share"] == pytest.approx(1 / 3)


def test_one_output_without_a_number_fails_the_whole_request() -> None:
    values = {"reward": np.array([1.0, 2.0]), "cost": np.array([np.nan, 4.0])}
    guarded = GuardedScorer(
        Scripted(lambda call, rows: Scores(values), ("reward", "cost")), FailurePolicy(on_failure="skip", **LENIENT)
    )
    scores = guarded.score(requests("a", "b"))
    assert np.isnan(scores.values["reward"][0]) and np.isnan(scores.values["cost"][0]), "no half of it counts either"
    assert scores.values["cost"][1] == 4 and scores.failures[0].reason == "cost is nan"


def test_only_the_failed_are_tried_again_and_keep_their_places() -> None:
    scorer = Scripted(nan_for("r1", "r3", until=1))
    guarded = GuardedScorer(scorer, FailurePolicy(attempts=3, **LENIENT))
    scores = guarded.score(requests("a", "bb", "ccc", "dddd"))
    assert scores.values["reward"].tolist() == [1, 2, 3, 4] and not scores.failures
    assert scorer.handed == [["r0", "r1", "r2", "r3"], ["r1", "r3"]]
    assert guarded.report.retried == 2 and guarded.report.recovered == 2 and guarded.report.unscored == 0


def test_patience_ends() -> None:
    scorer = Scripted(nan_for("r1"))
    guarded = GuardedScorer(scorer, FailurePolicy(attempts=3, **LENIENT))
    scores = guarded.score(requests("a", "b"))
    assert scorer.handed == [["r0", "r1"], ["r1"], ["r1"]] and scores.scored.tolist() == [True, False]
    assert guarded.report.retried == 2 and guarded.report.recovered == 0
    assert guarded.report.line() == "1 of 2 responses have no score: 1 not a number"
    assert guarded.report.metrics("reward")["reward/failed_not_a_number"] == 1


def test_on_failure_error_ends_the_run_at_once() -> None:
    scorer = Scripted(nan_for("r1"))
    with pytest.raises(UserError, match="1 of 2 responses got no score; the first, row r1: reward is nan"):
        GuardedScorer(scorer, FailurePolicy(on_failure="error")).score(requests("a", "b"))
    assert len(scorer.handed) == 1


def test_too_many_failures_end_the_run() -> None:
    policy = FailurePolicy(on_failure="skip", max_failed_share=0.25)
    assert GuardedScorer(Scripted(nan_for("r1")), policy).score(requests(*"abcd")).scored.sum() == 3
    with pytest.raises(UserError, match="raise max_failed_share"):
        GuardedScorer(Scripted(nan_for("r1", "r2")), policy).score(requests(*"abcd"))


# ------------------------------------------------------------------------------------------------ nothing said
def test_empty_responses_are_not_handed_over() -> None:
    scorer = Scripted(by_length)
    guarded = GuardedScorer(scorer, FailurePolicy())
    scores = guarded.score(requests("a", "", " \n\t", "dd"))
    assert scorer.handed == [["r0", "r3"]] and scores.counts() == {"empty": 2}
    assert scores.values["reward"][[0, 3]].tolist() == [1, 2] and scores.scored.tolist() == [True, False, False, True]
    assert guarded.report.empty == 2 and guarded.report.metrics("x")["x/empty_share"] == 0.5


def test_a_policy_that_emits_nothing_at_all() -> None:
    """Nothing to hand over, nothing the scorer failed at: all are counted, none has a score."""
    scorer = Scripted(by_length)
    guarded = GuardedScorer(scorer, FailurePolicy(max_failed_share=0.0))
    scores = guarded.score(requests("", "", ""))
    assert not scorer.handed and not scores.scored.any() and scores.counts() == {"empty": 3}
    assert guarded.report.metrics("x")["x/unscored_share"] == 1.0


def test_empty_responses_by_policy() -> None:
    scorer = Scripted(by_length)
    guarded = GuardedScorer(scorer, FailurePolicy(on_empty="score"))
    assert guarded.score(requests("", "b")).values["reward"].tolist() == [0, 1] and guarded.report.empty == 1
    with pytest.raises(UserError, match="on_empty=skip"):
        GuardedScorer(scorer, FailurePolicy(on_empty="error")).score(requests("a", ""))


# ------------------------------------------------------------------------------------------------ anybody's code
def test_exceptions_are_failures_and_do_not_quote_texts() -> None:
    def answer(call: int, rows: Sequence[ScoreRequest]) -> Scores:
        if call == 0:
            raise ZeroDivisionError(f"bad text: {rows[0].response}")
        return by_length(call, rows)

    guarded = GuardedScorer(Scripted(answer), FailurePolicy(attempts=2))
    assert guarded.score(requests("secret", "b")).values["reward"].tolist() == [6, 1] and guarded.report.recovered == 2
    once = GuardedScorer(Scripted(answer), FailurePolicy(on_failure="skip", **LENIENT))
    scores = once.score(requests("secret", "b"))
    assert scores.counts() == {"exception": 2} and "secret" not in scores.failures[0].reason
    assert "ZeroDivisionError" in scores.failures[0].reason


def test_a_users_error_is_not_swallowed() -> None:
    def answer(call: int, rows: Sequence[ScoreRequest]) -> Scores:
        raise UserError("no such model")

    with pytest.raises(UserError, match="no such model"):
        GuardedScorer(Scripted(answer), FailurePolicy(**LENIENT)).score(requests("a"))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda call, rows: [1.0], "list instead of Scores"),
        (lambda call, rows: None, "NoneType instead of Scores"),
        (lambda call, rows: Scores({"other": np.zeros(2)}), "no 'reward'"),
        (lambda call, rows: Scores({"reward": np.zeros(3)}), "3 scores for 2 responses"),
    ],
)
def test_what_is_no_score_at_all_is_refused(answer: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        GuardedScorer(Scripted(answer), FailurePolicy(**LENIENT)).score(requests("a", "b"))


# ------------------------------------------------------------------------------------------------ dataclasses
def test_scores_and_failures_are_checked() -> None:
    with pytest.raises(ValueError, match="one or more outputs"):
        Scores({})
    with pytest.raises(ValueError, match="one length"):
        Scores({"a": np.zeros(2), "b": np.zeros(3)})
    with pytest.raises(ValueError, match="one length"):
        Scores({"a": np.zeros((2, 1))})
    with pytest.raises(ValueError, match="not made"):
        Scores({"a": np.zeros(2)}, (Failure("r", "timeout", "late", 2),))
    with pytest.raises(ValueError, match="unknown kind"):
        Failure("r", "tired", "", 0)
    assert set(FAILURES) >= {"empty", "not_a_number", "timeout", "unparsable"}


def test_a_failure_counts_even_where_there_is_a_number() -> None:
    scores = Scores({"a": np.array([1.0, 2.0])}, (Failure("r", "timeout", "late", 1),))
    assert scores.scored.tolist() == [True, False]
    guarded = GuardedScorer(Scripted(lambda c, r: scores, ("a",)), FailurePolicy(on_failure="skip", **LENIENT))
    assert np.isnan(guarded.score(requests("a", "b")).values["a"][1])


def test_reports_are_taken_and_begin_anew() -> None:
    guarded = GuardedScorer(Scripted(by_length), FailurePolicy())
    assert isinstance(guarded, Scorer) and guarded.outputs == ("reward",) and guarded.name == "scripted"
    guarded.score(requests("a", ""))
    guarded.score(requests("a"))
    assert guarded.take_report().requests == 3 and guarded.report.requests == 0
    assert guarded.report.metrics("x") == {} and guarded.report.line() == ""
    assert len(guarded.score([])) == 0


def test_silence_from_the_policy_to_the_update() -> None:
    """End tokens alone: sampled, counted as empty, scored by nobody; nothing is left to learn from, nothing breaks."""
    logits = torch.zeros(64, 64)
    logits[:, EOS] = 50.0
    rollout = sampled(Chain(logits), some_prompts(3), samples=2, tokenizer=tokenizer())
    assert rollout.response_lengths.tolist() == [1] * 6 and rollout.statistics()["empty_rate"] == 1.0
    guarded = GuardedScorer(Scripted(by_length), FailurePolicy(max_failed_share=0.0))
    scores = guarded.score(rollout.requests())
    assert scores.counts() == {"empty": 6}
    weights = torch.from_numpy(scores.scored).float()
    rewards = torch.from_numpy(scores.values["reward"]).nan_to_num()
    left = Experience(rollout, rewards=rewards, weights=weights).scored()
    assert len(left) == 0 and list(left.minibatches(4, seed=[0])) == []
