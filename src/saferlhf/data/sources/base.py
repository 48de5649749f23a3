"""What a source gives: rows by split, the records that could not become one, and where all of them came from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from saferlhf.config.schema import DataConfig
from saferlhf.data.columns import BadValue
from saferlhf.data.report import FileFacts
from saferlhf.data.rows import Row


@dataclass
class SourceRows:
    """Rows as a source has them; a split that is None has to be cut from `train`.

    Attributes:
        places: row id -> place, for messages; empty for generated rows.
        lines: split -> place of each row, in order: a row that stands twice has two places.
        files: data files by split, for the report.
        bad: split -> records that could not become a row, in file order.
        facts: the same files with their hashes and records.
        hash_rule: split -> hashes `checked` and `wrong`, where the files have some.
        revision: commit of a data set from the hub.
        notes: what else was done to the rows, a sentence each.
        part_of: row id -> the part of a mixture it came from; empty otherwise.
        groups: row id -> its stratum; of a row that stands more than once the first one that it stands in.
        line_groups: split -> stratum of each row, in order, "" for none; empty where no row has one.
    """

    train: list[Row]
    val: list[Row] | None = None
    test: list[Row] | None = None
    places: dict[str, str] = field(default_factory=dict)
    lines: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    bad: dict[str, list[BadValue]] = field(default_factory=dict)
    facts: list[FileFacts] = field(default_factory=list)
    hash_rule: dict[str, dict[str, int]] = field(default_factory=dict)
    revision: str | None = None
    notes: list[str] = field(default_factory=list)
    part_of: dict[str, str] = field(default_factory=dict)
    groups: dict[str, str] = field(default_factory=dict)
    line_groups: dict[str, list[str]] = field(default_factory=dict)


Source = Callable[[DataConfig, type[Row], Sequence[str]], SourceRows]
