"""The data report: how many rows came, what was wrong with them, what was done, and what the kept ones look like.

It holds counts and shares only, never the text of a row, so it can go to the screen, to `data_report.json`, to the
tracking server and into the model card.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from saferlhf.data.rows import PreferencePair, QuestionAnswer, Row, prompt_text

SPLITS = ("train", "val", "test")


KINDS = (
    "unreadable",
    "non_text",
    "bad_label",
    "severity_range",
    "unknown_category",
    "wrong_hash",
    "unlabelled",
    "empty",
    "identical",
    "contradictory",
    "duplicate",
    "overlap",
    "near_overlap",
    "overlong",
)
"""Kinds of bad rows, in the order in which a record is tried; what each means stands in `data/checks.py`."""


MAX_PLACES = 3
"""Places of bad rows that the report names, for each kind and split."""


def short_place(place: str) -> str:
    """A place without its folder, which is nobody's business where the report is published."""
    archive, mark, member = place.partition(".tar.gz:")
    return f"{archive.rpartition('/')[2]}{mark}{member}" if mark else place.rpartition("/")[2]


@dataclass
class Finding:
    """One kind of bad row in one split.

    Attributes:
        found: rows of this kind; those neither dropped nor flipped were kept.
        dropped, flipped: what became of them.
        detail: rule or part -> rows.
        places: of the first few, as `file:line`.
    """

    found: int = 0
    dropped: int = 0
    flipped: int = 0
    detail: dict[str, int] = field(default_factory=dict)
    places: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FileFacts:
    """One data file as it was read.

    Attributes:
        name: below the source's folder.
        split: where its rows went.
        sha256: of its bytes.
        rows: records in it, bad ones included.
    """

    name: str
    split: str
    sha256: str | None = None
    rows: int | None = None


