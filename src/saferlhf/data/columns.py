"""Columns: a raw record of any file becomes a canonical row by a mapping `canonical column -> column of the file`.

Without a mapping PKU-SafeRLHF's own names are looked for, and for pairs `chosen` and `rejected`, which say in two
columns what `response_0`, `response_1`, `better_response_id` and `single_response_id` say in four. A mapped name may
be a dotted path into nested objects (`extra.question`). Prompts are text or lists of chat turns; `chosen` and
`rejected` may be whole conversations, whose last turn is the response. Columns nobody asked for are ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from saferlhf.data.files import Record
from saferlhf.data.rows import PreferencePair, Prompt, PromptRow, QuestionAnswer, Row, Turn, content_id
from saferlhf.errors import UserError

_ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
}
_MISSING = object()


@dataclass(frozen=True)
class Columns:
    """Which column of the file feeds which canonical column.

    Attributes:
        kind: the record type to build.
        names: canonical column -> column or dotted path; only columns that the file has.
    """

    kind: type[Row]
    names: Mapping[str, str]

    @property
    def chosen_style(self) -> bool:
        """Whether the pairs are written as chosen and rejected."""
        return "chosen" in self.names

    def row(self, record: Record) -> Row:
        """The canonical row of one record.

        Raises:
            UserError: a value of the wrong type, named by column and place.
        """
        read = _Reader(record, self.names)
        if self.kind is PreferencePair:
            return _chosen_pair(read) if self.chosen_style else _pair(read)
        if self.kind is QuestionAnswer:
            return _answer(read)
        prompt = read.prompt("prompt")
        return PromptRow(prompt_id(prompt), prompt)


def canonical_columns(kind: type[Row]) -> tuple[str, ...]:
    """The names a mapping may use for this kind of row."""
    own = tuple(f.name for f in fields(kind) if f.name != "id")
    return (*own, "chosen", "rejected") if kind is PreferencePair else own


def choose_columns(kind: type[Row], mapping: Mapping[str, Any] | None, sample: Sequence[Record]) -> Columns:
    """Settle the mapping once, on the first records of a file.

    Label columns are optional: rows without them are unlabelled, and a task that needs the label says so later.

    Raises:
        UserError: an unknown canonical name, a mapped column the file has not, or a needed column that is nowhere.
    """
    known = canonical_columns(kind)
    explicit = {str(name): str(column) for name, column in (mapping or {}).items() if column is not None}
    for name in explicit:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or [", ".join(known)]
            raise UserError(f"there is no canonical column '{name}'", "data.columns", f"did you mean {near[0]}?")
    columns = list(dict.fromkeys(column for record in sample for column in record.values))
    there, place = ", ".join(columns) or "none", sample[0].place
    for name, column in explicit.items():
        if all(_lookup(record.values, column) is _MISSING for record in sample):
            near = difflib.get_close_matches(column, columns, n=1)
            mend = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"no column '{column}'", place, f"{mend}there are: {there}; set data.columns.{name}=COLUMN")
    names = {name: name for name in known if name in columns} | explicit
    needed: tuple[str, ...] = ("response",) if kind is QuestionAnswer else ()
    if kind is PreferencePair:
        names = _pair_columns(names, explicit)
        needed = ("chosen", "rejected") if {"chosen", "rejected"} & set(names) else ("response_0", "response_1")
    # whole conversations bring their prompt along
    talks = "chosen" in names and isinstance(_lookup(sample[0].values, names["chosen"]), list)
    for name in (*(() if talks else ("prompt",)), *needed):
        if name not in names:
            raise _missing_column(name, kind, there, place)
    return Columns(kind, names)


def _pair_columns(found: dict[str, str], explicit: dict[str, str]) -> dict[str, str]:
    """Keep one of the two ways to write a pair; an explicit mapping decides, then PKU-SafeRLHF's own names."""
    sides = ("response_0", "response_1")
    own_way = any(name in explicit for name in sides) or (
        all(name in found for name in sides) and not any(name in explicit for name in ("chosen", "rejected"))
    )
    chosen_way = not own_way and any(name in found for name in ("chosen", "rejected"))
    # labels by response index mean nothing when the sides come from chosen and rejected
    keep = ("prompt", "chosen", "rejected") if chosen_way else tuple(set(found) - {"chosen", "rejected"})
    return {name: column for name, column in found.items() if name in keep}


