"""Sources: where canonical rows come from. Nothing downstream knows which one it was.

`toyworld` generates rows and splits them by prompt itself; `file` reads JSON lines, JSON, CSV or Parquet by a column
mapping. A new source is a function `(cfg, kind, needs) -> SourceRows` entered in `SOURCES`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from saferlhf.config.schema import DataConfig
from saferlhf.data.columns import choose_columns
from saferlhf.data.files import FileSet, Record, find_files, read_records, resolve_path
from saferlhf.data.rows import PreferencePair, QuestionAnswer, Row
from saferlhf.errors import UserError

TOY_ROWS = {"train": 24_000, "val": 500, "test": 2_000}
"""Rows generated when the config leaves a count open."""

_SAMPLE = 100  # records that settle a file's columns


@dataclass
class SourceRows:
    """Rows as a source has them; a split that is None has to be cut from `train`.

    Attributes:
        places: row id -> place, for messages; empty for generated rows.
        files: data files by split, for the report.
    """

    train: list[Row]
    val: list[Row] | None = None
    test: list[Row] | None = None
    places: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)


Source = Callable[[DataConfig, type[Row], Sequence[str]], SourceRows]


class Generate(Protocol):
    """A generator of toy rows."""

    def __call__(self, n: int, split: str, seed: int) -> Sequence[Row]:
        """`n` rows of a split."""
        ...


def load_source(cfg: DataConfig, kind: type[Row], needs: Sequence[str]) -> SourceRows:
    """Read or generate the rows of a data config.

    Args:
        kind: the record type wanted.
        needs: canonical label columns the task cannot do without.

    Raises:
        UserError: unknown source, unreadable or empty file, wrong schema, a value of the wrong type.
    """
    if cfg.source not in SOURCES:
        raise UserError(f"unknown source '{cfg.source}'", "data.source", f"known are {', '.join(SOURCES)}")
    return SOURCES[cfg.source](cfg, kind, needs)


def toyworld_rows(cfg: DataConfig, kind: type[Row], needs: Sequence[str]) -> SourceRows:
    """Generated rows. Answers are demonstrations unless labels are needed."""
    from saferlhf.data import toyworld

    generate: Generate
    if kind is PreferencePair:
        generate = toyworld.preference_pairs
    elif kind is QuestionAnswer:
        generate = toyworld.question_answers if needs else toyworld.demonstrations
    else:
        generate = toyworld.prompts
    rows: dict[str, list[Row]] = {
        split: list(generate(TOY_ROWS[split] if count is None else count, split=split, seed=cfg.seed))
        for split, count in (("train", cfg.train_rows), ("val", cfg.val_rows), ("test", cfg.test_rows))
    }
    return SourceRows(train=rows["train"], val=rows["val"], test=rows["test"])


def data_files(cfg: DataConfig) -> tuple[FileSet, FileSet | None]:
    """The files of `path`, and those of `test_path` where it is given (which then are all test files).

    Raises:
        UserError: no path, nothing there, or two answers to what the test files are.
    """
    if cfg.path is None:
        raise UserError("no data file given", "data.path", "give one as data.path=FILE_OR_FOLDER")
    files = find_files(resolve_path(cfg.path, cfg.root, "data.path"), "data.path")
    if cfg.test_path is None:
        return files, None
    if files.test:
        what = f"the folder {files.root} has test files of its own ({files.test[0].name})"
        raise UserError(what, "data.test_path", "leave data.test_path out, or name the training file in data.path")
    test = find_files(resolve_path(cfg.test_path, cfg.root, "data.test_path"), "data.test_path")
    return files, FileSet(test.root, test=test.test or test.all())


def file_rows(cfg: DataConfig, kind: type[Row], needs: Sequence[str]) -> SourceRows:
    """Rows of the user's files."""
    files, test = data_files(cfg)
    by_split = {"train": files.train, "val": files.val, "test": files.test if test is None else test.test}
    out = SourceRows(train=[])
    for split, paths in by_split.items():
        if not paths:
            continue
        rows = [row for path in paths for row in _read_rows(path, cfg, kind, out.places)]
        if not rows:
            raise UserError("no rows", ", ".join(map(str, paths)), "the file is empty")
        setattr(out, split, rows)
        out.files[split] = [path.name for path in paths]
    return out


def _read_rows(path: Path, cfg: DataConfig, kind: type[Row], places: dict[str, str]) -> list[Row]:
    records = read_records(path)
    sample: list[Record] = list(itertools.islice(records, _SAMPLE))
    if not sample:
        return []
    columns = choose_columns(kind, cfg.columns, sample)
    rows = []
    for record in itertools.chain(sample, records):
        row = columns.row(record)
        places.setdefault(row.id, record.place)
        rows.append(row)
    return rows


SOURCES: dict[str, Source] = {"toyworld": toyworld_rows, "file": file_rows}
