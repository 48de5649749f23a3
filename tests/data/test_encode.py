"""Encode: what is cut, what is masked, what is refused (architecture, traps 2 and 13)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from saferlhf.config.schema import DataPolicyConfig
from saferlhf.data.batches import PairBatch
from saferlhf.data.encode import MIN_PROMPT, Encoder
from saferlhf.data.report import DataReport
from saferlhf.data.rows import PreferencePair, QuestionAnswer, as_prompt
from saferlhf.data.templates import get_template, prompt_ids, response_ids
from saferlhf.errors import UserError

Pair = Callable[..., PreferencePair]


def answer(prompt: str, response: str, row_id: str = "r") -> QuestionAnswer:
    return QuestionAnswer(row_id, as_prompt(prompt), response)


def encoder(tokenizer: Any, max_length: int = 64) -> Encoder:
    return Encoder.build(tokenizer, "native", max_length)


def test_a_batch_by_hand(word_tokenizer: Any) -> None:
    rows = [answer("how to bake", "first flour then water", "long"), answer("plant", "", "empty")]
    batch = encoder(word_tokenizer).answers(rows).collate([0, 1])
    pad, _, start, end, user, assistant = range(6)
    word = word_tokenizer.convert_tokens_to_ids
    prompts = [
        [start, user, word("how"), word("to"), word("bake"), end, start, assistant],
        [start, user, word("plant"), end, start, assistant],
    ]
    responses = [[word("first"), word("flour"), word("then"), word("water"), end], [end]]
    longest = len(prompts[0]) + 5
    for i in range(2):
        ids = prompts[i] + responses[i]
        assert batch.input_ids[i].tolist() == ids + [pad] * (longest - len(ids))
        assert batch.attention_mask[i].tolist() == [True] * len(ids) + [False] * (longest - len(ids))
        assert batch.response_mask[i].nonzero().flatten().tolist() == list(range(len(prompts[i]), len(ids)))
    assert batch.row_ids == ("long", "empty")
    assert (
        batch.input_ids.dtype == torch.int64 and batch.attention_mask.dtype == batch.response_mask.dtype == torch.bool
    )


def test_masks_come_from_lengths_where_pad_is_eos(byte_tokenizer: Any) -> None:
    assert byte_tokenizer.pad_token_id == byte_tokenizer.eos_token_id
    batch = (
        encoder(byte_tokenizer, 128)
        .answers([answer("how", "first water then flour"), answer("how", "")])
        .collate([0, 1])
    )
    eos = byte_tokenizer.eos_token_id
    for i, response in enumerate(("first water then flour", "")):
        kept = batch.input_ids[i][batch.response_mask[i]].tolist()
        assert kept == response_ids(response, byte_tokenizer) and kept[-1] == eos
        length = int(batch.attention_mask[i].sum())
        assert batch.attention_mask[i, :length].all() and bool(batch.response_mask[i, length - 1])
    assert not batch.response_mask[1].sum() > 1  # an empty response is its end token alone


def test_pairs_are_response_0_of_all_rows_then_response_1(word_tokenizer: Any, make_pair: Pair) -> None:
    rows = [make_pair("how to", f"bake {'bread ' * i}", "plant a tree") for i in range(4)]
    encoded = encoder(word_tokenizer).pairs(rows)
    batch = encoded.collate([2, 0])
    assert isinstance(batch, PairBatch) and len(batch) == 2 and len(batch.tokens) == 4
    assert batch.tokens.row_ids == (rows[2].id, rows[0].id) * 2
    texts = [rows[2].response_0, rows[0].response_0, rows[2].response_1, rows[0].response_1]
    for i, text in enumerate(texts):
        kept = batch.tokens.input_ids[i][batch.tokens.response_mask[i]].tolist()
        assert kept == response_ids(text, word_tokenizer)
    lengths = [int(batch.tokens.attention_mask[i].sum()) for i in range(4)]
    assert encoded.lengths[[2, 0]].tolist() == [max(lengths[0], lengths[2]), max(lengths[1], lengths[3])]


def test_labels_and_their_absence(word_tokenizer: Any, make_pair: Pair) -> None:
    rows = [
        make_pair(),
        make_pair(
            "plant",
            better_response_id=None,
            safer_response_id=None,
            is_response_1_safe=None,
            response_0_severity_level=None,
        ),
    ]
    batch = encoder(word_tokenizer).pairs(rows).collate([0, 1])
    assert batch.better.tolist() == [1, -1] and batch.safer.tolist() == [0, -1] and batch.single.tolist() == [-1, -1]
    assert batch.unsafe.tolist() == [[0, 1], [0, -1]]  # 1 = unsafe
    assert batch.severity.tolist() == [[0, 2], [-1, 2]]


# ------------------------------------------------------------------------------------------------ length limit
def cut_by_hand(prompt: list[int], response: list[int], limit: int) -> tuple[list[int], int, bool]:
    """A second implementation: take tokens off one by one."""
    prompt, response, cut = list(prompt), list(response), False
    floor = min(MIN_PROMPT, limit // 2)
    while len(prompt) + len(response) > limit:
        if len(prompt) > floor:
            prompt.pop(0)
        else:
            response.pop()
            cut = True
    return prompt + response, len(prompt), cut


@pytest.mark.parametrize("limit", [8, 20, 40, 64])
def test_the_prompt_is_cut_from_the_left_and_the_response_only_when_it_must_be(word_tokenizer: Any, limit: int) -> None:
    shapes = [(p, r) for p in (0, 3, 20, 60) for r in (0, 3, 6, 20, 60)]
    rows = [answer("how " * p, "bread " * r, f"{p}-{r}") for p, r in shapes]
    report = DataReport("mine")
    encoded = encoder(word_tokenizer, limit).answers(rows, report=report)
    cuts = {"prompt_cut": 0, "response_cut": 0}
    for i, row in enumerate(rows):
        prompt = prompt_ids(get_template("native"), row.prompt, word_tokenizer)
        response = response_ids(row.response, word_tokenizer)
        expected, start, cut = cut_by_hand(prompt, response, limit)
        assert encoded.store.sequence(i).tolist() == expected
        assert encoded.store.prompt_lengths[i] == start and encoded.truncated[i] == cut
        if len(prompt) + len(response) > limit:
            cuts["response_cut" if cut else "prompt_cut"] += 1
    assert encoded.lengths.max() <= limit
    finding = report.finding("overlong", "train")
    assert finding.detail == {name: n for name, n in cuts.items() if n} and finding.found == sum(cuts.values())
    assert finding.dropped == 0


def test_overlong_policies(word_tokenizer: Any, make_pair: Pair) -> None:
    rows = [make_pair("how", "bake " * 30, "water"), make_pair("plant", "a", "tree")]
    report = DataReport("mine", kept={"train": 2})
    encoded = encoder(word_tokenizer, 20).pairs(rows, report=report, policy=DataPolicyConfig(overlong="drop"))
    assert [row.id for row in encoded.rows] == [rows[1].id] and len(encoded) == 1
    assert report.kept["train"] == 1 and report.finding("overlong", "train").dropped == 1
    batch = encoded.collate([0])
    kept = batch.tokens.input_ids[1][batch.tokens.response_mask[1]].tolist()
    assert kept == response_ids("tree", word_tokenizer)
    with pytest.raises(UserError, match=rf"overlong row {rows[0].id}.*backbone\.max_length"):
        encoder(word_tokenizer, 20).pairs(rows, policy=DataPolicyConfig(overlong="error"))


def test_pairs_that_differ_behind_the_cut_only_count_as_identical(word_tokenizer: Any, make_pair: Pair) -> None:
    rows = [make_pair("how", "bake " * 40 + "water", "bake " * 40 + "flour"), make_pair("plant", "a", "tree")]
    report = DataReport("mine", kept={"train": 2})
    encoded = encoder(word_tokenizer, 32).pairs(rows, report=report)
    assert len(encoded) == 1 and report.finding("identical", "train").detail == {"tokens": 1}
    assert len(encoder(word_tokenizer, 32).pairs(rows, policy=DataPolicyConfig(identical="keep"))) == 2


def test_unknown_words_are_refused(word_tokenizer: Any, make_pair: Pair) -> None:
    paper = Encoder.build(word_tokenizer, "paper", 64)
    with pytest.raises(UserError, match=r"does not know the words.*backbone=smollm2"):
        paper.pairs([make_pair("bake", "words of another world", "and more of them")])


def test_a_few_unknown_words_pass(word_tokenizer: Any) -> None:
    class Plain:
        name = "plain"

        def prompts_ids(self, prompts: Any, tokenizer: Any) -> list[list[int]]:
            return [[2]] * len(prompts)

    rows = [answer("q", "bake " * 99)] * 3
    plain = Encoder(word_tokenizer, Plain(), 128)
    assert len(plain.answers([*rows, answer("q", "strange bread")])) == 4
    with pytest.raises(UserError, match=r"2% of the tokens are unknown"):
        plain.answers([*rows, answer("q", "strange " * 6)])


def test_lengths_are_reported(word_tokenizer: Any) -> None:
    report = DataReport("mine")
    rows = [answer("how", "bake"), answer("how", "bake bread then")]
    encoded = encoder(word_tokenizer).answers(rows, "val", report)
    assert report.lengths["val"]["tokens_total"] == float(encoded.lengths.sum())
    assert report.lengths["val"]["tokens_max"] == float(encoded.lengths.max())


def test_storage_is_flat(word_tokenizer: Any, make_pair: Pair) -> None:
    encoded = encoder(word_tokenizer).rows([make_pair(f"how {'to ' * i}") for i in range(5)])
    assert encoded.store.flat.dtype == np.int32 and encoded.store.flat.ndim == 1
    assert encoded.store.offsets[-1] == len(encoded.store.flat) and len(encoded.store) == 10


def test_a_length_that_holds_nothing_is_refused(word_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"backbone\.max_length"):
        Encoder.build(word_tokenizer, "native", 4)


@pytest.mark.parametrize("name", ["native", "paper"])
def test_real_rows_keep_their_words(data_root: Any, byte_tokenizer: Any, name: str, file_config: Any) -> None:
    """Tokens decode to the very responses, except where the report says that they were cut."""
    from saferlhf.data.build import build_data

    if not (data_root / "pku-saferlhf" / "test.parquet").is_file():
        pytest.skip("no PKU-SafeRLHF rows")
    data = build_data(file_config(data_root / "pku-saferlhf" / "test.parquet"), PreferencePair)
    rows = data.val + data.test
    encoded = Encoder.build(byte_tokenizer, name, 400).rows(rows, "test", data.report)
    batch = encoded.collate(range(len(encoded)))
    assert isinstance(batch, PairBatch)
    tokens, n, whole = batch.tokens, len(encoded), 0
    for i in range(2 * n):
        ids = tokens.input_ids[i][tokens.response_mask[i]].tolist()
        row = encoded.rows[i % n]
        assert isinstance(row, PreferencePair)
        expected = row.response_0 if i < n else row.response_1
        # compared outside of the assertion, which would print the row when it fails
        if encoded.truncated[i]:
            is_start = expected.startswith(byte_tokenizer.decode(ids).rstrip("\ufffd"))
            assert is_start and ids[-1] != byte_tokenizer.eos_token_id
        else:
            whole += 1
            same = byte_tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == expected
            assert same and ids[-1] == byte_tokenizer.eos_token_id
    assert 0 < whole < 2 * n
