r"""Layouts: ways to write a record that no column mapping can read, turned into plain columns first.

- `columns`      nothing to do: one value, one column.
- `dialogue`     hh-rlhf: `chosen` and `rejected` are whole dialogues, `\n\nHuman: ...\n\nAssistant: ...` in one text,
                 alike up to the last Assistant turn. They become lists of turns.
- `safe_unsafe`  `{prompt, response: [safe, unsafe]}`: pairs with one safe response, which stands first.
- `guard`        the suites of guard models: `input` holds `Human user:\n...\n\nAI assistant:\n...`, `output` ends
                 in `Response: harmful` or `Response: unharmful`, or is that word alone.

Those of single evaluation sets, in `layouts_sets.py`: `openai_moderation`, `do_not_answer`, `xsafety`.

`auto` recognises `dialogue` and `guard` by their marks; the others have none and must be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from saferlhf.data.columns import BadValue
from saferlhf.data.files import Record
from saferlhf.data.rows import Row
from saferlhf.data.sources.layouts_sets import Made, do_not_answer, openai_moderation, xsafety

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_GUARD_INPUT = re.compile(r"\s*Human user:\n(.*?)(?:\n\nAI assistant:\n(.*))?\Z", re.DOTALL)
_GUARD_OUTPUT = re.compile(r"(?:Response:|\A)\s*(harmful|unharmful)\s*\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Layout:
    """One way to write a record.

    Attributes:
        convert: the columns of a record as they would stand in a plain file, or of the several records that it holds,
            among them what is at fault; the kind of row that is wanted may decide. Raises BadValue.
        fits: whether a record bears its marks.
        header: whether the first line of its CSV files names the columns.
    """

    convert: Callable[[Record, type[Row]], dict[str, Any] | Made]
    fits: Callable[[Record], bool] = lambda record: False
    header: bool = True

    def records(self, record: Record, kind: type[Row]) -> list[Record | BadValue]:
        """The record with plain columns, or the several records that are in it.

        Args:
            record: one that could be read.
            kind: of row that is wanted.

        Raises:
            BadValue: the record is not written like this.
        """
        made = self.convert(record, kind)
        several = [made] if isinstance(made, dict) else made
        return [one if isinstance(one, BadValue) else Record(one, record.place) for one in several]


def choose_layout(name: str, sample: Sequence[Record]) -> Layout:
    """The layout of this name; for `auto` the one that most of the sample bears the marks of, `columns` if none."""
    if name != "auto":
        return LAYOUTS[name]
    for candidate in ("dialogue", "guard"):
        if 2 * sum(LAYOUTS[candidate].fits(record) for record in sample) > len(sample):
            return LAYOUTS[candidate]
    return LAYOUTS["columns"]


def has_header(name: str) -> bool:
    """Whether CSV files in this layout begin with the names of their columns."""
    return name == "auto" or LAYOUTS[name].header


# ------------------------------------------------------------------------------------------------ dialogue
def dialogue_turns(text: str) -> list[dict[str, str]]:
    """The turns of a dialogue in one text; empty when it does not begin with one.

    Turns of one speaker in a row are joined: a few dialogues of hh-rlhf have two Assistant turns on one side only.
    """
    parts = _TURN.split(text.strip())
    if parts[0]:
        return []
    turns: list[dict[str, str]] = []
    for speaker, content in zip(parts[1::2], parts[2::2], strict=True):
        if turns and turns[-1]["role"] == speaker:
            turns[-1]["content"] = f"{turns[-1]['content']}\n\n{content.strip()}".strip()
        else:
            turns.append({"role": speaker, "content": content.strip()})
    return turns


def _is_dialogue(record: Record) -> bool:
    values = [record.values.get(name) for name in ("chosen", "rejected")]
    return all(isinstance(value, str) and _TURN.match(value.lstrip()) for value in values)


def _dialogue(record: Record, kind: type[Row]) -> dict[str, Any]:
    values = dict(record.values)
    for name in ("chosen", "rejected"):
        value = values.get(name)
        turns = dialogue_turns(value) if isinstance(value, str) else []
        if len(turns) < 2 or turns[-1]["role"] != "Assistant":
            raise BadValue("non_text", f"column '{name}' holds no dialogue that ends with the Assistant", record.place)
        values[name] = turns
    return values


# ------------------------------------------------------------------------------------------------ safe_unsafe
def _safe_unsafe(record: Record, kind: type[Row]) -> dict[str, Any]:
    values = dict(record.values)
    sides = values.pop("response", None)
    if isinstance(sides, str):  # demonstrations beside the pairs
        return record.values
    if not isinstance(sides, list) or len(sides) != 2:
        raise BadValue("non_text", "column 'response' holds no list of two responses", record.place)
    labels = {"is_response_0_safe": True, "is_response_1_safe": False, "safer_response_id": 0}
    return {**values, "response_0": sides[0], "response_1": sides[1], **labels}


# ------------------------------------------------------------------------------------------------ guard
def _is_guard(record: Record) -> bool:
    given, output = record.values.get("input"), record.values.get("output")
    return isinstance(given, str) and isinstance(output, str) and given.lstrip().startswith("Human user:\n")


def _guard(record: Record, kind: type[Row]) -> dict[str, Any]:
    given, output = record.values.get("input"), record.values.get("output")
    match = _GUARD_INPUT.match(given) if isinstance(given, str) else None
    if match is None:
        raise BadValue("non_text", "column 'input' holds no 'Human user:' turn", record.place)
    values = {**record.values, "prompt": match[1].strip()}
    if match[2] is not None:
        values["response"] = match[2].strip()
        label = _GUARD_OUTPUT.search(output) if isinstance(output, str) else None
        if label is None:
            raise BadValue("bad_label", "column 'output' ends in no 'Response: harmful|unharmful'", record.place)
        values["is_safe"] = label[1].lower() == "unharmful"
    return values


LAYOUTS: dict[str, Layout] = {
    "columns": Layout(lambda record, kind: record.values),
    "dialogue": Layout(_dialogue, _is_dialogue),
    "safe_unsafe": Layout(_safe_unsafe),
    "guard": Layout(_guard, _is_guard),
    "openai_moderation": Layout(openai_moderation),
    "do_not_answer": Layout(do_not_answer),
    "xsafety": Layout(xsafety, header=False),
}
