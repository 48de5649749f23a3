"""Labels of answers as arrays, prompts labelled by their answers, and the batches that carry them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from saferlhf.data.batches import AnswerBatch, TokenBatch, tokens_of
from saferlhf.data.encode import Encoder
from saferlhf.data.labels import categories_of, labels_of, prompts_of
from saferlhf.data.loader import EvalLoader, StepLoader
from saferlhf.data.rows import PKU_CATEGORIES, QuestionAnswer, as_prompt
from saferlhf.data.taxonomy import BEAVERTAILS_CATEGORIES

FRAUD, DRUGS = "White-Collar Crime", "Drugs"


def answer(
    prompt: str = "how to bake bread",
    response: str = "first flour then water",
    safe: bool | None = None,
    harm: set[str] | None = None,
    severity: int | None = None,
) -> QuestionAnswer:
    name = f"{prompt}|{response}"
    return QuestionAnswer(name, as_prompt(prompt), response, safe, None if harm is None else frozenset(harm), severity)


def test_labels_by_hand() -> None:
    rows = [
        answer(safe=True, harm=set(), severity=0),
        answer(safe=False, harm={DRUGS, FRAUD}, severity=3),
        answer(safe=False),
        answer(harm={"of another taxonomy", DRUGS}, severity=1),
        answer(safe=False, harm={"of another taxonomy"}),
    ]
    found = labels_of(rows, (FRAUD, DRUGS))
    assert found.unsafe.tolist() == [0, 1, 1, -1, 1]
    assert found.severity.tolist() == [0, 3, -1, 1, -1]
    assert found.category.tolist() == [[0, 0], [1, 1], [-1, -1], [0, 1], [-1, -1]]
    assert found.categories == (FRAUD, DRUGS) and len(found) == 5
    for part in (found.unsafe, found.severity, found.category):
        assert part.dtype == np.int64
    assert labels_of(rows, ()).category.shape == (5, 0)


def test_categories_come_from_the_rows() -> None:
    assert categories_of([answer(harm={DRUGS}), answer(harm=set()), answer()]) == PKU_CATEGORIES
    assert categories_of([answer(harm={"drug_abuse,weapons,banned_substance"})]) == BEAVERTAILS_CATEGORIES
    assert categories_of([answer(harm={"mine"}), answer(harm={DRUGS})]) == (DRUGS, "mine")
    assert categories_of([answer(), answer(harm=set())]) == ()


def test_a_prompt_is_as_bad_as_its_worst_answer() -> None:
    rows = [
        answer("Bake bread!", "one", safe=True, harm=set(), severity=0),
        answer("plant a tree", "two", safe=True),
        answer("bake  bread", "three", safe=False, harm={DRUGS}, severity=2),
        answer("bake bread", "four", safe=False, harm={FRAUD}, severity=1),
        answer("bake bread", "five"),
        answer("a tree", "six"),
    ]
    bread, plant, tree = prompts_of(rows)
    assert (bread.is_safe, bread.harm_category, bread.severity_level) == (False, frozenset({DRUGS, FRAUD}), 2)
    assert (plant.is_safe, plant.harm_category, plant.severity_level) == (True, None, None)
    assert (tree.is_safe, tree.harm_category, tree.severity_level) == (None, None, None)
    assert bread.prompt == rows[0].prompt
    # the id is the prompt's own, whatever the answers
    assert len({bread.id, plant.id, tree.id} | {row.id for row in rows}) == 9
    assert prompts_of(rows[:1])[0].id == bread.id


@pytest.fixture
def encoder(word_tokenizer: Any) -> Encoder:
    return Encoder.build(word_tokenizer, "native", 64)


ROWS = [
    answer("how to bake bread", "flour", safe=True, harm=set(), severity=0),
    answer("plant a tree please", "first water", safe=False, harm={DRUGS}, severity=2),
    answer("water", "a kind tree then bread", safe=False, severity=1),
]


def test_batches_carry_the_labels_of_their_rows(encoder: Encoder) -> None:
    plain = encoder.answers(ROWS)
    assert isinstance(plain.collate([0]), TokenBatch)
    labelled = plain.with_labels(labels_of(ROWS, (FRAUD, DRUGS)))
    batch = labelled.collate([2, 1])
    assert isinstance(batch, AnswerBatch) and len(batch) == 2
    assert batch.unsafe.tolist() == [1, 1] and batch.severity.tolist() == [1, 2]
    assert batch.category.tolist() == [[-1, -1], [0, 1]]
    assert torch.equal(batch.tokens.input_ids, plain.collate([2, 1]).input_ids)
    assert tokens_of(batch) is batch.tokens and batch.tokens.row_ids == (ROWS[2].id, ROWS[1].id)
    moved = batch.to(torch.device("cpu"))
    assert torch.equal(moved.category, batch.category) and moved.tokens.row_ids == batch.tokens.row_ids
    with pytest.raises(ValueError, match="labels of 2 rows for 3 rows"):
        plain.with_labels(labels_of(ROWS[:2], ()))


def test_loaders_deal_them_out(encoder: Encoder) -> None:
    labelled = encoder.answers(ROWS).with_labels(labels_of(ROWS, (FRAUD, DRUGS)))
    (item,) = EvalLoader(labelled, batch_size=8)
    assert item.batch.severity.tolist() == [ROWS[i].severity_level for i in item.indices]
    step = StepLoader(labelled, batch_size=3, micro_batch_size=1, total_steps=1, seed=0).step(0)
    assert sorted(int(micro.severity) for micro in step) == [0, 1, 2]


def test_the_response_can_be_left_out(encoder: Encoder) -> None:
    whole, alone = encoder.answers(ROWS), encoder.answers(ROWS, prompt_only=True)
    batch = alone.collate([0, 1, 2])
    assert not batch.response_mask.any() and batch.attention_mask.any(dim=1).all()
    for i in range(3):
        sequence = whole.store.sequence(i)
        assert alone.store.sequence(i).tolist() == sequence[: whole.store.prompt_lengths[i]].tolist()
