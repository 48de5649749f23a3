"""Checks: bad rows are found, counted and handled before training, never by a crash in the middle of it.

Kinds, in the order in which a record is tried (it counts under the first kind that fits). Records that cannot become a
row, found while reading:

- `unreadable`        the line is no JSON or no UTF-8.
- `non_text`          a prompt or a response is no text.
- `bad_label`         a label of the wrong type.
- `severity_range`    a severity outside 0..3.
- `unknown_category`  a harm category that the taxonomy does not have; `keep` leaves the unknown names out.
- `wrong_hash`        prompt and response do not give the SHA-256 that stands beside them.

Rows that read well:

- `unlabelled`     a label that the task needs is missing.
- `empty`          a prompt or a response without a letter.
- `identical`      both responses of a pair are the same text.
- `contradictory`  labels that cannot all be true, see `data/faults.py`; each rule is counted by itself too.
- `duplicate`      the same prompt with the same responses again (in either order); the first one stays. `other_labels`
                   counts those that judge it differently.
- `overlap`        a training prompt that validation or test has too; a validation prompt that test has.
- `near_overlap`   a training prompt that is nearly one of validation or test, see `data/splits.py`.
- `overlong`       more tokens than the backbone takes; found and handled by `data/encode.py`.

Policies: `drop`, `keep`, `error`, for `contradictory` also `flip` (`safer_response_id` is turned to the safe response;
rows that contradict themselves in another way are then dropped), for `near_overlap` also `off`. `error` reads on to the
end of all files, then names the first bad row of all kinds: training files before validation before test files, each in
its own order. Only `near_overlap` and `overlong` come later, since they need the splits and the tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from saferlhf.config.schema import DataPolicyConfig
from saferlhf.data.columns import BadValue
from saferlhf.data.faults import FAULTS, responses_of
from saferlhf.data.report import MAX_PLACES, SPLITS, DataReport, short_place
from saferlhf.data.rows import PreferencePair, Row, label_columns
from saferlhf.data.splits import keyed_fraction, near_prompts, prompt_key
from saferlhf.errors import UserError

ALLOWED: dict[str, tuple[str, ...]] = {
    "unreadable": ("error", "drop"),
    "non_text": ("drop", "error"),
    "bad_label": ("drop", "error"),
    "severity_range": ("drop", "error"),
    "unknown_category": ("drop", "keep", "error"),
    "wrong_hash": ("drop", "keep", "error"),
    "unlabelled": ("drop", "error"),
    "empty": ("drop", "keep", "error"),
    "identical": ("drop", "keep", "error"),
    "contradictory": ("drop", "flip", "keep", "error"),
    "duplicate": ("drop", "keep", "error"),
    "overlap": ("drop", "keep", "error"),
    "near_overlap": ("keep", "drop", "error", "off"),
    "overlong": ("keep", "drop", "error"),
}
"""What each kind can be told to do; the first is the default."""


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


Order = tuple[int, int, int]
"""Where a record stands among all: split, good rows of the split before it, 1 for a row (0 for what is none)."""


@dataclass
class RowChecker:
    """Applies the policies to the rows of one data set and counts into its report.

    Rows under an `error` policy are noted and left out; `raise_first` ends the reading with the first of them.

    Attributes:
        places: row id -> place in a file, for messages.
        groups: row id -> stratum of the rows that were kept.
    """

    policy: DataPolicyConfig
    report: DataReport
    places: Mapping[str, str]
    groups: dict[str, str] = field(default_factory=dict, init=False)
    _first: tuple[Order, UserError] | None = field(default=None, init=False)
    _errors: int = field(default=0, init=False)
    _lines: Sequence[str] = field(default=(), init=False)

    def rows(
        self,
        rows: Sequence[Row],
        split: str,
        needs: Sequence[str] = (),
        bad: Sequence[BadValue] = (),
        held_out: Mapping[str, Iterable[str]] | None = None,
        lines: Sequence[str] = (),
        groups: Sequence[str] = (),
    ) -> list[Row]:
        """The rows that pass; kept duplicates get ids of their own, so that ids are unique within a split.

        Args:
            rows: of one split, in file order.
            split: train, val or test; for counts and messages.
            needs: labels that the task cannot do without.
            bad: the records of the split that could not become a row.
            held_out: split -> prompt keys that this split must not have.
            lines: place of each row; without them a row that stands twice has the place of the first.
            groups: stratum of each row, "" for none; a kept duplicate may stand in another one than the first.
        """
        self._lines = lines
        held_out = {name: set(keys) for name, keys in (held_out or {}).items()}
        kept: list[Row] = []
        seen: dict[tuple[object, ...], Row] = {}
        copies: Counter[tuple[object, ...]] = Counter()
        for order, row in self._with_mended(rows, split, bad):
            checked = self._labels_and_texts(row, split, needs, order)
            if checked is None:
                continue
            key = _duplicate_key(checked)
            if key in seen:
                copies[key] += 1
                if self._apply("duplicate", _labels_differ(seen[key], checked), checked, split, order) is None:
                    continue
                checked = replace(checked, id=f"{checked.id}-{copies[key]}")
            else:
                seen[key] = checked
            if held_out:
                at = prompt_key(checked.prompt)
                fault = next((f"with_{name}" for name, keys in held_out.items() if at in keys), None)
                if fault is not None and self._apply("overlap", fault, checked, split, order) is None:
                    continue
            kept.append(checked)
            if group := groups[order[1]] if order[2] and order[1] < len(groups) else "":
                self.groups.setdefault(checked.id, group)
        return kept

    def near(self, rows: Sequence[Row], split: str, held_out: Iterable[str]) -> list[Row]:
        """The rows whose prompt is no near copy of a held-out prompt key; the `overlap` is another matter."""
        held_out = set(held_out)
        if self.policy.near_overlap == "off" or not held_out or not rows:
            return list(rows)
        self._lines = ()
        keys = [prompt_key(row.prompt) for row in rows]
        found = near_prompts(keys, held_out)
        kept: list[Row] = []
        for i, (row, key) in enumerate(zip(rows, keys, strict=True)):
            order = (SPLITS.index(split), i, 1)
            if key in found and self._apply("near_overlap", "", row, split, order) is None:
                continue
            kept.append(row)
        return kept

    def raise_first(self) -> None:
        """End with the first row that an `error` policy met, if any.

        Raises:
            UserError: kind, id, place and mend of the row, and how many there are.
        """
        if self._first is None:
            return
        error = self._first[1]
        if self._errors > 1:
            error = UserError(f"{error.what}, the first of {self._errors:,} bad rows", error.where, error.mend)
        raise error

    def _with_mended(self, rows: Sequence[Row], split: str, bad: Sequence[BadValue]) -> Iterable[tuple[Order, Row]]:
        """All rows in order, among them the bad records whose policy is to keep what can be kept of them."""
        number = SPLITS.index(split)
        waiting = sorted(bad, key=lambda value: value.before or 0)  # stable: file order where there is no number
        for i, row in enumerate(rows):
            while waiting and (waiting[0].before or 0) <= i:
                yield from self._mended(waiting.pop(0), split)
            yield (number, i, 1), row
        for value in waiting:
            yield from self._mended(value, split)

    def _mended(self, value: BadValue, split: str) -> Iterable[tuple[Order, Row]]:
        kind = value.kind
        order = (SPLITS.index(split), value.before or 0, 0)
        policy = getattr(self.policy, kind)
        kept = policy == "keep" and value.row is not None
        self._count(kind, split, place=value.place, dropped=int(not kept))
        if policy == "error":
            mend = f"{value.mend}, or set data.policy.{kind}=drop"
            self._note(order, UserError(f"{kind} row: {value.what}", value.place, mend))
        elif kept and value.row is not None:
            yield order, value.row

    def _labels_and_texts(self, row: Row, split: str, needs: Sequence[str], order: Order) -> Row | None:
        """The row after the checks that look at nothing but itself."""
        missing = next((n for n in label_columns(type(row), needs) if getattr(row, n) is None), None)
        if missing is not None:
            return self._apply("unlabelled", missing, row, split, order)
        for kind, fault_of in FAULTS:
            fault = fault_of(row)
            if fault is not None:
                return self._apply(kind, fault, row, split, order)
        return row

    def _apply(self, kind: str, fault: str, row: Row, split: str, order: Order) -> Row | None:
        """The row as the policy leaves it; None when dropped."""
        policy = getattr(self.policy, kind)
        place = self._lines[order[1]] if order[2] and order[1] < len(self._lines) else self.places.get(row.id)
        if policy == "keep":
            self._count(kind, split, fault, place)
            return row
        if policy == "flip" and fault == "safer_is_unsafe" and isinstance(row, PreferencePair):
            self._count(kind, split, fault, place, flipped=1)
            return replace(row, safer_response_id=0 if row.is_response_0_safe else 1)
        self._count(kind, split, fault, place, dropped=1)
        if policy == "error":
            detail = f" ({fault.replace('_', ' ')})" if fault else ""
            mend = f"mend the row or set data.policy.{kind}={_mildest(kind)}"
            self._note(order, UserError(f"{kind} row {row.id}{detail}", place or f"the {split} rows", mend))
        return None

    def _note(self, order: Order, error: UserError) -> None:
        self._errors += 1
        if self._first is None or order < self._first[0]:
            self._first = (order, error)

    def _count(
        self, kind: str, split: str, fault: str = "", place: str | None = None, dropped: int = 0, flipped: int = 0
    ) -> None:
        finding = self.report.finding(kind, split)
        finding.found += 1
        finding.dropped += dropped
        finding.flipped += flipped
        if fault:
            finding.detail[fault] = finding.detail.get(fault, 0) + 1
        if place and len(finding.places) < MAX_PLACES:
            finding.places.append(short_place(place))


def _mildest(kind: str) -> str:
    return next(policy for policy in ALLOWED[kind] if policy != "error")


def _duplicate_key(row: Row) -> tuple[object, ...]:
    return (row.prompt, *sorted(response.strip() for response in responses_of(row)))


def _labels_differ(first: Row, second: Row) -> str:
    """Whether a duplicate says something else about the same texts: `other_labels`, or nothing."""
    if isinstance(first, PreferencePair) and isinstance(second, PreferencePair):
        if first.response_0.strip() != second.response_0.strip():
            second = swap_sides(second)
        second = replace(second, response_0=first.response_0, response_1=first.response_1)
    return "" if replace(second, id=first.id) == first else "other_labels"


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
