"""Canonical rows: the three typed records every source maps into, in PKU-SafeRLHF's own column names.

Nothing downstream knows where a row came from. Sign convention: label positive = unsafe. A label that a source does not
have is None, never a made-up value. Row ids depend on content only, so they are equal wherever the file lies.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

PKU_CATEGORIES: tuple[str, ...] = (
    "Endangering National Security",
    "Insulting Behavior",
    "Discriminatory Behavior",
    "Endangering Public Health",
    "Copyright Issues",
    "Violence",
    "Drugs",
    "Privacy Violation",
    "Economic Crime",
    "Mental Manipulation",
    "Human Trafficking",
    "Physical Harm",
    "Sexual Content",
    "Cybercrime",
    "Disrupting Public Order",
    "Environmental Damage",
    "Psychological Harm",
    "White-Collar Crime",
    "Animal Abuse",
)
"""The 19 harm categories of PKU-SafeRLHF, in data set order."""


class Turn(NamedTuple):
    """One turn of a conversation; `role` is user, assistant or system."""

    role: str
    content: str


Prompt = tuple[Turn, ...]
"""The conversation before the response; ends with a user turn."""


def as_prompt(value: str | Sequence[Turn]) -> Prompt:
    """A string is one user turn; turns are kept."""
    if isinstance(value, str):
        return (Turn("user", value),)
    return tuple(Turn(*turn) for turn in value)


def prompt_text(prompt: Prompt) -> str:
    """The words of a prompt, for keys, lengths and reports: turns joined by newlines."""
    return "\n".join(turn.content for turn in prompt)


def content_id(*parts: str) -> str:
    """16 hex digits of SHA-256 over the parts, separated by a byte that no text contains."""
    return hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two responses to one prompt with their judgements."""

    id: str
    prompt: Prompt
    response_0: str
    response_1: str
    is_response_0_safe: bool | None = None
    is_response_1_safe: bool | None = None
    response_0_harm_category: frozenset[str] | None = None
    response_1_harm_category: frozenset[str] | None = None
    response_0_severity_level: int | None = None
    response_1_severity_level: int | None = None
    better_response_id: int | None = None  # more helpful
    safer_response_id: int | None = None  # more harmless
    single_response_id: int | None = None  # the one mixed preference


@dataclass(frozen=True, slots=True)
class QuestionAnswer:
    """One prompt and one response; a demonstration when unlabelled."""

    id: str
    prompt: Prompt
    response: str
    is_safe: bool | None = None
    harm_category: frozenset[str] | None = None
    severity_level: int | None = None


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt without a response."""

    id: str
    prompt: Prompt


Row = PreferencePair | QuestionAnswer | PromptRow

_OF_BOTH = {
    "is_safe": ("is_response_0_safe", "is_response_1_safe"),
    "harm_category": ("response_0_harm_category", "response_1_harm_category"),
    "severity_level": ("response_0_severity_level", "response_1_severity_level"),
}


CATEGORY_COLUMNS: dict[type[Row], tuple[str, ...]] = {
    PreferencePair: ("response_0_harm_category", "response_1_harm_category"),
    QuestionAnswer: ("harm_category",),
    PromptRow: (),
}
"""Kind of row -> its fields with harm categories."""


def categories_of(row: Row) -> list[str]:
    """The harm categories of all responses of a row."""
    return [name for column in CATEGORY_COLUMNS[type(row)] for name in getattr(row, column) or ()]


def without_categories(row: Row) -> Row:
    """The same row, its harm categories not labelled."""
    nothing: dict[str, Any] = dict.fromkeys(CATEGORY_COLUMNS[type(row)])
    return replace(row, **nothing)


def label_columns(kind: type[Row], needs: Sequence[str]) -> tuple[str, ...]:
    """The label columns of a row of this kind that say what `needs` asks for: a pair labels both of its answers."""
    if kind is not PreferencePair:
        return tuple(needs)
    return tuple(column for name in needs for column in _OF_BOTH.get(name, (name,)))
