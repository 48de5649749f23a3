"""Prompts as tokens: over-long ones lose their beginning, never the cue after which the assistant speaks."""

from __future__ import annotations

from models.tiny_models import tokenizer

from saferlhf.data.rows import PromptRow, QuestionAnswer, as_prompt
from saferlhf.data.templates import get_template
from saferlhf.rollout.prompts import first_samples, tokenize_prompts


def test_prompts_are_cut_from_the_left() -> None:
    template, tok = get_template("native"), tokenizer()
    rows = [PromptRow("a", as_prompt("w1 w2 w3 w4 w5 w6")), QuestionAnswer("b", as_prompt("w7"), "never looked at")]
    whole = tokenize_prompts(rows, template, tok)
    assert [list(prompt.token_ids) for prompt in whole] == template.prompts_ids([row.prompt for row in rows], tok)
    assert [prompt.row_id for prompt in whole] == ["a", "b"] and not any(prompt.truncated for prompt in whole)
    room = len(whole[1].token_ids)
    cut = tokenize_prompts(rows, template, tok, max_prompt_tokens=room)
    assert [prompt.truncated for prompt in cut] == [True, False]
    assert cut[0].token_ids == whole[0].token_ids[-room:] and cut[0].prompt == rows[0].prompt
    assert cut[0].token_ids[-1] == whole[1].token_ids[-1], "the cue stays"
    assert tokenize_prompts([], template, tok) == []


def test_rows_that_come_again_go_on_counting() -> None:
    rows = [PromptRow(name, as_prompt("w1")) for name in "abaca"]
    assert first_samples(tokenize_prompts(rows, get_template("native"), tokenizer()), 3) == [0, 0, 3, 0, 6]
