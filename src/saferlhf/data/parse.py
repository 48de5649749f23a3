"""Parse: typed values out of one raw record; every refusal is a `BadValue` that names the column and the place.

Labels come as JSON, CSV and Parquet write them: `true`, `1` and `"True"` are one flag, -1 and nothing are no label,
harm categories are an object of flags or a list of names, also where CSV holds these as text. Labels in words of their
own (`hateful`, `2_full_refusal`) are translated by a list of all of them, `data.values`; one that is not in it is at
fault, since a misspelt label must not pass for its opposite.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saferlhf.data.files import Record
from saferlhf.data.rows import Prompt, Row, Turn
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
MISSING = object()
"""What `lookup` gives for a column that is not there."""


class BadValue(UserError):
    """A record that cannot become a row as it stands; what is done with it is for `data.policy.<kind>` to say.

    Args:
        kind: `non_text`, `bad_label`, `severity_range`, `unknown_category`, `wrong_hash` or `unreadable`.
        what: what is wrong, by column; never a text of the row.
        place: `file:line` or `file, row n`.
        mend: how to make the record right.
        row: what the record would be with its fault left out (an unknown category dropped, a hash not believed), for
            kinds that may be kept; None where no such row exists.
        before: good rows of its split that stand before it, over all files: tells its order among them.
    """

    def __init__(
        self,
        kind: str,
        what: str,
        place: str,
        mend: str = "mend or remove the row",
        *,
        row: Row | None = None,
        before: int | None = None,
    ) -> None:
        super().__init__(what, place, mend)
        self.kind, self.row, self.before = kind, row, before

    @property
    def place(self) -> str:
        """Where the record stands."""
        return self.where


JOIN = " + "
"""Between columns whose texts make one, as Alpaca's instruction and input."""

GROUP = "group"
"""The column of a row's stratum (language, topic, function, answering model). No kind of row has it: it stands beside
the rows, by their ids."""


def lookup(values: Any, column: str) -> Any:
    """The value of a column, or of a dotted path when no column has the whole name.

    `a + b` joins texts by a line break; the first column must be there, others may be missing or empty.
    """
    if column in values:
        return values[column]
    if JOIN in column:
        return _joined([lookup(values, part.strip()) for part in column.split(JOIN)])
    for part in column.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return MISSING
        values = values[part]
    return values


def _joined(parts: Sequence[Any]) -> Any:
    present = [part for part in parts if part is not MISSING and part is not None and part != ""]
    if parts[0] is MISSING or not present:
        return parts[0]
    # what is no text is handed on as it is: the reader says what is wrong with it
    return next((part for part in present if not isinstance(part, str)), None) or "\n".join(present)


def raw_key(value: Any) -> str | None:
    """What a raw label is listed under in `data.values`; None for what is no single value.

    However a file writes it: `1`, `1.0` and `" 1"` are alike, so are `true` and `"True"`, letters of any case; nothing
    is the empty text.
    """
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip().casefold() if isinstance(value, str | int | float) else None