@dataclass
class DataReport:
    """Counts of one data set; filled while it is read, checked, split and encoded.

    Attributes:
        source: name of the data config.
        licence: licence of the rows, if known.
        revision: of the data set, if it came with one.
        files: data files by split.
        facts: the same files with their hashes and rows.
        policy: kind -> what was done with such rows.
        read: rows read, by the split they came in, those included that could not become a row.
        kept: rows left, by split.
        findings: kind -> split -> counts.
        hash_rule: split -> hashes `checked` and `wrong`; empty where the data have none.
        melted: split -> answers or prompts `made` out of pairs, `repeated` ones that were left out, and how many of
            these had `other_labels`; empty where nothing was taken apart.
        notes: what else was done to the rows, a sentence each.
        labels: split -> shares and counts of labels.
        severity: split -> responses by severity.
        categories: split -> responses by harm category.
        position: split -> share of pairs whose second response wins, before the sides were shuffled.
        lengths: split -> length statistics; words, and tokens once encoded.
        truncated: split -> shares of rows that were too long for the backbone, before any was dropped.
        places: row id -> place, for messages; not part of what is written.
    """

    source: str
    licence: str | None = None
    revision: str | None = None
    files: dict[str, list[str]] = field(default_factory=dict)
    facts: list[FileFacts] = field(default_factory=list)
    policy: dict[str, str] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    findings: dict[str, dict[str, Finding]] = field(default_factory=dict)
    hash_rule: dict[str, dict[str, int]] = field(default_factory=dict)
    melted: dict[str, dict[str, int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    labels: dict[str, dict[str, float]] = field(default_factory=dict)
    severity: dict[str, dict[str, int]] = field(default_factory=dict)
    categories: dict[str, dict[str, int]] = field(default_factory=dict)
    position: dict[str, dict[str, float]] = field(default_factory=dict)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    truncated: dict[str, dict[str, float]] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def finding(self, kind: str, split: str) -> Finding:
        """The counts of one kind in one split, made when first asked for."""
        return self.findings.setdefault(kind, {}).setdefault(split, Finding())

    def describe(self, split: str, rows: Sequence[Row]) -> None:
        """Measure the rows that are kept."""
        self.kept[split] = len(rows)
        if not rows:
            return
        self.labels[split] = label_balance(rows)
        self.severity[split] = severity_counts(rows)
        self.categories[split] = category_counts(rows)
        self.lengths[split] = word_lengths(rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "source": self.source,
            "licence": self.licence,
            "revision": self.revision,
            "files": self._files(),
            "read": _by_split(self.read),
            "kept": _by_split(self.kept),
            "policy": self.policy,
            "findings": {
                kind: {split: _plain(finding) for split, finding in _by_split(self.findings[kind]).items()}
                for kind in sorted(self.findings, key=KINDS.index)
            },
            "hash_rule": _by_split(self.hash_rule),
            "melted": _by_split(self.melted),
            "notes": self.notes,
            "labels": _by_split(self.labels),
            "severity": _by_split(self.severity),
            "categories": _by_split(self.categories),
            "position": _by_split(self.position),
            "lengths": _by_split(self.lengths),
            "truncated": _by_split(self.truncated),
        }

    def _files(self) -> dict[str, list[dict[str, Any]]]:
        facts = self.facts or [FileFacts(name, split) for split, names in self.files.items() for name in names]
        out: dict[str, list[dict[str, Any]]] = {}
        for fact in facts:
            known = {"name": fact.name, "sha256": fact.sha256, "rows": fact.rows}
            out.setdefault(fact.split, []).append({name: value for name, value in known.items() if value is not None})
        return _by_split(out)


T = TypeVar("T")


def _by_split(content: Mapping[str, T]) -> dict[str, T]:
    """In the order in which splits are used."""
    return {split: content[split] for split in SPLITS if split in content}


def _plain(finding: Finding) -> dict[str, Any]:
    plain: dict[str, Any] = {"found": finding.found, "dropped": finding.dropped}
    if finding.flipped:
        plain["flipped"] = finding.flipped
    if finding.detail:
        plain["detail"] = dict(sorted(finding.detail.items()))
    if finding.places:
        plain["places"] = list(finding.places)
    return plain


# ------------------------------------------------------------------------------------------------ statistics
def position_bias(rows: Sequence[Row]) -> dict[str, float]:
    """Share of pairs in which the second response wins, for each label the rows have."""
    pairs = [row for row in rows if isinstance(row, PreferencePair)]
    out: dict[str, float] = {}
    for name in ("better", "safer", "single"):
        ids = [getattr(row, f"{name}_response_id") for row in pairs]
        labelled = [i for i in ids if i is not None]
        if labelled:
            out[f"{name}_is_second"] = _share(labelled)
    return out


def label_balance(rows: Sequence[Row]) -> dict[str, float]:
    """Share of unsafe responses and of agreeing labels, kinds of pairs, and how many prompts are distinct."""
    out: dict[str, float] = {"distinct_prompts": len({row.prompt for row in rows})}
    safe = [found for found, _, _ in _judgements(rows) if found is not None]
    if safe:
        out["unsafe_share"] = 1.0 - _share(safe)
    pairs = [row for row in rows if isinstance(row, PreferencePair)]
    sides = [
        (row.is_response_0_safe, row.is_response_1_safe)
        for row in pairs
        if row.is_response_0_safe is not None and row.is_response_1_safe is not None
    ]
    if sides:
        out["both_safe_share"] = _share([a and b for a, b in sides])
        out["one_safe_share"] = _share([a != b for a, b in sides])
    both = [
        row.better_response_id == row.safer_response_id
        for row in pairs
        if row.better_response_id is not None and row.safer_response_id is not None
    ]
    if both:
        out["better_is_safer_share"] = _share(both)
    return out


def severity_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Responses by severity, `0` to `3`; empty where no row has one."""
    found = Counter(severity for _, severity, _ in _judgements(rows) if severity is not None)
    return {str(level): found[level] for level in range(4)} if found else {}


def category_counts(rows: Sequence[Row]) -> dict[str, int]:
    """Responses by harm category, the most frequent first; a response counts under each of its categories."""
    found = Counter(name for _, _, names in _judgements(rows) for name in names or ())
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _judgements(rows: Sequence[Row]) -> Iterator[tuple[bool | None, int | None, frozenset[str] | None]]:
    """Safe, severity and categories of each response."""
    for row in rows:
        if isinstance(row, PreferencePair):
            yield row.is_response_0_safe, row.response_0_severity_level, row.response_0_harm_category
            yield row.is_response_1_safe, row.response_1_severity_level, row.response_1_harm_category
        elif isinstance(row, QuestionAnswer):
            yield row.is_safe, row.severity_level, row.harm_category


def word_lengths(rows: Sequence[Row]) -> dict[str, float]:
    """Mean words of prompts and of responses, safe and unsafe ones; for pairs how often the winner is the longer one.

    Pairs of equal length say nothing about the winner and do not count.
    """
    if not rows:
        return {}
    prompts = [len(prompt_text(row.prompt).split()) for row in rows]
    out = {"prompt_words_mean": sum(prompts) / len(prompts)}
    responses: list[tuple[int, bool | None]] = []
    longer: dict[str, list[bool]] = {"better": [], "safer": [], "single": []}
    for row in rows:
        if isinstance(row, PreferencePair):
            sides = (len(row.response_0.split()), len(row.response_1.split()))
            responses += zip(sides, (row.is_response_0_safe, row.is_response_1_safe), strict=True)
            for name, found in longer.items():
                winner = getattr(row, f"{name}_response_id")
                if winner is not None and sides[0] != sides[1]:
                    found.append(sides[winner] > sides[1 - winner])
        elif isinstance(row, QuestionAnswer):
            responses.append((len(row.response.split()), row.is_safe))
    groups = {
        "response_words_mean": [words for words, _ in responses],
        "safe_words_mean": [words for words, safe in responses if safe],
        "unsafe_words_mean": [words for words, safe in responses if safe is False],
    }
    out |= {name: _share(words) for name, words in groups.items() if words}
    return out | {f"{name}_is_longer_share": _share(found) for name, found in longer.items() if found}


def _share(values: Sequence[int | bool]) -> float:
    """The mean."""
    return sum(values) / len(values)
