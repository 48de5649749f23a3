"""The toy world's word-level tokenizer, and the one place where the pad token is set."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import WORDS, backbone_config, folder_of, tokenizer

from saferlhf.errors import UserError
from saferlhf.models.locator import resolve
from saferlhf.models.tokenizer import load_tokenizer, toyworld_tokenizer

CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]


def test_words_and_tokens_are_the_same_thing() -> None:
    tok = tokenizer()
    ids = tok("w0 w58  w7").input_ids
    assert ids == [5, 63, 12]
    assert tok.decode(ids) == "w0 w58 w7"
    assert tok("w0 nonsense").input_ids == [5, 1]
    assert len(tok) == 64
    assert (tok.pad_token_id, tok.eos_token_id, tok.unk_token_id) == (0, 2, 1)
    assert tok.decode([3, 5, 2, 0, 0], skip_special_tokens=True) == "w0"
    assert tok("w0 , w1 .").input_ids.count(1) == 2, "nothing but white space separates words"


def test_punctuation_survives_decoding() -> None:
    tok = toyworld_tokenizer(["yes", ",", "do", "n't", "."])
    assert tok.decode(tok("yes , do n't .").input_ids) == "yes , do n't ."


def test_chat_template_and_its_prompt_is_a_prefix() -> None:
    tok = tokenizer()
    whole = tok.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    prompt = tok.apply_chat_template(CHAT[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
    assert whole == [3, 6, 7, 4, 8, 2]
    assert prompt == [3, 6, 7, 4]
    assert tok.apply_chat_template(CHAT, tokenize=False).split() == "<user> w1 w2 <assistant> w3 <eos>".split()


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "config.json").write_text('{"model_type": "llama"}')
    location = resolve(str(tmp_path / "a"), output_root=tmp_path)
    again = load_tokenizer(backbone_config(), location=location)
    text = "w1 w5 <eos> w2"
    assert again(text).input_ids == tokenizer()(text).input_ids
    assert again.apply_chat_template(CHAT, tokenize=False) == tokenizer().apply_chat_template(CHAT, tokenize=False)
    assert (again.pad_token_id, again.eos_token_id, len(again)) == (0, 2, 64)
    assert again.decode([5, 6]) == "w0 w1"


def test_a_model_without_a_pad_token_pads_with_its_end_token(tmp_path: Path) -> None:
    tok = tokenizer()
    tok.pad_token = None
    tok.save_pretrained(tmp_path / "gpt")
    (tmp_path / "gpt" / "config.json").write_text('{"model_type": "gpt2"}')
    cfg = backbone_config(architecture=None, model=str(tmp_path / "gpt"), tokenizer=None)
    loaded = load_tokenizer(cfg)
    assert loaded.pad_token_id == loaded.eos_token_id == 2


def test_init_brings_its_own_tokenizer(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "start")
    assert len(load_tokenizer(backbone_config(), vocabulary=("other",), init=folder)) == 64


@pytest.mark.parametrize("words", [["a", "a"], ["two words"], [""], ["<eos>"]])
def test_impossible_words_are_refused(words: list[str]) -> None:
    with pytest.raises(ValueError, match="words must be"):
        toyworld_tokenizer(words)


def test_errors_name_the_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs its words"):
        load_tokenizer(backbone_config())
    with pytest.raises(UserError, match=r"set backbone\.tokenizer"):
        load_tokenizer(backbone_config(tokenizer=None))
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(backbone_config(tokenizer=str(tmp_path)), vocabulary=WORDS)