def _missing_column(name: str, kind: type[Row], there: str, place: str) -> UserError:
    mend = f"there are: {there}; map one of them: data.columns.{name}=COLUMN"
    if kind is PreferencePair and name.startswith("response_"):
        mend += " (or data.columns.chosen=COLUMN data.columns.rejected=COLUMN)"
    return UserError(f"column '{name}' is missing", place, mend)


def _lookup(values: Any, column: str) -> Any:
    """The value of a column, or of a dotted path when no column has the whole name."""
    if column in values:
        return values[column]
    for part in column.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return _MISSING
        values = values[part]
    return values


class _Reader:
    """Typed access to one record; every refusal names the column and the place."""

    def __init__(self, record: Record, names: Mapping[str, str]) -> None:
        self.record, self.names = record, names

    def value(self, name: str) -> Any:
        """The raw value; None where the mapping or the row has no such column."""
        value = _lookup(self.record.values, self.names[name]) if name in self.names else _MISSING
        return None if value is _MISSING else value

    def error(self, what: str, mend: str = "mend or remove the row") -> UserError:
        return UserError(what, self.record.place, mend)

    def text(self, name: str) -> str:
        value = self.value(name)
        if isinstance(value, list | dict):
            turns = self.turns(name, value)
            if not turns or turns[-1].role != "assistant":
                raise self.error(f"column '{self.names[name]}' ends in no assistant turn")
            return turns[-1].content
        if not isinstance(value, str):
            raise self.error(f"column '{self.names[name]}' holds {_type_name(value)}, text is needed")
        return value

    def turns(self, name: str, value: Any) -> Prompt:
        listed = [value] if isinstance(value, dict) else value
        out = []
        for turn in listed:
            role = turn.get("role") if isinstance(turn, dict) else None
            content = turn.get("content", turn.get("text")) if isinstance(turn, dict) else None
            if not isinstance(role, str) or not isinstance(content, str):
                raise self.error(f"column '{self.names[name]}': a chat turn needs text under role and content")
            if role.lower() not in _ROLES:
                raise self.error(f"column '{self.names[name]}': unknown role '{role}'", "use user, assistant or system")
            out.append(Turn(_ROLES[role.lower()], content))
        return tuple(out)

    def prompt(self, name: str) -> Prompt:
        value = self.value(name)
        if isinstance(value, str):
            return (Turn("user", value),)
        if not isinstance(value, list | dict):
            what = f"column '{self.names[name]}' holds {_type_name(value)}, text or a list of chat turns is needed"
            raise self.error(what)
        return self.ends_with_user(self.turns(name, value), name)

    def ends_with_user(self, turns: Prompt, name: str) -> Prompt:
        if not turns or turns[-1].role != "user":
            raise self.error(f"column '{self.names[name]}': a prompt ends with a user turn")
        return turns

    def optional(self, name: str, parse: Callable[[Any], Any], needed: str) -> Any:
        value = self.value(name)
        if value is None or value == "" or (isinstance(value, float) and value != value):
            return None
        parsed = parse(value)
        if parsed is None:
            raise self.error(f"column '{self.names[name]}' holds {_type_name(value)}, {needed} is needed")
        return parsed

    def flag(self, name: str) -> bool | None:
        return self.optional(name, _as_bool, "true or false")  # type: ignore[no-any-return]

    def side(self, name: str) -> int | None:
        value = self.optional(name, _as_int, "0, 1 or -1 (not labelled)")
        if value is not None and value not in (-1, 0, 1):
            raise self.error(f"column '{self.names[name]}' holds {value}, 0, 1 or -1 (not labelled) is needed")
        return None if value == -1 else value

    def severity(self, name: str) -> int | None:
        value = self.optional(name, _as_int, "a severity from 0 to 3")
        if value is not None and not 0 <= value <= 3:
            raise self.error(f"column '{self.names[name]}' holds {value}, a severity from 0 to 3 is needed")
        return value  # type: ignore[no-any-return]

    def categories(self, name: str) -> frozenset[str] | None:
        return self.optional(name, _as_categories, "an object of true/false or a list of names")  # type: ignore[no-any-return]


