"""Files as a source: records -> layout -> columns -> canonical rows, bad records collected beside them.

A file in which no record is right is refused with its first fault; anything less is for `data.policy` to decide.
"""

from __future__ import annotations

import fnmatch
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from saferlhf.config.schema import DataConfig
from saferlhf.data.columns import BadValue, Columns, choose_columns, holds
from saferlhf.data.files import Record, file_hash, read_records
from saferlhf.data.report import FileFacts
from saferlhf.data.rows import CATEGORY_COLUMNS, PreferencePair, PromptRow, QuestionAnswer, Row, categories_of
from saferlhf.data.sources.base import SourceRows
from saferlhf.data.sources.layouts import Layout, choose_layout, has_header
from saferlhf.data.sources.locate import locate
from saferlhf.data.taxonomy import TAXONOMIES, likely_taxonomy
from saferlhf.errors import UserError

_SAMPLE = 100  # records that settle a file's layout and columns


@dataclass
class _Entry:
    """One record as it was read: a row, or why it is none; its place and its stratum."""

    read: Row | BadValue
    place: str
    group: str | None = None

    @property
    def fault(self) -> str | None:
        return self.read.kind if isinstance(self.read, BadValue) else None


def file_rows(cfg: DataConfig, kind: type[Row], needs: Sequence[str]) -> SourceRows:
    """Rows of files; pairs where `kind` asks for answers or prompts and the files hold pairs."""
    located = locate(cfg)
    out = SourceRows(train=[], revision=located.revision)
    entries: dict[str, list[_Entry]] = {}
    for split, paths in located.by_split().items():
        entries[split] = []
        for path, joined in _with_joined(paths, cfg):
            names = [located.name(file) for file in (path, *joined)]
            found = list(_read_file(path, joined, cfg, kind, split, out))
            _check_hash_rule(found, names[0], cfg, out)
            if found and all(entry.fault for entry in found):
                raise found[0].read  # type: ignore[misc]
            entries[split] += found
            out.files.setdefault(split, []).extend(names)
            for name, file in zip(names, (path, *joined), strict=True):
                out.facts.append(FileFacts(name, split, file_hash(file), len(found)))
        if not entries[split]:
            raise UserError("no rows", ", ".join(map(str, paths)), "the file is empty")
    _check_categories([entry for listed in entries.values() for entry in listed], cfg)
    for split, listed in entries.items():
        _sort_out(listed, split, out)
    return out


def _read_file(
    path: Path, joined: Sequence[Path], cfg: DataConfig, kind: type[Row], split: str, out: SourceRows
) -> Iterator[_Entry]:
    """Rows and bad records of one file, in its order; checked hashes are counted in `out`."""
    records = read_records(path, has_header(cfg.layout))
    head = list(itertools.islice(records, _SAMPLE))
    layout = choose_layout(cfg.layout, [record for record in head if record.fault is None])
    converted = (found for record in head for found in _converted(record, layout, kind))
    sample = [record for record in converted if isinstance(record, Record)]
    columns: Columns | None = None
    for record in _joined(itertools.chain(head, records), layout, kind, joined, cfg):
        if isinstance(record, BadValue):
            yield _Entry(record, record.place)
            if not sample and record.place == head[-1].place:
                return  # not one record of the sample can be read: the caller refuses the file
            continue
        if columns is None:
            sample = [record] if joined else sample
            stored = stored_kind(sample, cfg, kind)
            columns = choose_columns(stored, cfg.columns, sample, cfg.check_hashes, cfg.values)
        if hashes := columns.hashes(record):
            counts = out.hash_rule.setdefault(split, {"checked": 0, "wrong": 0})
            counts["checked"] += hashes
        group: str | None = None
        try:
            group = columns.group(record)
            yield _Entry(columns.row(record), record.place, group)
        except BadValue as value:
            counts = out.hash_rule.get(split, {})
            counts["wrong"] = counts.get("wrong", 0) + (value.kind == "wrong_hash")
            yield _Entry(value, record.place, group)


def _converted(record: Record, layout: Layout, kind: type[Row]) -> Sequence[Record | BadValue]:
    """What the layout makes of a record, mostly one."""
    if record.fault is not None:
        return [BadValue("unreadable", record.fault.what, record.place, record.fault.mend)]
    try:
        return layout.records(record, kind)
    except BadValue as value:
        return [value]


def stored_kind(sample: Sequence[Record], cfg: DataConfig, wanted: type[Row]) -> type[Row]:
    """The kind of row to read a file as: pairs where it holds pairs and what is wanted can be taken out of them."""
    pairs = any(holds(sample, cfg.columns, *sides) for sides in (("response_0", "response_1"), ("chosen", "rejected")))
    alone = {QuestionAnswer: "response", PromptRow: "prompt"}.get(wanted)
    return PreferencePair if alone and pairs and not holds(sample, cfg.columns, alone) else wanted


# ------------------------------------------------------------------------------------------------ joined files
def _with_joined(paths: Sequence[Path], cfg: DataConfig) -> list[tuple[Path, list[Path]]]:
    """Files, each with those whose rows stand beside its own."""
    if not cfg.join:
        return [(path, []) for path in paths]
    beside = [path for path in paths if any(fnmatch.fnmatch(path.name, pattern) for pattern in cfg.join)]
    own = [path for path in paths if path not in beside]
    if len(own) != 1 or not beside:
        names = ", ".join(path.name for path in paths)
        what = f"one file and beside it {' and '.join(cfg.join)} are needed, there are: {names}"
        raise UserError(what, "data.join", "name the folder of these files in data.path, or set data.join=null")
    return [(own[0], beside)]


