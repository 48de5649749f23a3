"""The data report: how many rows came, what was wrong with them, what was done, and what the kept ones look like.

It holds counts and shares only, never the text of a row, so it can go to the screen, to `data_report.json`, to the
tracking server and into the model card.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from saferlhf.data.rows import PreferencePair, QuestionAnswer, Row, prompt_text

SPLITS = ("train", "val", "test")


@dataclass
class Finding:
    """One kind of bad row in one split."""

    found: int = 0
    dropped: int = 0
    flipped: int = 0
    detail: dict[str, int] = field(default_factory=dict)


@dataclass
class DataReport:
    """Counts of one data set; filled while it is read, checked, split and encoded.

    Attributes:
        source: name of the data config.
        licence: licence of the rows, if known.
        files: data files by split.
        read: rows read, by the split they came in.
        kept: rows left, by split.
        findings: kind -> split -> counts.
        labels: split -> shares and counts of labels.
        position: split -> share of pairs whose second response wins, before the sides were shuffled.
        lengths: split -> length statistics; words, and tokens once encoded.
    """

    source: str
    licence: str | None = None
    files: dict[str, list[str]] = field(default_factory=dict)
    read: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    findings: dict[str, dict[str, Finding]] = field(default_factory=dict)
    labels: dict[str, dict[str, float]] = field(default_factory=dict)
    position: dict[str, dict[str, float]] = field(default_factory=dict)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)

    def finding(self, kind: str, split: str) -> Finding:
        """The counts of one kind in one split, made when first asked for."""
        return self.findings.setdefault(kind, {}).setdefault(split, Finding())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "source": self.source,
            "licence": self.licence,
            "files": self.files,
            "read": self.read,
            "kept": self.kept,
            "findings": {
                kind: {split: _plain(finding) for split, finding in by_split.items()}
                for kind, by_split in self.findings.items()
            },
            "labels": self.labels,
            "position": self.position,
            "lengths": self.lengths,
        }

    def table(self) -> str:
        """A table for the screen: one column per split, one line per fact."""
        splits = [split for split in SPLITS if split in self.read or split in self.kept]
        lines: list[tuple[str, list[str]]] = [
            ("rows read", [str(self.read.get(split, "")) for split in splits]),
            ("rows kept", [str(self.kept.get(split, "")) for split in splits]),
        ]
        for kind, by_split in self.findings.items():
            if any(finding.found for finding in by_split.values()):
                lines.append((kind, [_short(by_split.get(split)) for split in splits]))
        for group in (self.labels, self.position, self.lengths):
            for name in dict.fromkeys(name for split in splits for name in group.get(split, {})):
                cells = [_number(group.get(split, {}).get(name)) for split in splits]
                lines.append((name.replace("_", " "), cells))
        widths = [max(len(split), *(len(cells[i]) for _, cells in lines)) for i, split in enumerate(splits)]
        first = max(len(name) for name, _ in lines)
        head = f"{self.source:<{first}}  " + "  ".join(f"{s:>{w}}" for s, w in zip(splits, widths, strict=True))
        body = [
            f"{name:<{first}}  " + "  ".join(f"{cell:>{w}}" for cell, w in zip(cells, widths, strict=True))
            for name, cells in lines
        ]
        return "\n".join(line.rstrip() for line in [head, *body])


def _plain(finding: Finding) -> dict[str, Any]:
    plain: dict[str, Any] = {"found": finding.found, "dropped": finding.dropped}
    if finding.flipped:
        plain["flipped"] = finding.flipped
    if finding.detail:
        plain["detail"] = dict(sorted(finding.detail.items()))
    return plain


def _short(finding: Finding | None) -> str:
    if finding is None or not finding.found:
        return "0"
    done = [f"{n} {what}" for n, what in ((finding.dropped, "dropped"), (finding.flipped, "flipped")) if n]
    return f"{finding.found} ({', '.join(done) or 'kept'})"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return str(int(value)) if float(value).is_integer() and abs(value) >= 2 else f"{value:.3g}"


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
    """Shares of unsafe responses, severities and agreeing labels, and how many prompts are distinct."""
    out: dict[str, float] = {"distinct_prompts": len({row.prompt for row in rows})}
    safe, severity = _judgements(rows)
    if safe:
        out["unsafe_share"] = 1.0 - _share(safe)
    for level in range(4) if severity else ():
        out[f"severity_{level}_share"] = _share([value == level for value in severity])
    pairs = [row for row in rows if isinstance(row, PreferencePair)]
    both = [
        row.better_response_id == row.safer_response_id
        for row in pairs
        if row.better_response_id is not None and row.safer_response_id is not None
    ]
    if both:
        out["better_is_safer_share"] = _share(both)
    return out


def _judgements(rows: Sequence[Row]) -> tuple[list[bool], list[int]]:
    safe: list[bool | None] = []
    severity: list[int | None] = []
    for row in rows:
        if isinstance(row, PreferencePair):
            safe += [row.is_response_0_safe, row.is_response_1_safe]
            severity += [row.response_0_severity_level, row.response_1_severity_level]
        elif isinstance(row, QuestionAnswer):
            safe.append(row.is_safe)
            severity.append(row.severity_level)
    return [s for s in safe if s is not None], [s for s in severity if s is not None]


def word_lengths(rows: Sequence[Row]) -> dict[str, float]:
    """Mean words of prompts and responses; for pairs also how often the winner is the longer one."""
    if not rows:
        return {}
    prompts = [len(prompt_text(row.prompt).split()) for row in rows]
    out = {"prompt_words_mean": sum(prompts) / len(prompts)}
    responses: list[int] = []
    longer: dict[str, list[bool]] = {"better": [], "safer": []}
    for row in rows:
        if isinstance(row, PreferencePair):
            sides = (len(row.response_0.split()), len(row.response_1.split()))
            responses += sides
            for name, found in longer.items():
                winner = getattr(row, f"{name}_response_id")
                if winner is not None and sides[0] != sides[1]:
                    found.append(sides[winner] > sides[1 - winner])
        elif isinstance(row, QuestionAnswer):
            responses.append(len(row.response.split()))
    if responses:
        out["response_words_mean"] = sum(responses) / len(responses)
    return out | {f"{name}_is_longer_share": _share(found) for name, found in longer.items() if found}


def _share(values: Sequence[int | bool]) -> float:
    return sum(values) / len(values)
