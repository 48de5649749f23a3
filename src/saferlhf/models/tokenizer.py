"""Tokenizers: the backbone's own, or a word-level one built from the toy world's words.

The pad token is set here and nowhere else. Models without one pad with their end-of-sequence token, which is harmless,
because no mask in this project is ever made from token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saferlhf.config.schema import BackboneConfig
from saferlhf.errors import UserError
from saferlhf.models.locator import Location
from saferlhf.models.source import find_source

PAD, UNK, EOS, USER, ASSISTANT = "<pad>", "<unk>", "<eos>", "<user>", "<assistant>"
TOYWORLD_SPECIALS = (PAD, UNK, EOS, USER, ASSISTANT)
TOYWORLD_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<user> {{ message['content'] }} "
    "{% elif message['role'] == 'assistant' %}<assistant> {{ message['content'] }} <eos> "
    "{% else %}{{ message['content'] }} "
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def load_tokenizer(
    cfg: BackboneConfig,
    *,
    vocabulary: Sequence[str] = (),
    cache_dir: str | Path | None = None,
    location: Location | None = None,
    init: str | None = None,
    output_root: str | Path = "outputs",
) -> Any:
    """The tokenizer that belongs to a backbone, with pad and end-of-sequence tokens set.

    Args:
        cfg: `tokenizer` null: the backbone's own; "toyworld": one word, one token; else a Hugging Face name or folder.
        vocabulary: the toy world's words, in an order that is always the same.
        cache_dir: the project's cache folder (GGUF conversion).
        location: take the tokenizer of this export or folder instead.
        init: the weights' locator, if they start from another model: an export's tokenizer is the export's own.
        output_root: where relative run folders are looked for.

    Returns:
        A fast (`PreTrainedTokenizerFast`) tokenizer.
    """
    if location is None and init is not None:
        source = find_source(cfg, init=init, output_root=output_root, cache_dir=cache_dir)
        location = source.location if source.kind != "hub" else None
    if location is not None:
        name = str(location.folder) if location.folder is not None else str(location.name)
        return _finished(_pretrained(name, location.revision, cfg), name)
    if cfg.tokenizer == "toyworld":
        return toyworld_tokenizer(vocabulary)
    if cfg.tokenizer is not None:
        return _finished(_pretrained(cfg.tokenizer, None, cfg), cfg.tokenizer)
    source = find_source(cfg, output_root=output_root, cache_dir=cache_dir)
    if source.kind == "scratch":
        raise UserError(
            "a backbone built from scratch has no tokenizer of its own",
            f"backbone={cfg.name}",
            "set backbone.tokenizer",
        )
    name, revision = source.pretrained(cache_dir)
    return _finished(_pretrained(name, revision, cfg), name)


def toyworld_tokenizer(vocabulary: Sequence[str]) -> Any:
    """A word-level tokenizer: words are split at white space, `decode` joins them with single spaces.

    Token ids: 0 <pad>, 1 <unk>, 2 <eos>, 3 <user>, 4 <assistant>, then the words in the order given. The chat template
    writes `<user> words <assistant> words <eos>`, and a prompt with its generation prompt is a prefix, token by token,
    of the whole conversation.
    """
    if not vocabulary:
        raise UserError("the toy world's tokenizer needs its words", "backbone.tokenizer", "use data=toyworld or init=")
    bad = [word for word in vocabulary if not word or word.split() != [word] or word in TOYWORLD_SPECIALS]
    if bad or len(set(vocabulary)) != len(vocabulary):
        raise ValueError(f"words must be distinct, without white space and no special tokens: {bad[:3]}")
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: index for index, word in enumerate([*TOYWORLD_SPECIALS, *vocabulary])}
    words = Tokenizer(models.WordLevel(ids, unk_token=UNK))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=EOS,
        extra_special_tokens=[USER, ASSISTANT],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = TOYWORLD_TEMPLATE
    return tokenizer


def _pretrained(name: str, revision: str | None, cfg: BackboneConfig) -> Any:
    from transformers import AutoTokenizer

    extra = {} if revision is None else {"revision": revision}
    try:
        return AutoTokenizer.from_pretrained(name, trust_remote_code=cfg.trust_remote_code, **extra)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"no tokenizer could be loaded: {first}", name, "name a model that has tokenizer files"
        ) from error


def _finished(tokenizer: Any, name: str) -> Any:
    if not tokenizer.is_fast:
        raise UserError("the model has no fast tokenizer", name, "use a model with a tokenizer.json")
    if tokenizer.eos_token_id is None:  # encoders end a sequence with their separator
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise UserError(
            "the tokenizer has no end-of-sequence token", name, "add eos_token to its tokenizer_config.json"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
