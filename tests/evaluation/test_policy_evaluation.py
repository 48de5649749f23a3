"""A policy's replies against ground truth: the ends of the scale are where the best replies and refusals are."""

from __future__ import annotations

import math

import pytest

from saferlhf.data.rows import prompt_text
from saferlhf.data.toyworld import best_replies, is_harmful_request, judge, prompts
from saferlhf.data.toyworld.words import REFUSALS
from saferlhf.evaluation.policy import evaluate_policy_against_truth

ROWS = prompts(60, "test", 0)
PROMPTS = [row.prompt for row in ROWS]
TEXTS = [prompt_text(prompt) for prompt in PROMPTS]
HARMFUL = [is_harmful_request(prompt) for prompt in PROMPTS]


def measured(responses: list[str], only: list[int] | None = None, truncated: bool = False) -> dict[str, float]:
    chosen = range(len(PROMPTS)) if only is None else only
    return evaluate_policy_against_truth(
        [PROMPTS[i] for i in chosen],
        [responses[i] for i in chosen],
        truncated=[truncated and i % 4 == 0 for i in chosen],
        draws=200,
    )


def test_the_best_safe_replies_reach_the_best_point() -> None:
    found = measured([best_replies(text)[0] for text in TEXTS])
    assert found["test/policy/safe_rate"] == 1 and found["test/policy/benign_refusal_rate"] == 0
    assert found["test/policy/truth_helpfulness"] == pytest.approx(found["test/policy/best_safe_helpfulness"])
    assert found["test/policy/safe_rate_low"] > 0.9


def test_the_most_helpful_replies_are_more_helpful_and_less_safe() -> None:
    found = measured([best_replies(text)[1] for text in TEXTS])
    assert found["test/policy/truth_helpfulness"] == pytest.approx(found["test/policy/best_unsafe_helpfulness"])
    assert found["test/policy/truth_helpfulness"] > found["test/policy/best_safe_helpfulness"]
    assert found["test/policy/safe_rate"] == pytest.approx(1 - sum(HARMFUL) / len(HARMFUL))


def test_refusing_everything() -> None:
    refusal = REFUSALS[0] if isinstance(REFUSALS[0], str) else REFUSALS[0][0]
    found = measured([refusal] * len(PROMPTS))
    assert found["test/policy/safe_rate"] == 1 and found["test/policy/benign_refusal_rate"] == 1
    assert found["test/policy/benign_refusal_rate_n"] == HARMFUL.count(False)
    truths = [judge(prompt, refusal) for prompt in PROMPTS]
    mean = sum(truth.harmlessness for truth in truths) / len(truths)
    assert found["test/policy/truth_harmlessness"] == pytest.approx(mean)


def test_what_cannot_be_told_is_left_out() -> None:
    harmful = [i for i, is_harmful in enumerate(HARMFUL) if is_harmful]
    found = measured(["", *["no such words"] * (len(PROMPTS) - 1)], only=harmful)
    assert not any("benign_refusal_rate" in name for name in found)
    assert all(math.isfinite(value) for value in found.values())


def test_truncation() -> None:
    assert measured([""] * len(PROMPTS), truncated=True)["test/policy/truncation_rate"] == pytest.approx(0.25)
