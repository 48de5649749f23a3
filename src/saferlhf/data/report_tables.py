"""The data report as tables: what screen, report page and model card show of `data_report.json`.

Works on the plain mapping, so that a report read back from a file looks the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from saferlhf.data.report import KINDS, SPLITS


class Line(NamedTuple):
    """One line of a table: its name, a cell for each further column, and how deep it is indented."""

    name: str
    cells: tuple[str, ...]
    level: int = 0


@dataclass(frozen=True)
class ReportTable:
    """A table of text.

    Attributes:
        title: of the table.
        columns: heads of all columns but the first.
        lines: its content; the cells of each are as many as the columns.
        note: a sentence below it, or nothing.
    """

    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str = ""


Group = Mapping[str, Mapping[str, float]]

_LABELS = {
    "distinct_prompts": "distinct prompts",
    "unsafe_share": "unsafe responses",
    "both_safe_share": "pairs, both safe",
    "one_safe_share": "pairs, one safe",
    "better_is_safer_share": "better is safer too",
}
_POSITION = {
    "better_is_second": "better is second",
    "safer_is_second": "safer is second",
    "single_is_second": "preferred is second",
}
_LONGER = {
    "better_is_longer_share": "better is longer",
    "safer_is_longer_share": "safer is longer",
    "single_is_longer_share": "preferred is longer",
}
_LENGTHS = {
    "prompt_words_mean": "words of a prompt",
    "response_words_mean": "words of a response",
    "safe_words_mean": "words of a safe one",
    "unsafe_words_mean": "words of an unsafe one",
    "tokens_mean": "tokens",
    "tokens_max": "tokens, longest",
}
_MELTED = {
    "made": "taken out of pairs",
    "repeated": "repeated, left out",
    "other_labels": "of these judged otherwise",
}
_TOTAL = {"tokens_total": "tokens in all"}
_TRUNCATED = {
    "prompt_cut_share": "prompt cut",
    "response_cut_share": "response cut",
}


def data_tables(report: Mapping[str, Any], *, short: bool = False) -> list[ReportTable]:
    """Rows and checks, labels, lengths, then categories and files.

    Args:
        report: as `DataReport.to_dict` gives it; what is missing is left out.
        short: for a screen: categories and files are summed up in one line each.
    """
    splits = tuple(s for s in SPLITS if report.get("read", {}).get(s) or report.get("kept", {}).get(s))
    if not splits:
        return []
    files = list(_files(report))
    tables = [
        ReportTable("rows", splits, tuple(_rows(report, splits, files if short else [])), _hash_note(report)),
        ReportTable("bad rows", splits, tuple(_findings(report, splits)), _clean(report)),
        ReportTable("labels", splits, tuple(_labels(report, splits, short)), " ".join(report.get("notes", ()))),
        ReportTable("biases", splits, tuple(_biases(report, splits)), _BIAS_NOTE),
        ReportTable("lengths", splits, tuple(_lengths(report, splits, short)), "" if short else _LENGTH_NOTE),
    ]
    if not short:
        tables.append(ReportTable("harm categories", splits, tuple(_categories(report, splits)), _CATEGORY_NOTE))
        tables.append(ReportTable("files", ("split", "rows", "sha256"), tuple(files)))
    return [table for table in tables if table.lines or table.title == "bad rows"]


_BIAS_NOTE = "Biases: place as read, before sides are shuffled; length of kept pairs. 50% is none."
_LENGTH_NOTE = "Means over the kept rows. Cut: longer than the backbone takes; a prompt loses its beginning."
_CATEGORY_NOTE = "Responses; one may count in several categories."


def data_facts(report: Mapping[str, Any]) -> str:
    """Source, revision and licence in one line."""
    parts = [str(report.get("source", ""))]
    parts += [f"revision {report['revision']}"] if report.get("revision") else []
    parts += [str(report["licence"])] if report.get("licence") else []
    return ", ".join(part for part in parts if part)


def data_markdown(report: Mapping[str, Any]) -> str:
    """All tables as Markdown, for the model card."""
    parts = [f"Source: {data_facts(report)}."]
    for table in data_tables(report):
        parts.append(f"**{table.title.capitalize()}**")
        if table.lines:
            lines = [f"| | {' | '.join(table.columns)} |", f"|---|{'---:|' * len(table.columns)}"]
            for line in table.lines:
                name = "&nbsp;&nbsp;" * line.level + line.name.replace("|", "\\|")
                lines.append(f"| {name} | {' | '.join(line.cells)} |")
            parts.append("\n".join(lines))
        if table.note:
            parts.append(table.note)
    return "\n\n".join(parts)


# ------------------------------------------------------------------------------------------------ lines
def _rows(report: Mapping[str, Any], splits: Sequence[str], files: Sequence[Line]) -> Iterator[Line]:
    yield _line("read", {s: report.get("read", {}).get(s) for s in splits}, splits)
    for key, name in _MELTED.items():
        counts = _column(report.get("melted", {}), key)
        if any(counts.values()):
            yield _line(name, counts, splits)
    yield _line("kept", {s: report.get("kept", {}).get(s) for s in splits}, splits)
    if files:
        count = {s: sum(line.cells[0] == s for line in files) for s in splits}
        yield _line("files", {s: n or None for s, n in count.items()}, splits)


def _findings(report: Mapping[str, Any], splits: Sequence[str]) -> Iterator[Line]:
    findings = report.get("findings", {})
    for kind in (*KINDS, *(kind for kind in findings if kind not in KINDS)):
        by_split = findings.get(kind, {})
        found = _column(by_split, "found")
        if not any(found.values()):
            continue
        dropped, flipped = _column(by_split, "dropped"), _column(by_split, "flipped")
        kept = {s: n - dropped.get(s, 0) - flipped.get(s, 0) for s, n in found.items()}
        done = {"dropped": dropped, "flipped": flipped, "kept": kept}
        told = [(what, counts) for what, counts in done.items() if any(counts.values())]
        details = {
            detail.replace("_", " "): {s: by_split.get(s, {}).get("detail", {}).get(detail, 0) for s in splits}
            for detail in dict.fromkeys(name for s in splits for name in by_split.get(s, {}).get("detail", {}))
        }
        name = kind.replace("_", " ")
        if len(details) == 1 and sum(next(iter(details.values())).values()) == sum(found.values()):
            name = f"{name} ({next(iter(details))})"
            details = {}
        yield _line(f"{name}, {told[0][0]}" if len(told) == 1 else name, found, splits)
        if len(told) > 1:
            yield from (_line(what, counts, splits, 1) for what, counts in told)
        yield from (_line(detail, counts, splits, 1) for detail, counts in details.items())


def _clean(report: Mapping[str, Any]) -> str:
    """Which kinds were looked for and not found."""
    findings = report.get("findings", {})
    off = [kind for kind, policy in report.get("policy", {}).items() if policy == "off"]
    none = [k for k in KINDS if k not in off and not any(_column(findings.get(k, {}), "found").values())]
    names = ", ".join(kind.replace("_", " ") for kind in none)
    return f"Not found: {names}." if names else ""


def _hash_note(report: Mapping[str, Any]) -> str:
    """Whether the stored hashes of prompt and response hold."""
    by_split = report.get("hash_rule", {})
    checked, wrong = (sum(_column(by_split, name).values()) for name in ("checked", "wrong"))
    if not checked:
        return ""
    return f"Hash rule: {checked:,} hashes checked, {wrong:,} wrong." if wrong else f"Hash rule: all {checked:,} hold."


def _labels(report: Mapping[str, Any], splits: Sequence[str], short: bool) -> Iterator[Line]:
    yield from _named(report.get("labels", {}), _LABELS, splits)
    for level in range(4):
        counts = {s: report.get("severity", {}).get(s, {}).get(str(level)) for s in splits}
        if any(count is not None for count in counts.values()):
            yield _line(f"severity {level}", counts, splits)
    if short:
        counts = {s: len(report.get("categories", {}).get(s, {})) for s in splits}
        if any(counts.values()):
            yield _line("harm categories", counts, splits)


def _biases(report: Mapping[str, Any], splits: Sequence[str]) -> Iterator[Line]:
    yield from _named(report.get("position", {}), _POSITION, splits)
    yield from _named(report.get("lengths", {}), _LONGER, splits)


def _lengths(report: Mapping[str, Any], splits: Sequence[str], short: bool) -> Iterator[Line]:
    yield from _named(report.get("lengths", {}), _LENGTHS if short else _LENGTHS | _TOTAL, splits)
    yield from _named(report.get("truncated", {}), _TRUNCATED, splits)


def _categories(report: Mapping[str, Any], splits: Sequence[str]) -> Iterator[Line]:
    by_split = report.get("categories", {})
    for name in dict.fromkeys(name for split in splits for name in by_split.get(split, {})):
        yield _line(name, {s: by_split.get(s, {}).get(name, 0) for s in splits}, splits)


def _files(report: Mapping[str, Any]) -> Iterator[Line]:
    for split, files in report.get("files", {}).items():
        for file in files:
            rows = "" if file.get("rows") is None else f"{file['rows']:,}"
            yield Line(str(file.get("name", "")), (split, rows, str(file.get("sha256") or "")[:16]))


# ------------------------------------------------------------------------------------------------ cells
def _named(group: Group, names: Mapping[str, str], splits: Sequence[str]) -> Iterator[Line]:
    for key, name in names.items():
        values = {s: group.get(s, {}).get(key) for s in splits}
        if any(value is not None for value in values.values()):
            share = key.endswith(("_share", "_second"))
            yield Line(name, tuple(_share(values[s]) if share else _number(values[s]) for s in splits))


def _column(by_split: Mapping[str, Mapping[str, int]], name: str) -> dict[str, int]:
    """Counts by split; 0 where a split has none."""
    return {split: by_split.get(split, {}).get(name, 0) for split in SPLITS}


def _line(name: str, values: Mapping[str, float | None], splits: Sequence[str], level: int = 0) -> Line:
    return Line(name, tuple(_number(values.get(split)) for split in splits), level)


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{int(value):,}" if float(value).is_integer() else f"{value:,.1f}"