class Reader:
    """Typed access to one record by canonical names; every refusal is a `BadValue` with the column and the place.

    Args:
        names: canonical column -> column of the file.
        values: canonical label column -> `raw_key` of a value in the file -> canonical value.
    """

    def __init__(
        self, record: Record, names: Mapping[str, str], values: Mapping[str, Mapping[str, Any]] | None = None
    ) -> None:
        self.record, self.names, self.values = record, names, values or {}

    def value(self, name: str) -> Any:
        """The raw value; None where the mapping or the row has no such column."""
        value = lookup(self.record.values, self.names[name]) if name in self.names else MISSING
        return None if value is MISSING else value

    def error(self, kind: str, what: str, mend: str = "mend or remove the row") -> BadValue:
        """What to raise about this record."""
        return BadValue(kind, what, self.record.place, mend)

    def text(self, name: str) -> str:
        """A response: text, or turns of which the last is the assistant's."""
        value = self.value(name)
        if isinstance(value, list | dict):
            turns = self.turns(name, value)
            if not turns or turns[-1].role != "assistant":
                raise self.error("non_text", f"column '{self.names[name]}' ends in no assistant turn")
            return turns[-1].content
        if not isinstance(value, str):
            raise self.error("non_text", f"column '{self.names[name]}' holds {_type_name(value)}, text is needed")
        return self.encodable(name, value)

    def encodable(self, name: str, text: str) -> str:
        """The text, if it can be written as UTF-8: it will be hashed and tokenised."""
        try:
            text.encode()
        except UnicodeEncodeError:  # half a character, as JSON's escapes can write it
            raise self.error("non_text", f"column '{self.names[name]}' holds text that is no Unicode") from None
        return text

    def turns(self, name: str, value: Any) -> Prompt:
        """Chat turns under any of the usual names of roles."""
        listed = [value] if isinstance(value, dict) else value
        out = []
        for turn in listed:
            role = turn.get("role") if isinstance(turn, dict) else None
            content = turn.get("content", turn.get("text")) if isinstance(turn, dict) else None
            if not isinstance(role, str) or not isinstance(content, str):
                what = f"column '{self.names[name]}': a chat turn needs text under role and content"
                raise self.error("non_text", what)
            if role.lower() not in _ROLES:
                what = f"column '{self.names[name]}': unknown role '{role[:40]}'"
                raise self.error("non_text", what, "use user, assistant or system")
            out.append(Turn(_ROLES[role.lower()], self.encodable(name, content)))
        return tuple(out)

    def prompt(self, name: str) -> Prompt:
        """A prompt: text or turns of which the last is the user's."""
        value = self.value(name)
        if isinstance(value, str):
            return (Turn("user", self.encodable(name, value)),)
        if not isinstance(value, list | dict):
            what = f"column '{self.names[name]}' holds {_type_name(value)}, text or a list of chat turns is needed"
            raise self.error("non_text", what)
        return self.ends_with_user(self.turns(name, value), name)

    def ends_with_user(self, turns: Prompt, name: str) -> Prompt:
        """The turns, if they can be a prompt."""
        if not turns or turns[-1].role != "user":
            raise self.error("non_text", f"column '{self.names[name]}': a prompt ends with a user turn")
        return turns

    def optional(self, name: str, parse: Callable[[Any], Any], needed: str) -> Any:
        """A label, or None where there is none."""
        value = self.translated(name, self.value(name))
        if value is None or value == "" or (isinstance(value, float) and value != value):
            return None
        parsed = parse(value)
        if parsed is None:
            what = f"column '{self.names[name]}' holds {_type_name(value)}, {needed} is needed"
            raise self.error("bad_label", what)
        return parsed

    def translated(self, name: str, value: Any) -> Any:
        """The canonical value that `data.values` lists for a raw one; the raw one where nothing is listed."""
        listed, key = self.values.get(name), raw_key(value)
        if listed is None or (key == "" and key not in listed):  # nothing is no label, unless told otherwise
            return value
        if key is None or key not in listed:
            what = f"column '{self.names[name]}' holds a value that data.values.{name} does not list"
            raise self.error("bad_label", what, f"listed are {', '.join(listed)}; add it, or mend the row")
        return listed[key]

    def group(self) -> str | None:
        """The stratum that numbers are broken down by; the columns of `a + b` are joined by a slash."""
        column = self.names.get(GROUP)
        if column is None:
            return None
        there = column in self.record.values
        parts = [lookup(self.record.values, part.strip()) for part in ([column] if there else column.split(JOIN))]
        found = [part for part in parts if part is not MISSING and raw_key(part) != ""]
        if any(raw_key(part) is None for part in found):
            if column == GROUP:  # nobody asked for it: an object of the file's own that happens to be called so
                return None
            what = f"column '{column}' holds no single value, a group needs text or a number"
            raise self.error("bad_label", what, f"set data.columns.{GROUP} to another column, or to null")
        return "/".join(str(part).strip() for part in found) or None

    def flag(self, name: str) -> bool | None:
        """True or false."""
        return self.optional(name, as_bool, "true or false")  # type: ignore[no-any-return]

    def side(self, name: str) -> int | None:
        """0 or 1; -1 is no label."""
        value = self.optional(name, _as_int, "0, 1 or -1 (not labelled)")
        if value is not None and value not in (-1, 0, 1):
            what = f"column '{self.names[name]}' holds {value}, 0, 1 or -1 (not labelled) is needed"
            raise self.error("bad_label", what)
        return None if value == -1 else value

    def severity(self, name: str) -> int | None:
        """0 to 3."""
        value = self.optional(name, _as_int, "a severity from 0 to 3")
        if value is not None and not 0 <= value <= 3:
            what = f"column '{self.names[name]}' holds {value}, a severity from 0 to 3 is needed"
            raise self.error("severity_range", what)
        return value  # type: ignore[no-any-return]

    def categories(self, name: str) -> frozenset[str] | None:
        """Names of the harm categories that apply."""
        return self.optional(name, _as_categories, "an object of true/false or a list of names")  # type: ignore[no-any-return]


def as_bool(value: Any) -> bool | None:
    """A flag as JSON, CSV or Parquet write it; None for anything else."""
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
    if isinstance(value, str):  # CSV, and JSON that holds a dict as Python writes it
        value = _literal(value)
    if isinstance(value, Mapping):
        flags = {str(name): as_bool(flag) for name, flag in value.items()}
        return None if None in flags.values() else frozenset(name for name, flag in flags.items() if flag)
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        return frozenset(value)
    return None


def _literal(text: str) -> Any:
    """What a text holds as JSON or as a Python literal; None where it is neither."""
    for parse in (json.loads, ast.literal_eval):
        try:
            return parse(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return None


def _type_name(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
