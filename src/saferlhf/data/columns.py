"""Columns: a raw record of any file becomes a canonical row by a mapping `canonical column -> column of the file`.

Without a mapping PKU-SafeRLHF's own names are looked for, and for pairs `chosen` and `rejected`, which say in two
columns what `response_0`, `response_1`, `better_response_id` and `single_response_id` say in four. A mapped name may
be a dotted path into nested objects (`extra.question`), columns whose texts are joined (`instruction + input`), or a
list of columns of which the first that is there counts; null leaves a column out. Prompts are text or lists of chat
turns; `chosen` and `rejected` may be whole conversations, whose last turn is the response. Columns nobody asked for are
ignored. One column may feed several: a set of statements has the same text as prompt and as response.

Two more mappings go with it: `values` translates labels written in other words, and the pseudo column `group` names the
stratum of a row, which stands beside the rows and is no part of them.

A record that cannot become a row raises `BadValue`; it never ends the reading, `data.policy` says what happens to it.

Hash rule (PKU-SafeRLHF): `response_0_sha256`, `response_1_sha256` and `sha256` hold the SHA-256 of the UTF-8 bytes of
the prompt immediately followed by the response.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from saferlhf.data.files import Record
from saferlhf.data.parse import GROUP, MISSING, BadValue, Reader, lookup, raw_key
from saferlhf.data.rows import PreferencePair, Prompt, PromptRow, QuestionAnswer, Row, content_id
from saferlhf.errors import UserError


@dataclass(frozen=True)
class Columns:
    """Which column of the file feeds which canonical column.

    Attributes:
        kind: the record type to build.
        names: canonical column -> column or dotted path; only columns that the file has.
        check_hashes: whether the hash rule is checked where the file has hashes.
        values: canonical label column -> value in the file, as `raw_key` writes it -> canonical value.
    """

    kind: type[Row]
    names: Mapping[str, str]
    check_hashes: bool = True
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def chosen_style(self) -> bool:
        """Whether the pairs are written as chosen and rejected."""
        return "chosen" in self.names

    def row(self, record: Record) -> Row:
        """The canonical row of one record.

        Raises:
            BadValue: a value of the wrong type, a severity out of range or a wrong hash, named by column and place.
        """
        read = Reader(record, self.names, self.values)
        if self.kind is PromptRow:
            prompt = read.prompt("prompt")
            return PromptRow(prompt_id(prompt), prompt)
        row: Row
        if self.kind is PreferencePair:
            row = _chosen_pair(read) if self.chosen_style else _pair(read)
        else:
            row = _answer(read)
        if self.check_hashes:
            _check_hashes(read, row)
        return row

    def group(self, record: Record) -> str | None:
        """The stratum of a record; None where it has none.

        Raises:
            BadValue: a mapped column that holds an object or a list.
        """
        return Reader(record, self.names).group()

    def hashes(self, record: Record) -> int:
        """How many hashes of a record the hash rule can be checked against."""
        return len(_stored_hashes(Reader(record, self.names))) if self.check_hashes else 0


HASH_COLUMNS: dict[type[Row], dict[str, str]] = {
    PreferencePair: {"response_0_sha256": "response_0", "response_1_sha256": "response_1"},
    QuestionAnswer: {"sha256": "response"},
    PromptRow: {},
}
"""Columns of hashes -> the response each is of."""


def canonical_columns(kind: type[Row]) -> tuple[str, ...]:
    """The names a mapping may use for this kind of row."""
    own = tuple(f.name for f in fields(kind) if f.name != "id")
    return (*own, "chosen", "rejected") if kind is PreferencePair else own


def choose_columns(
    kind: type[Row],
    mapping: Mapping[str, Any] | None,
    sample: Sequence[Record],
    check_hashes: bool = True,
    values: Mapping[str, Any] | None = None,
) -> Columns:
    """Settle the mapping once, on the first records of a file.

    Label columns are optional: rows without them are unlabelled, and a task that needs the label says so later.

    Args:
        kind: of the rows to build.
        mapping: canonical column -> column of the file, several of which the first that is there counts, or None.
        sample: the first records.
        check_hashes: whether the hash rule is to be checked.
        values: canonical label column -> value in the file -> canonical value.

    Raises:
        UserError: an unknown canonical name, a mapped column the file has not, a needed column that is nowhere, or
            values of what is no label.
    """
    known = (*canonical_columns(kind), *HASH_COLUMNS[kind], GROUP)
    columns = list(dict.fromkeys(column for record in sample for column in record.values))
    there, place = ", ".join(columns) or "none", sample[0].place
    explicit, left_out = {}, set()
    for name, candidates in _mapping(mapping).items():
        if name not in known:
            continue  # of another kind of row
        found = [c for c in candidates if any(lookup(record.values, c) is not MISSING for record in sample)]
        if found:
            explicit[name] = found[0]
        elif len(candidates) == 1:
            near = difflib.get_close_matches(candidates[0], columns, n=1)
            mend = f"did you mean {near[0]}? " if near else ""
            mend = f"{mend}there are: {there}; set data.columns.{name}=COLUMN"
            raise UserError(f"no column '{candidates[0]}'", place, mend)
        elif not candidates:
            left_out.add(name)
    names = {name: name for name in known if name in columns and name not in left_out} | explicit
    needed: tuple[str, ...] = ("response",) if kind is QuestionAnswer else ()
    if kind is PreferencePair:
        names = _pair_columns(names, explicit)
        needed = ("chosen", "rejected") if {"chosen", "rejected"} & set(names) else ("response_0", "response_1")
    # whole conversations bring their prompt along
    talks = "chosen" in names and isinstance(lookup(sample[0].values, names["chosen"]), list)
    for name in (*(() if talks else ("prompt",)), *needed):
        if name not in names:
            raise _missing_column(name, kind, there, place)
    translated = {name: listed for name, listed in label_values(values).items() if name in canonical_columns(kind)}
    for name in translated:
        if name not in names:
            mend = f"there are: {there}; map one of them: data.columns.{name}=COLUMN"
            raise UserError(f"data.values.{name} is given and no column feeds '{name}'", place, mend)
    return Columns(kind, names, check_hashes, translated)


def label_values(values: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The mapping of `data.values` with raw values as `raw_key` writes them.

    Raises:
        UserError: a name of no label column, a canonical value that is none, or one raw value twice.
    """
    known = [name for name in _known_names() if name not in (*_TEXTS, GROUP) and "sha256" not in name]
    out: dict[str, dict[str, Any]] = {}
    for name, listed in (values or {}).items():
        where = f"data.values.{name}"
        if str(name) not in known:
            near = difflib.get_close_matches(str(name), known, n=1) or [", ".join(known)]
            raise UserError(f"there is no label column '{name}'", where, f"did you mean {near[0]}?")
        out[str(name)] = {}
        for raw, value in listed.items():
            key = raw_key(raw) or ""
            if key in out[str(name)]:
                raise UserError(f"'{raw}' is listed twice", where, "values that differ in case only are the same")
            read, needed = _LABEL_READERS[str(name).rpartition("_")[2]]
            try:
                read(Reader(Record({name: value}, where), {name: name}), name)
            except BadValue:
                raise UserError(f"'{raw}' stands for {value!r}, {needed} is needed", where, "mend the list") from None
            out[str(name)][key] = value
    return out


