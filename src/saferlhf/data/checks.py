"""Checks: bad rows are found, counted and handled before training, never by a crash in the middle of it.

Kinds, in the order in which a row is tried (a row counts under the first kind that fits):

- `unlabelled`     a label that the task needs is missing; always dropped.
- `empty`          a prompt or a response without a letter.
- `identical`      both responses of a pair are the same text.
- `contradictory`  labels that cannot all be true. The public data follows: safe <=> severity 0 <=> no harm category,
                   and the safer response is never the unsafe one of a pair with one safe response. Detail counts:
                   `safer_is_unsafe`, `safe_with_harm`, `unsafe_without_harm`.
- `duplicate`      the same prompt with the same responses again (in either order); the first one stays.
- `overlap`        a training prompt that validation or test has too; a validation prompt that test has.

Policies: `drop`, `keep`, `error` (stop at the first such row, named by id and place), and for `contradictory` also
`flip`: `safer_response_id` is turned to the safe response; rows that contradict themselves in another way are then
dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from saferlhf.config.schema import DataPolicyConfig
from saferlhf.data.report import DataReport
from saferlhf.data.rows import PreferencePair, QuestionAnswer, Row
from saferlhf.data.splits import keyed_fraction, prompt_key, prompt_keys
from saferlhf.errors import UserError

ALLOWED: dict[str, tuple[str, ...]] = {
    "empty": ("drop", "keep", "error"),
    "identical": ("drop", "keep", "error"),
    "contradictory": ("drop", "flip", "keep", "error"),
    "duplicate": ("drop", "keep", "error"),
    "overlap": ("drop", "keep", "error"),
    "overlong": ("keep", "drop", "error"),
}
"""What each kind can be told to do."""


def check_policy(policy: DataPolicyConfig) -> None:
    """Refuse a policy that its kind cannot follow, before anything is read.

    Raises:
        UserError: names the key and what it allows.
    """
    for kind, allowed in ALLOWED.items():
        chosen = getattr(policy, kind)
        if chosen not in allowed:
            what = f"'{chosen}' is no policy for {kind} rows"
            raise UserError(what, f"data.policy.{kind}", f"use one of {', '.join(allowed)}")


@dataclass
class RowChecker:
    """Applies the policies to the rows of one data set and counts into its report.

    Attributes:
        places: row id -> place in a file, for the `error` policy.
    """

    policy: DataPolicyConfig
    report: DataReport
    places: Mapping[str, str]

    def rows(self, rows: Iterable[Row], split: str, needs: Sequence[str] = ()) -> list[Row]:
        """The rows that pass; kept duplicates get ids of their own, so that ids are unique within a split."""
        kept: list[Row] = []
        seen: dict[tuple[object, ...], int] = {}
        for row in rows:
            if any(getattr(row, name) is None for name in needs):
                self._count("unlabelled", split, dropped=1)
                continue
            checked: Row | None = row
            for kind, fault_of in _FAULTS:
                fault = fault_of(row)
                if fault is not None:
                    checked = self._apply(kind, fault, row, split)
                    break
            if checked is None:
                continue
            key = _duplicate_key(checked)
            copies = seen.get(key, 0)
            seen[key] = copies + 1
            if copies:
                if self._apply("duplicate", "", checked, split) is None:
                    continue
                checked = replace(checked, id=f"{checked.id}-{copies}")
            kept.append(checked)
        return kept

    def overlap(self, rows: Sequence[Row], split: str, *held_out: Iterable[Row]) -> list[Row]:
        """The rows whose prompt none of the held-out rows has."""
        taken = prompt_keys(*held_out)
        if not taken:
            return list(rows)
        kept = []
        for row in rows:
            if prompt_key(row.prompt) in taken and self._apply("overlap", "", row, split) is None:
                continue
            kept.append(row)
        return kept

    def _apply(self, kind: str, fault: str, row: Row, split: str) -> Row | None:
        """The row as the policy leaves it; None when dropped."""
        policy = getattr(self.policy, kind)
        if policy == "error":
            place = self.places.get(row.id) or f"the {split} rows"
            detail = f" ({fault.replace('_', ' ')})" if fault else ""
            mend = f"mend the row or set data.policy.{kind}={ALLOWED[kind][0]}"
            raise UserError(f"{kind} row {row.id}{detail}", place, mend)
        if policy == "keep":
            self._count(kind, split, fault)
            return row
        if policy == "flip" and fault == "safer_is_unsafe" and isinstance(row, PreferencePair):
            self._count(kind, split, fault, flipped=1)
            return replace(row, safer_response_id=0 if row.is_response_0_safe else 1)
        self._count(kind, split, fault, dropped=1)
        return None

    def _count(self, kind: str, split: str, fault: str = "", dropped: int = 0, flipped: int = 0) -> None:
        finding = self.report.finding(kind, split)
        finding.found += 1
        finding.dropped += dropped
        finding.flipped += flipped
        if fault:
            finding.detail[fault] = finding.detail.get(fault, 0) + 1


# ------------------------------------------------------------------------------------------------ faults
def _responses(row: Row) -> tuple[str, ...]:
    if isinstance(row, PreferencePair):
        return (row.response_0, row.response_1)
    return (row.response,) if isinstance(row, QuestionAnswer) else ()


def empty_fault(row: Row) -> str | None:
    """Which part has no text."""
    if not row.prompt or not row.prompt[-1].content.strip():
        return "prompt"
    return None if all(response.strip() for response in _responses(row)) else "response"


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
        return None
    if safe:
        return "safe_with_harm" if severity or categories else None
    without = severity == 0 or (categories is not None and not categories)
    return "unsafe_without_harm" if without else None


_FAULTS: tuple[tuple[str, Callable[[Row], str | None]], ...] = (
    ("empty", empty_fault),
    ("identical", identical_fault),
    ("contradictory", contradictory_fault),
)


def _duplicate_key(row: Row) -> tuple[object, ...]:
    return (row.prompt, *sorted(response.strip() for response in _responses(row)))


# ------------------------------------------------------------------------------------------------ sides
def shuffle_sides(rows: Iterable[Row], seed: int) -> list[Row]:
    """Swap the two responses of half of the pairs, chosen by a hash of seed and row id, labels and all."""
    return [
        swap_sides(row) if isinstance(row, PreferencePair) and keyed_fraction(seed, "sides", row.id) < 0.5 else row
        for row in rows
    ]


def swap_sides(row: PreferencePair) -> PreferencePair:
    """The same pair with its responses in the other order; the id stays."""

    def other(side: int | None) -> int | None:
        return None if side is None else 1 - side

    return PreferencePair(
        id=row.id,
        prompt=row.prompt,
        response_0=row.response_1,
        response_1=row.response_0,
        is_response_0_safe=row.is_response_1_safe,
        is_response_1_safe=row.is_response_0_safe,
        response_0_harm_category=row.response_1_harm_category,
        response_1_harm_category=row.response_0_harm_category,
        response_0_severity_level=row.response_1_severity_level,
        response_1_severity_level=row.response_0_severity_level,
        better_response_id=other(row.better_response_id),
        safer_response_id=other(row.safer_response_id),
        single_response_id=other(row.single_response_id),
    )
