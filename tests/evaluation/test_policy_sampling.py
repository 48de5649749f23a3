"""Sampling for evaluation: shapes, room for prompts, the same noise for every policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from models.tiny_models import backbone, tokenizer

from saferlhf.data.rows import as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.policy_answers import PromptSet
from saferlhf.evaluation.policy_sampling import Sampling, SamplingOptions, room_for, sample_policy

PROMPTS = PromptSet(
    tuple(f"row{i}" for i in range(5)),
    tuple(as_prompt(" ".join(f"w{i + j}" for j in range(i + 1))) for i in range(5)),
    np.zeros(5),
)


def sampled(model: torch.nn.Module | None = None, **options: Any) -> Sampling:
    chosen = {"samples": 2, "max_new_tokens": 6, "max_prompt_tokens": 40, "seed": 1, **options}
    return sample_policy(model or backbone(lm_head=True), tokenizer(), "native", PROMPTS, SamplingOptions(**chosen))


def test_shapes_and_texts() -> None:
    found = sampled()
    assert found.answers.shape == (5, 2)
    assert found.answers.truncated.shape == (5, 2)
    assert len(found.prompt_ids) == len(found.response_ids) == 10
    assert found.prompt_ids[0] == found.prompt_ids[1] != found.prompt_ids[2]
    words = tokenizer()
    for place, ids in enumerate(found.response_ids):
        i, j = divmod(place, 2)
        assert found.answers.tokens[i, j] == len(ids)
        assert found.answers.texts[i][j] == words.decode(ids, skip_special_tokens=True)
        assert found.answers.truncated[i, j] == (words.eos_token_id not in ids)
    assert found.prompts_cut == 0


def test_a_sample_does_not_depend_on_how_many_there_are_or_on_batches() -> None:
    two, three = sampled(), sampled(samples=3, batch_size=2)
    assert [row[:2] for row in three.answers.texts] == list(two.answers.texts)
    assert any(row[0] != row[1] for row in two.answers.texts)
    assert sampled(seed=2).answers.texts != two.answers.texts


def test_equal_policies_write_the_same() -> None:
    assert sampled(backbone(lm_head=True, seed=4)).response_ids == sampled(backbone(lm_head=True, seed=4)).response_ids


def test_long_prompts_lose_their_beginning() -> None:
    whole, cut = sampled(), sampled(max_prompt_tokens=5)
    assert cut.prompts_cut == sum(len(ids) > 5 for ids in whole.prompt_ids[::2]) > 0
    assert all(short == long[-5:] for short, long in zip(cut.prompt_ids, whole.prompt_ids, strict=True))


def test_the_most_probable_response() -> None:
    assert (
        sampled(samples=1, temperature=0.0, seed=1).response_ids
        == sampled(samples=1, temperature=0.0, seed=2).response_ids
    )


def test_progress_reaches_the_end() -> None:
    done: list[int] = []
    options = SamplingOptions(samples=2, max_new_tokens=3, max_prompt_tokens=40, batch_size=3)
    sample_policy(backbone(lm_head=True), tokenizer(), "native", PROMPTS, options, done.append)
    assert done[-1] == 10
    assert done == sorted(done)


def test_room() -> None:
    assert room_for([128], None) == (64, 64)
    assert room_for([128, 100], None) == (50, 50)
    assert room_for([None], 100) == (412, 100)
    with pytest.raises(UserError, match="leave no room for a prompt"):
        room_for([128, 512], 128)