def _pair(read: _Reader) -> PreferencePair:
    prompt, sides = read.prompt("prompt"), (read.text("response_0"), read.text("response_1"))
    return PreferencePair(
        id=pair_id(prompt, *sides),
        prompt=prompt,
        response_0=sides[0],
        response_1=sides[1],
        is_response_0_safe=read.flag("is_response_0_safe"),
        is_response_1_safe=read.flag("is_response_1_safe"),
        response_0_harm_category=read.categories("response_0_harm_category"),
        response_1_harm_category=read.categories("response_1_harm_category"),
        response_0_severity_level=read.severity("response_0_severity_level"),
        response_1_severity_level=read.severity("response_1_severity_level"),
        better_response_id=read.side("better_response_id"),
        safer_response_id=read.side("safer_response_id"),
        single_response_id=read.side("single_response_id"),
    )


def _chosen_pair(read: _Reader) -> PreferencePair:
    """Chosen is written as response 0; the sides are shuffled later, with those of every other source."""
    prompts = [prefix for name in ("chosen", "rejected") if (prefix := _conversation_prompt(read, name))]
    if len(set(prompts)) > 1:
        raise read.error("chosen and rejected are conversations that differ before their last turn")
    prompt = prompts[0] if prompts else read.prompt("prompt")
    chosen, rejected = read.text("chosen"), read.text("rejected")
    return PreferencePair(
        id=pair_id(prompt, chosen, rejected),
        prompt=prompt,
        response_0=chosen,
        response_1=rejected,
        better_response_id=0,
        single_response_id=0,
    )


def _conversation_prompt(read: _Reader, name: str) -> Prompt | None:
    """The turns before the response where the column holds a whole conversation."""
    value = read.value(name)
    if not isinstance(value, list) or len(value) < 2:
        return None
    return read.ends_with_user(read.turns(name, value)[:-1], name)


def _answer(read: _Reader) -> QuestionAnswer:
    prompt, response = read.prompt("prompt"), read.text("response")
    return QuestionAnswer(
        id=answer_id(prompt, response),
        prompt=prompt,
        response=response,
        is_safe=read.flag("is_safe"),
        harm_category=read.categories("harm_category"),
        severity_level=read.severity("severity_level"),
    )


def pair_id(prompt: Prompt, response_0: str, response_1: str) -> str:
    """Id of a pair, by content."""
    return content_id("pair", *_parts(prompt), response_0, response_1)


def answer_id(prompt: Prompt, response: str) -> str:
    """Id of a question with its answer, by content."""
    return content_id("answer", *_parts(prompt), response)


def prompt_id(prompt: Prompt) -> str:
    """Id of a prompt, by content."""
    return content_id("prompt", *_parts(prompt))


def _parts(prompt: Prompt) -> list[str]:
    return [part for turn in prompt for part in turn]


def _as_bool(value: Any) -> bool | None:
    if isinstance(value, str):
        return {"true": True, "1": True, "false": False, "0": False}.get(value.strip().lower())
    return bool(value) if value in (0, 1) else None


def _as_int(value: Any) -> int | None:
    if isinstance(value, bool):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return int(number) if number.is_integer() else None


def _as_categories(value: Any) -> frozenset[str] | None:
    if isinstance(value, Mapping):
        flags = {str(name): _as_bool(flag) for name, flag in value.items()}
        return None if None in flags.values() else frozenset(name for name, flag in flags.items() if flag)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    return None


def _type_name(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
