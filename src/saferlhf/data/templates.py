"""Templates: how a conversation becomes tokens, one format for every stage of training, sampling and scoring.

`native` is the tokenizer's own chat template. `paper` is the format of the Safe RLHF code:

    BEGINNING OF CONVERSATION: USER: {question} ASSISTANT:{answer}{eos}USER: {question} ASSISTANT:{answer}{eos}

Prompt and response are always encoded apart and their ids joined. Encoding the joined text would let the first word
of a response melt with the last sign of the prompt, so that a training sequence differed from what a policy reads and
samples, where the prompt's ids are fixed before the first response token exists. This differs from the reference,
which encodes the joined text and counts the prompt's tokens again.

A response is its own tokens and one end-of-sequence token, even where its text spells that token: words of the data
are never read as control tokens there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from saferlhf.data.rows import Prompt
from saferlhf.errors import UserError

TEMPLATES = ("native", "paper")

PAPER_BEGIN = "BEGINNING OF CONVERSATION: "
PAPER_USER = "USER: {question} ASSISTANT:"


class Template(Protocol):
    """Turns prompts into ids. `tokenizer` is a Hugging Face tokenizer."""

    @property
    def name(self) -> str:
        """The name in `backbone.template`."""
        ...

    def prompts_ids(self, prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
        """Ids of each prompt up to and with the words after which the assistant speaks."""
        ...


def get_template(name: str) -> Template:
    """The template of `backbone.template`.

    Raises:
        UserError: no such template.
    """
    if name == "native":
        return NativeTemplate()
    if name == "paper":
        return PaperTemplate()
    raise UserError(f"unknown template '{name}'", "backbone.template", f"use one of {', '.join(TEMPLATES)}")


def prompt_ids(template: Template, prompt: Prompt, tokenizer: Any) -> list[int]:
    """Ids of one prompt."""
    return template.prompts_ids([prompt], tokenizer)[0]


def response_ids(response: str, tokenizer: Any) -> list[int]:
    """Ids of one response and the end-of-sequence token, exactly once."""
    return responses_ids([response], tokenizer)[0]


def responses_ids(responses: Sequence[str], tokenizer: Any) -> list[list[int]]:
    """Ids of each response, each with one end-of-sequence token; the same in every template."""
    end = end_id(tokenizer)
    return [[*ids, end] for ids in encode_texts(responses, tokenizer)]


@dataclass(frozen=True)
class NativeTemplate:
    """The tokenizer's own chat template."""

    name: str = "native"

    def prompts_ids(self, prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
        """Ids by `apply_chat_template` with the generation prompt.

        Raises:
            UserError: the tokenizer has no chat template, or its template refuses a conversation.
        """
        if not getattr(tokenizer, "chat_template", None):
            what = "this backbone's tokenizer has no chat template"
            raise UserError(what, "backbone.template=native", "use backbone.template=paper")
        if not prompts:
            return []
        talks = [[{"role": turn.role, "content": turn.content} for turn in prompt] for prompt in prompts]
        try:
            # every argument is spelt out: the defaults differ between versions of the library
            texts = tokenizer.apply_chat_template(talks, add_generation_prompt=True, tokenize=False, return_dict=False)
        except Exception as error:  # jinja's errors; the library wraps none of them
            if type(error).__module__.split(".")[0] != "jinja2":
                raise
            what = f"the backbone's chat template refuses a conversation: {error}"
            raise UserError(what, "backbone.template=native", "use backbone.template=paper") from error
        # the template's text spells its control tokens itself, bos among them
        return encode_texts(texts, tokenizer, control_tokens=True)


@dataclass(frozen=True)
class PaperTemplate:
    """The format of the Safe RLHF code; starts with the tokenizer's start token where it sets one itself."""

    name: str = "paper"

    def prompts_ids(self, prompts: Sequence[Prompt], tokenizer: Any) -> list[list[int]]:
        """Ids in the paper's format; earlier answers are encoded apart, as they were when they were sampled.

        Raises:
            UserError: a system turn, for which the format has no place, or turns that do not alternate.
        """
        pieces = [self._pieces(prompt) for prompt in prompts]
        ids = iter(encode_texts([text for row in pieces for text in row], tokenizer))
        start, end = start_ids(tokenizer), end_id(tokenizer)
        out = []
        for row in pieces:
            joined = list(start)
            for i in range(len(row)):
                joined += next(ids)
                if i % 2:  # an earlier answer
                    joined.append(end)
            out.append(joined)
        return out

    @staticmethod
    def _pieces(prompt: Prompt) -> list[str]:
        """Question, answer, question, ... as texts that are encoded apart."""
        roles = [turn.role for turn in prompt]
        if roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
            what = "the paper's template needs user and assistant turns that alternate and end with the user"
            raise UserError(what, "backbone.template=paper", "use backbone.template=native or change the prompts")
        pieces = [turn.content if i % 2 else PAPER_USER.format(question=turn.content) for i, turn in enumerate(prompt)]
        return [PAPER_BEGIN + pieces[0], *pieces[1:]]


# ------------------------------------------------------------------------------------------------ tokenizer
def encode_texts(texts: Sequence[str], tokenizer: Any, control_tokens: bool = False) -> list[list[int]]:
    """Ids of texts, nothing added to them.

    Args:
        control_tokens: True reads control tokens that a text spells (what a chat template writes); False takes them for
            the letters they are made of (what data say).
    """
    if not texts:
        return []
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "encode_batch_fast"):
        encoded = tokenizer(list(texts), add_special_tokens=False, split_special_tokens=not control_tokens)
        return encoded["input_ids"]  # type: ignore[no-any-return]
    # the same call one floor below: no offsets and masks, which take most of the time
    before = backend.encode_special_tokens
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not control_tokens
    try:
        return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
    finally:
        backend.encode_special_tokens = before


def end_id(tokenizer: Any) -> int:
    """The token that ends a response: eos, or sep for encoders.

    Raises:
        UserError: the tokenizer has neither.
    """
    for name in ("eos_token_id", "sep_token_id"):
        value = getattr(tokenizer, name, None)
        if value is not None:
            return int(value)
    raise UserError("the tokenizer has no end-of-sequence token", "backbone.tokenizer", "set its eos_token")


def pad_id(tokenizer: Any) -> int:
    """The token that fills short rows. Never read back: masks come from lengths, so that pad may equal eos."""
    value = getattr(tokenizer, "pad_token_id", None)
    return end_id(tokenizer) if value is None else int(value)


def start_ids(tokenizer: Any) -> list[int]:
    """The start token (bos, or cls for encoders) where the tokenizer puts one in front of plain text by itself."""
    alone = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = {getattr(tokenizer, name, None) for name in ("bos_token_id", "cls_token_id")} - {None}
    return [alone[0]] if alone and alone[0] in starts else []