_TEXTS = ("prompt", "response", "response_0", "response_1", "chosen", "rejected")
_LABEL_READERS: dict[str, tuple[Callable[[Reader, str], Any], str]] = {
    # by the last word of the label column
    "safe": (Reader.flag, "true or false"),
    "id": (Reader.side, "0, 1 or -1 (not labelled)"),
    "level": (Reader.severity, "a severity from 0 to 3"),
    "category": (Reader.categories, "a list of names"),
}


def holds(sample: Sequence[Record], mapping: Mapping[str, Any] | None, *names: str) -> bool:
    """Whether the records have a column for each of these canonical names, mapped or under its own name."""
    wanted = _mapping(mapping)
    return all(
        any(lookup(record.values, column) is not MISSING for record in sample for column in wanted.get(name, (name,)))
        for name in names
    )


def _mapping(mapping: Mapping[str, Any] | None) -> dict[str, tuple[str, ...]]:
    """Canonical name -> columns that may feed it, none for a column to leave out.

    Raises:
        UserError: a name that no kind of row has.
    """
    known = _known_names()
    out = {}
    for name, given in (mapping or {}).items():
        if str(name) not in known:
            near = difflib.get_close_matches(str(name), known, n=1) or [", ".join(known)]
            raise UserError(f"there is no canonical column '{name}'", "data.columns", f"did you mean {near[0]}?")
        several = isinstance(given, Sequence) and not isinstance(given, str)
        out[str(name)] = () if given is None else tuple(map(str, given)) if several else (str(given),)
    return out


