"""Faults: what can be wrong with a row that reads well, one function per kind.

Each takes a row and says which part or rule is at fault, or None. Labels that are missing break no rule.

The rules of labels are those of the public data (PKU-SafeRLHF data card): safe <=> severity 0 <=> no harm category,
and the safer response of a pair with one safe response is that one. The current release breaks them 8 times in 147,814
training responses, older ones more often.
"""

from __future__ import annotations

from collections.abc import Callable

from saferlhf.data.rows import PreferencePair, QuestionAnswer, Row


def responses_of(row: Row) -> tuple[str, ...]:
    """The responses of a row: two, one or none."""
    if isinstance(row, PreferencePair):
        return (row.response_0, row.response_1)
    return (row.response,) if isinstance(row, QuestionAnswer) else ()


def empty_fault(row: Row) -> str | None:
    """Which part has no text."""
    if not row.prompt or not row.prompt[-1].content.strip():
        return "prompt"
    return None if all(response.strip() for response in responses_of(row)) else "response"


def identical_fault(row: Row) -> str | None:
    """Both responses of a pair are the same but for white space around them."""
    same = isinstance(row, PreferencePair) and row.response_0.strip() == row.response_1.strip()
    return "text" if same else None


def contradictory_fault(row: Row) -> str | None:
    """Which rule the labels break; labels that are missing break none."""
    if isinstance(row, PreferencePair):
        first = (row.is_response_0_safe, row.response_0_severity_level, row.response_0_harm_category)
        second = (row.is_response_1_safe, row.response_1_severity_level, row.response_1_harm_category)
        safe = (row.is_response_0_safe, row.is_response_1_safe)
        one_safe = None not in safe and safe[0] != safe[1]
        if one_safe and row.safer_response_id is not None and not safe[row.safer_response_id]:
            return "safer_is_unsafe"
        return _label_fault(*first) or _label_fault(*second)
    if isinstance(row, QuestionAnswer):
        return _label_fault(row.is_safe, row.severity_level, row.harm_category)
    return None


def _label_fault(safe: bool | None, severity: int | None, categories: frozenset[str] | None) -> str | None:
    if safe is None:
        both = severity is not None and categories is not None
        return "severity_against_category" if both and bool(severity) != bool(categories) else None
    if safe:
        return "safe_with_harm" if severity or categories else None
    without = severity == 0 or (categories is not None and not categories)
    return "unsafe_without_harm" if without else None


FAULTS: tuple[tuple[str, Callable[[Row], str | None]], ...] = (
    ("empty", empty_fault),
    ("identical", identical_fault),
    ("contradictory", contradictory_fault),
)
"""Kind -> its test, in the order in which a row is tried."""
