"""Likelihood of demonstrations: token-weighted, with intervals over prompts."""

import math

import pytest

from saferlhf.data.rows import QuestionAnswer, as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.likelihood import evaluate_likelihood

ROWS = [QuestionAnswer(f"r{i}", as_prompt(f"p{i}"), "text") for i in range(4)]


def test_every_token_weighs_the_same():
    found = evaluate_likelihood(ROWS, [8.0, 1.0, 3.0, 0.0], [4, 1, 1, 0], draws=2000)
    assert found["test/sft/nll"] == 2.0  # 12 nats over 6 tokens
    assert found["test/sft/nll_n"] == found["test/sft/perplexity_n"] == 4
    assert found["test/sft/tokens"] == 6
    assert found["test/sft/perplexity"] == pytest.approx(math.exp(2.0))
    for end in ("low", "high"):
        assert found[f"test/sft/perplexity_{end}"] == pytest.approx(math.exp(found[f"test/sft/nll_{end}"]))
    assert found["test/sft/nll_low"] <= 2.0 <= found["test/sft/nll_high"]


def test_not_the_mean_of_row_means():
    found = evaluate_likelihood(ROWS[:2], [9.0, 1.0], [9, 10], draws=0)
    assert found["test/sft/nll"] == pytest.approx(10 / 19)


def test_refusals():
    with pytest.raises(UserError, match="response token"):
        evaluate_likelihood(ROWS, [0.0] * 4, [0] * 4)
    with pytest.raises(UserError, match=r"1 of 4 rows.*r2"):
        evaluate_likelihood(ROWS, [1.0, 1.0, float("nan"), 1.0], [1] * 4)
