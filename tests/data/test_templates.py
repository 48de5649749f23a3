"""Templates: the paper's format to the letter, one start token, one end token, and no words read as control tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from saferlhf.data.rows import Turn, as_prompt
from saferlhf.data.templates import (
    encode_texts,
    end_id,
    get_template,
    pad_id,
    prompt_ids,
    response_ids,
    responses_ids,
    start_ids,
)
from saferlhf.errors import UserError

TALK = (Turn("user", "how to bake"), Turn("assistant", "flour"), Turn("user", "then"))


def text(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def test_paper_format_to_the_letter(byte_tokenizer: Any) -> None:
    ids = prompt_ids(get_template("paper"), as_prompt("how to bake"), byte_tokenizer)
    whole = ids + response_ids("first water", byte_tokenizer)
    expected = "<|start|>BEGINNING OF CONVERSATION: USER: how to bake ASSISTANT:first water<|end|>"
    assert text(whole, byte_tokenizer) == expected


def test_paper_format_of_several_turns(byte_tokenizer: Any) -> None:
    ids = prompt_ids(get_template("paper"), TALK, byte_tokenizer)
    expected = "<|start|>BEGINNING OF CONVERSATION: USER: how to bake ASSISTANT:flour<|end|>USER: then ASSISTANT:"
    assert text(ids, byte_tokenizer) == expected
    # what an earlier answer was when it was sampled, it still is
    first = prompt_ids(get_template("paper"), TALK[:1], byte_tokenizer) + response_ids("flour", byte_tokenizer)
    assert ids[: len(first)] == first


@pytest.mark.parametrize(
    "turns",
    [(Turn("system", "be kind"), Turn("user", "q")), (Turn("user", "q"), Turn("user", "q")), TALK[:2]],
)
def test_paper_format_refuses_what_it_has_no_place_for(byte_tokenizer: Any, turns: Any) -> None:
    with pytest.raises(UserError, match=r"backbone\.template=native"):
        prompt_ids(get_template("paper"), turns, byte_tokenizer)


def test_native_is_the_tokenizers_own_chat_template(byte_tokenizer: Any) -> None:
    ids = prompt_ids(get_template("native"), TALK, byte_tokenizer)
    messages = [{"role": turn.role, "content": turn.content} for turn in TALK]
    assert ids == byte_tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert text(ids, byte_tokenizer).endswith("<|start|>user\nthen<|end|>\n<|start|>assistant\n")


def test_no_double_start_token(byte_tokenizer: Any) -> None:
    start = byte_tokenizer.bos_token_id
    assert byte_tokenizer("x")["input_ids"][0] == start  # this tokenizer sets one by itself
    for name in ("native", "paper"):
        ids = prompt_ids(get_template(name), as_prompt("how"), byte_tokenizer)
        assert ids[0] == start and ids[1] != start
    assert start not in response_ids("how", byte_tokenizer)


def test_no_start_token_where_the_tokenizer_sets_none(word_tokenizer: Any) -> None:
    assert start_ids(word_tokenizer) == []
    ids = prompt_ids(get_template("paper"), as_prompt("how"), word_tokenizer)
    assert word_tokenizer.bos_token_id not in ids


@pytest.mark.parametrize("response", ["flour", "", "flour<|end|>", "<|end|><|start|>user\nhow", " "])
def test_exactly_one_end_token(byte_tokenizer: Any, response: str) -> None:
    ids = response_ids(response, byte_tokenizer)
    assert ids.count(byte_tokenizer.eos_token_id) == 1 and ids[-1] == byte_tokenizer.eos_token_id
    assert byte_tokenizer.bos_token_id not in ids
    assert text(ids[:-1], byte_tokenizer) == response  # the words survive, as words


def test_control_tokens_in_a_question_of_the_paper_format_are_words(byte_tokenizer: Any) -> None:
    ids = prompt_ids(get_template("paper"), as_prompt("a<|end|>b"), byte_tokenizer)
    assert byte_tokenizer.eos_token_id not in ids


def test_prompt_and_response_are_encoded_apart(byte_tokenizer: Any) -> None:
    prompt, response = prompt_ids(get_template("paper"), as_prompt("how"), byte_tokenizer), "first"
    joined = byte_tokenizer(text(prompt, byte_tokenizer) + response, add_special_tokens=False)["input_ids"]
    apart = prompt + response_ids(response, byte_tokenizer)[:-1]
    # this tokenizer has learnt ":first" as one token, so the joined text would change the prompt's own last token
    assert text(joined, byte_tokenizer) == text(apart, byte_tokenizer) and joined != apart
    assert joined[: len(prompt)] != prompt


def test_many_at_once_equal_one_by_one(byte_tokenizer: Any, word_tokenizer: Any) -> None:
    prompts = [as_prompt("how to"), TALK, as_prompt("")]
    for tokenizer in (byte_tokenizer, word_tokenizer):
        for name in ("native", "paper"):
            template = get_template(name)
            assert template.prompts_ids(prompts, tokenizer) == [prompt_ids(template, p, tokenizer) for p in prompts]
            assert template.prompts_ids([], tokenizer) == []
        assert responses_ids(["a", "", "bake bread"], tokenizer) == [
            response_ids(response, tokenizer) for response in ("a", "", "bake bread")
        ]


def test_the_short_way_equals_the_librarys(byte_tokenizer: Any) -> None:
    texts = ["how to bake", "a<|end|>b", "", "ü 漢字 \n\t"]
    for control in (False, True):
        expected = byte_tokenizer(texts, add_special_tokens=False, split_special_tokens=not control)["input_ids"]
        assert encode_texts(texts, byte_tokenizer, control_tokens=control) == expected

    class Slow:  # a tokenizer without a fast backend takes the long way
        def __call__(self, texts: list[str], **options: Any) -> Any:
            return byte_tokenizer(texts, **options)

    assert encode_texts(texts, Slow()) == encode_texts(texts, byte_tokenizer)


def test_encoding_leaves_the_tokenizer_as_it_was(byte_tokenizer: Any) -> None:
    before = byte_tokenizer("a<|end|>b")["input_ids"]
    response_ids("a<|end|>b", byte_tokenizer)
    assert byte_tokenizer("a<|end|>b")["input_ids"] == before


def test_no_chat_template_is_refused_with_the_mend(word_tokenizer: Any) -> None:
    bare = SimpleNamespace(chat_template=None)
    with pytest.raises(UserError, match=r"no chat template.*use backbone\.template=paper"):
        get_template("native").prompts_ids([as_prompt("q")], bare)
    with pytest.raises(UserError, match="native, paper"):
        get_template("chatml")


def test_a_chat_template_that_refuses_is_one_line(byte_tokenizer: Any) -> None:
    import copy

    strict = copy.deepcopy(byte_tokenizer)
    strict.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(UserError, match=r"no system role.*backbone\.template=paper"):
        get_template("native").prompts_ids([as_prompt("q")], strict)


def test_end_and_pad_tokens() -> None:
    assert end_id(SimpleNamespace(eos_token_id=None, sep_token_id=5)) == 5
    assert pad_id(SimpleNamespace(eos_token_id=7, pad_token_id=None)) == 7
    assert pad_id(SimpleNamespace(eos_token_id=7, pad_token_id=0)) == 0
    with pytest.raises(UserError, match="no end-of-sequence token"):
        end_id(SimpleNamespace(eos_token_id=None))
