"""What a guard model is asked and how its answers are read; no prompt text of any published guard stands here.

The question is the tokenizer's own chat template over the conversation and the response (`template: native`, as Llama
Guard and Qwen3Guard ship it), or a text of the user's with `{prompt}` and `{response}`. Formats of answers:

    llama_guard   first line `safe` or `unsafe`, then a line with codes of categories (Llama Guard, arXiv 2312.06674)
    qwen3guard    lines `Safety: Safe | Controversial | Unsafe`, `Categories: ..`, `Refusal: ..` (arXiv 2510.14276);
                  controversial counts as unsafe, its strict mode
    wildguard     lines `Harmful request: ..`, `Response refusal: ..`, `Harmful response: yes | no` (arXiv 2406.18495)
    words         the first word is the verdict

An answer that is not of its format is unparsed: never safe, never unsafe.

Control tokens that a prompt or a response spells are broken up by a space, so that a response cannot end its own turn
and go on with a verdict. Plain words that a template puts around a response can still be imitated by it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saferlhf.data.rows import Prompt, Turn
from saferlhf.data.templates import encode_texts, start_ids
from saferlhf.errors import UserError

Encode = Callable[[Prompt, str], list[int]]
"""(conversation, response) -> ids of a question."""

_BEFORE = "\n"  # a word at the beginning of a line is a token of its own in most vocabularies


# ------------------------------------------------------------------------------------------------ formats
@dataclass(frozen=True)
class GuardFormat:
    """How a guard answers.

    Attributes:
        unsafe, safe: words of the verdict.
        lead: written by every answer before its first word; put behind the question, so that the verdict comes next.
        verdict_field, category_field, refusal_field: names of lines `name: value`; "": there is no such line.
        category_line: the second line names the categories.
        new_tokens: tokens that the guard has to write before its verdict can be read; 0: none.
    """

    unsafe: tuple[str, ...] = ()
    safe: tuple[str, ...] = ()
    lead: str = ""
    verdict_field: str = ""
    category_field: str = ""
    refusal_field: str = ""
    category_line: bool = False
    new_tokens: int = 0

    @property
    def anchor(self) -> str:
        """What the guard writes right before its verdict; "": nothing, the verdict comes first."""
        return f"{self.verdict_field}:" if self.new_tokens else ""


FORMATS: dict[str, GuardFormat] = {
    "llama_guard": GuardFormat(("unsafe",), ("safe",), lead="\n\n", category_line=True),
    "qwen3guard": GuardFormat(
        ("Unsafe", "Controversial"),
        ("Safe",),
        lead="Safety:",
        verdict_field="Safety",
        category_field="Categories",
        refusal_field="Refusal",
    ),
    "wildguard": GuardFormat(
        ("yes",), ("no",), verdict_field="Harmful response", refusal_field="Response refusal", new_tokens=32
    ),
    "words": GuardFormat(),
}


@dataclass(frozen=True)
class GuardAnswer:
    """A written answer, read.

    Attributes:
        unsafe: the verdict.
        categories: as written; empty where the verdict is safe.
        refusal: whether the response refuses; None: not said.
    """

    unsafe: bool
    categories: tuple[str, ...] = ()
    refusal: bool | None = None


def parse_answer(text: str, form: GuardFormat) -> GuardAnswer | None:
    """Read a written answer; None: it is not of this format, or says two things."""
    lines = text.strip().splitlines()
    if not lines:
        return None
    if form.verdict_field:
        said = _field(text, form.verdict_field)
    elif form.category_line:
        said = lines[0]
    else:
        found = re.match(r"\W*(\w+)", text)
        said = found[1] if found else ""
    unsafe = _verdict(said or "", form)
    if unsafe is None:
        return None
    named = ""
    if form.category_field:
        named = _field(text, form.category_field) or ""
    elif form.category_line and len(lines) > 1:
        named = lines[1]
    categories = tuple(part.strip() for part in named.split(",") if part.strip() and part.strip().lower() != "none")
    refusal = {"yes": True, "no": False}.get((_field(text, form.refusal_field) or "").lower())
    return GuardAnswer(unsafe, categories if unsafe else (), refusal if form.refusal_field else None)


def _verdict(said: str, form: GuardFormat) -> bool | None:
    word = said.strip().lower()
    if word in {known.lower() for known in form.unsafe}:
        return True
    return False if word in {known.lower() for known in form.safe} else None


def _field(text: str, name: str) -> str | None:
    """The value of a line `name: value`; None where there is none, or several that differ."""
    if not name:
        return None
    found = set(re.findall(rf"^[ \t]*{re.escape(name)}[ \t]*:[ \t]*(.*?)[ \t]*$", text, re.MULTILINE | re.IGNORECASE))
    return found.pop() if len(found) == 1 else None


# ------------------------------------------------------------------------------------------------ verdict words
def verdict_tokens(form: GuardFormat, tokenizer: Any) -> tuple[list[int], list[int]]:
    """First tokens of the unsafe and of the safe words, however they are spelt: alone, after a space, after a line.

    Raises:
        UserError: a word that the vocabulary has no token for, or words of both verdicts that begin alike.
    """
    unsafe, safe = _first_tokens(form.unsafe, tokenizer), _first_tokens(form.safe, tokenizer)
    if both := unsafe & safe:
        what = f"words of both verdicts begin with the same token {tokenizer.decode([min(both)])!r}"
        raise UserError(what, "judge.unsafe_words, judge.safe_words", "put what they share into judge.lead")
    return sorted(unsafe), sorted(safe)


def _first_tokens(words: Sequence[str], tokenizer: Any) -> set[int]:
    found = set()
    (before,) = encode_texts([_BEFORE], tokenizer)
    for word in words:
        alone, spaced, lined = encode_texts([word, f" {word}", _BEFORE + word], tokenizer)
        rest = lined[len(before) :] if lined[: len(before)] == before else []
        # a token of white space alone begins any word
        first = {ids[0] for ids in (alone, spaced, rest) if ids and tokenizer.decode([ids[0]]).strip()}
        first -= {getattr(tokenizer, "unk_token_id", None)}
        if not first:
            raise UserError(f"the tokenizer has no token for '{word}'", "judge.unsafe_words, judge.safe_words")
        found |= first
    return found


# ------------------------------------------------------------------------------------------------ questions
TEMPLATE_MEND = "judge.template_file=FILE with the question of its model card, {prompt} and {response} in it"


class Question:
    """Turns a conversation and a response into the ids of a question.

    Args:
        tokenizer: the guard's.
        template: "native" or a text with `{prompt}` and `{response}`.
        lead: put behind it where it does not end so already.
        generation_prompt: given to the chat template.

    Raises:
        UserError: `native` with a tokenizer that has no chat template, or one that does not show both texts.
    """

    def __init__(self, tokenizer: Any, template: str, lead: str = "", generation_prompt: bool = False) -> None:
        if template == "native" and not getattr(tokenizer, "chat_template", None):
            what = "the guard's tokenizer has no chat template"
            raise UserError(what, "judge.template=native", TEMPLATE_MEND)
        self.tokenizer, self.template, self.lead, self._cue = tokenizer, template, lead, generation_prompt
        self._start = start_ids(tokenizer)
        self._parts = re.split(r"(\{prompt\}|\{response\})", template)
        # some templates want a list of parts and silently show nothing of a text, as that of Llama Guard 3 1B
        self._in_parts = template == "native" and self._shape()

    def __call__(self, prompt: Prompt, response: str) -> list[int]:
        """Ids of one question.

        Raises:
            ValueError: the chat template refuses this conversation.
        """
        native = self.template == "native"
        text = self._native(prompt, response, self._in_parts) if native else self._filled(prompt, response)
        text = text if text.endswith(self.lead) else text + self.lead
        (ids,) = encode_texts([text], self.tokenizer, control_tokens=True)
        if native or ids[: len(self._start)] == self._start:
            return ids  # it spells its start token itself
        return [*self._start, *ids]

    def _shape(self) -> bool:
        """Whether the chat template wants contents as lists of parts, found with words that stand nowhere else."""
        probe = (Turn("user", "probe4question"),), "probe4answer"
        for in_parts in (False, True):
            try:
                text = self._native(*probe, in_parts)
            except (ValueError, TypeError):  # Python's own where a template takes a text for a list
                continue
            if all(words in text for words in (probe[0][0].content, probe[1])):
                return in_parts
        what = "the guard's chat template does not show a prompt with its response: it may judge prompts alone"
        raise UserError(what, "judge.template=native", TEMPLATE_MEND)

    def _native(self, prompt: Prompt, response: str, in_parts: bool) -> str:
        def content(text: str) -> Any:
            return [{"type": "text", "text": text}] if in_parts else text

        turns = [{"role": t.role, "content": content(t.content)} for t in (*prompt, Turn("assistant", response))]
        try:
            return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=self._cue, tokenize=False))
        except Exception as error:  # jinja's errors; the library wraps none of them
            if type(error).__module__.split(".")[0] != "jinja2":
                raise
            raise ValueError("the guard's chat template refuses this conversation") from None

    def _filled(self, prompt: Prompt, response: str) -> str:
        # in one pass: what a prompt says is not looked at for marks
        values = {"{prompt}": talk_text(prompt), "{response}": response}
        return "".join(values.get(part, part) for part in self._parts)


def talk_text(prompt: Prompt) -> str:
    """One user turn as it is; several turns with who speaks."""
    if len(prompt) == 1:
        return prompt[0].content
    return "\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in prompt)


def fitted(
    prompt: Prompt, response: str, encode: Encode, tokenizer: Any, limit: int
) -> tuple[list[int] | None, Prompt, bool]:
    """A question of at most `limit` tokens: the prompt loses its beginning, what the template says stays whole.

    Args:
        prompt, response: control tokens broken up already.
        encode: to the ids of the question.
        tokenizer: fast, for where its tokens lie in a text.
        limit: tokens.

    Returns:
        The ids, None where template and response alone are too long; the prompt that is left; whether it lost any.
    """
    ids, cut = encode(prompt, response), False
    while len(ids) > limit:
        shorter = _shorter(prompt, len(ids) - limit, tokenizer)
        if shorter is None:
            return None, prompt, True
        prompt, cut = shorter, True
        ids = encode(prompt, response)
    return ids, prompt, cut


def _shorter(prompt: Prompt, excess: int, tokenizer: Any) -> Prompt | None:
    """Without the first tokens of the first turn that has any; None where no turn has."""
    for place, turn in enumerate(prompt):
        if not turn.content:
            continue
        offsets = tokenizer(turn.content, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        start = offsets[excess][0] if excess < len(offsets) else len(turn.content)
        rest = turn.content[max(1, start) :].lstrip()  # several tokens can be one letter: one goes at least
        return (*prompt[:place], Turn(turn.role, rest), *prompt[place + 1 :])
    return None


class ControlTokens:
    """Breaks up the control tokens of a tokenizer where data spell them.

    Args:
        tokenizer: any.
    """

    def __init__(self, tokenizer: Any) -> None:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        names = {str(token.content) for token in added if token.special} | set(tokenizer.all_special_tokens)
        longest_first = sorted((name for name in names if name), key=lambda name: (-len(name), name))
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def broken(self, text: str) -> str:
        """The text with a space inside every control token it spells."""
        if self._pattern is None:
            return text
        return self._pattern.sub(lambda found: f"{found[0][0]} {found[0][1:]}" if len(found[0]) > 1 else " ", text)

    def broken_prompt(self, prompt: Prompt) -> Prompt:
        """The same turns, their texts through `broken`."""
        return tuple(Turn(turn.role, self.broken(turn.content)) for turn in prompt)