def _known_names() -> list[str]:
    """Canonical columns of all kinds of rows."""
    own = (name for kind in HASH_COLUMNS for name in (*canonical_columns(kind), *HASH_COLUMNS[kind]))
    return [*dict.fromkeys(own), GROUP]


def _pair_columns(found: dict[str, str], explicit: dict[str, str]) -> dict[str, str]:
    """Keep one of the two ways to write a pair; an explicit mapping decides, then PKU-SafeRLHF's own names."""
    sides = ("response_0", "response_1")
    own_way = any(name in explicit for name in sides) or (
        all(name in found for name in sides) and not any(name in explicit for name in ("chosen", "rejected"))
    )
    chosen_way = not own_way and any(name in found for name in ("chosen", "rejected"))
    # labels by response index mean nothing when the sides come from chosen and rejected
    keep = ("prompt", "chosen", "rejected", GROUP) if chosen_way else tuple(set(found) - {"chosen", "rejected"})
    return {name: column for name, column in found.items() if name in keep}


def _missing_column(name: str, kind: type[Row], there: str, place: str) -> UserError:
    mend = f"there are: {there}; map one of them: data.columns.{name}=COLUMN"
    if kind is PreferencePair and name.startswith("response_"):
        mend += " (or data.columns.chosen=COLUMN data.columns.rejected=COLUMN)"
    return UserError(f"column '{name}' is missing", place, mend)


def _pair(read: Reader) -> PreferencePair:
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


def _chosen_pair(read: Reader) -> PreferencePair:
    """Chosen is written as response 0; the sides are shuffled later, with those of every other source."""
    prompts = [prefix for name in ("chosen", "rejected") if (prefix := _conversation_prompt(read, name))]
    if len(set(prompts)) > 1:
        raise read.error("non_text", "chosen and rejected are conversations that differ before their last turn")
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


def _conversation_prompt(read: Reader, name: str) -> Prompt | None:
    """The turns before the response where the column holds a whole conversation."""
    value = read.value(name)
    if not isinstance(value, list) or len(value) < 2:
        return None
    return read.ends_with_user(read.turns(name, value)[:-1], name)


def _answer(read: Reader) -> QuestionAnswer:
    prompt, response = read.prompt("prompt"), read.text("response")
    return QuestionAnswer(
        id=answer_id(prompt, response),
        prompt=prompt,
        response=response,
        is_safe=read.flag("is_safe"),
        harm_category=read.categories("harm_category"),
        severity_level=read.severity("severity_level"),
    )


def _stored_hashes(read: Reader) -> dict[str, str]:
    """Response -> its stored hash, where there is one."""
    columns = HASH_COLUMNS[PreferencePair] | HASH_COLUMNS[QuestionAnswer]
    found = {response: read.value(name) for name, response in columns.items() if name in read.names}
    return {response: value.strip().lower() for response, value in found.items() if isinstance(value, str) and value}


def _check_hashes(read: Reader, row: PreferencePair | QuestionAnswer) -> None:
    """The hash rule. Rows without text and pairs of one text are left to the checks that look for just these."""
    texts = [row.response_0, row.response_1] if isinstance(row, PreferencePair) else [row.response]
    stripped = [text.strip() for text in (row.prompt[0].content, *texts)]
    if len(row.prompt) != 1 or not all(stripped) or stripped[1:] == [stripped[1]] * 2:
        return
    for response, stored in _stored_hashes(read).items():
        text = getattr(row, response, None)
        if text is None or hashlib.sha256((row.prompt[0].content + text).encode()).hexdigest() == stored:
            continue
        what = f"the SHA-256 of prompt and {response} is not the stored one"
        mend = "mend or remove the row, or set data.check_hashes=false"
        raise BadValue("wrong_hash", what, read.record.place, mend, row=row)


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


__all__ = [
    "HASH_COLUMNS",
    "BadValue",
    "Columns",
    "answer_id",
    "canonical_columns",
    "choose_columns",
    "holds",
    "label_values",
    "pair_id",
    "prompt_id",
]