def _joined(
    records: Iterator[Record], layout: Layout, kind: type[Row], joined: Sequence[Path], cfg: DataConfig
) -> Iterator[Record | BadValue]:
    """Converted records with the columns of the row-aligned files added.

    Raises:
        UserError: files of different length, or rows of different prompts.
    """
    streams = [read_records(path) for path in joined]
    for record in records:
        beside = [next(stream, None) for stream in streams]
        added = {name: value for other in beside if other is not None for name, value in other.values.items()}
        for converted in _converted(record, layout, kind):
            for other, path in zip(beside, joined, strict=True):
                _check_aligned(record, converted, other, path, cfg)
            if added and isinstance(converted, Record):
                converted = converted._replace(values={**added, **converted.values})
            yield converted
    for stream, path in zip(streams, joined, strict=True):
        if next(stream, None) is not None:
            raise UserError("more rows than the file beside it", str(path), "both must hold the same rows in one order")


def _check_aligned(
    record: Record, converted: Record | BadValue, other: Record | None, path: Path, cfg: DataConfig
) -> None:
    if other is None:
        raise UserError(f"no row for {record.place}", str(path), "both files must hold the same rows in one order")
    column = next(value for pattern, value in (cfg.join or {}).items() if fnmatch.fnmatch(path.name, pattern))
    if isinstance(converted, Record):
        prompt, beside = converted.values.get("prompt"), other.values.get(column)
        same = isinstance(prompt, str) and isinstance(beside, str) and prompt.strip() == beside.strip()
        if not same:
            what = f"column '{column}' is not the prompt of {record.place}"
            raise UserError(what, other.place, "both files must hold the same rows in one order")


# ------------------------------------------------------------------------------------------------ whole files
def _check_hash_rule(entries: Sequence[_Entry], name: str, cfg: DataConfig, out: SourceRows) -> None:
    """Take the rows of a file with mostly wrong hashes for right, in place: its hashes are of something else."""
    wrong = [entry for entry in entries if entry.fault == "wrong_hash"]
    sound = sum(entry.fault is None for entry in entries)
    if cfg.policy.wrong_hash == "error" or len(wrong) <= sound:
        return
    for entry in wrong:
        assert isinstance(entry.read, BadValue) and entry.read.row is not None
        entry.read = entry.read.row
    out.notes.append(
        f"{name}: {len(wrong):,} rows have hashes of something else than prompt + response; none was dropped."
    )


def _check_categories(entries: Sequence[_Entry], cfg: DataConfig) -> None:
    """Turn rows with a category that the taxonomy has not into bad records, in place."""
    if cfg.taxonomy == "open":
        return
    counts = Counter(n for entry in entries if not isinstance(entry.read, BadValue) for n in categories_of(entry.read))
    known = likely_taxonomy(counts) if cfg.taxonomy == "auto" else TAXONOMIES[cfg.taxonomy]
    if known is None or not set(counts) - set(known):
        return
    if not set(counts) & set(known):
        what = f"no harm category is one of taxonomy '{cfg.taxonomy}', the rows have '{next(iter(counts))[:60]}'"
        raise UserError(what, "data.taxonomy", "set data.taxonomy=auto, or data.taxonomy=open for names of your own")
    for entry in entries:
        if isinstance(entry.read, BadValue):
            continue
        unknown = sorted(set(categories_of(entry.read)) - set(known))
        if unknown:
            what = f"unknown harm category '{unknown[0][:60]}'"
            mend = "mend or remove the row, or set data.taxonomy=open"
            row = _without(entry.read, set(unknown))
            entry.read = BadValue("unknown_category", what, entry.place, mend, row=row)


def _without(row: Row, names: set[str]) -> Row:
    found = {column: getattr(row, column) or frozenset() for column in CATEGORY_COLUMNS[type(row)]}
    # where only unknown names were, the category is not known: an empty set would say that there is none
    left: dict[str, Any] = {column: value - names or None for column, value in found.items() if value & names}
    return replace(row, **left)


def _sort_out(entries: Sequence[_Entry], split: str, out: SourceRows) -> None:
    """Enter rows and bad records of a split, which know how many rows stand before them, and the places of both."""
    rows: list[Row] = []
    for entry in entries:
        row = entry.read
        if isinstance(row, BadValue):
            row.before = len(rows)
            out.bad.setdefault(split, []).append(row)
            if row.row is not None:
                _enter(row.row, entry, out)
        else:
            rows.append(row)
            out.lines.setdefault(split, []).append(entry.place)
            _enter(row, entry, out)
    setattr(out, split, rows)
    groups = [entry.group or "" for entry in entries if not isinstance(entry.read, BadValue)]
    if any(groups):
        out.line_groups[split] = groups


def _enter(row: Row, entry: _Entry, out: SourceRows) -> None:
    """Place and stratum of a row that may be kept; of one that stands twice those of the first."""
    out.places.setdefault(row.id, entry.place)
    if entry.group is not None:
        out.groups.setdefault(row.id, entry.group)
