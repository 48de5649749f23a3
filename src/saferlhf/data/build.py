"""Build: one call from the data config to checked, split rows with their report.

Order: read -> checks row by row -> prompts that train shares with held-out rows -> cut missing splits -> cap the
counts -> shuffle sides. Caps come after the checks, so that `train_rows=1000` is a thousand good rows where the file
has them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar, cast

from saferlhf.config.schema import DataConfig
from saferlhf.data.checks import RowChecker, check_policy, shuffle_sides
from saferlhf.data.columns import canonical_columns
from saferlhf.data.files import content_hash
from saferlhf.data.report import SPLITS, DataReport, label_balance, position_bias, word_lengths
from saferlhf.data.rows import PreferencePair, Row
from saferlhf.data.sources import Generate, SourceRows, data_files, load_source
from saferlhf.data.splits import split_by_prompt, take
from saferlhf.errors import UserError

_PROBE_ROWS = 32

RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class Splits(Generic[RowT]):
    """Checked rows of one data set.

    Attributes:
        train, val, test: canonical rows of one kind; ids are unique within a split.
        report: what was found and done.
        fingerprint: hash over ids and labels of all rows in order; equal wherever the data lie.
        licence: licence of the rows, for the model card.
    """

    train: list[RowT]
    val: list[RowT]
    test: list[RowT]
    report: DataReport
    fingerprint: str
    licence: str | None


def build_data(cfg: DataConfig, kind: type[RowT], needs: Sequence[str] = ()) -> Splits[RowT]:
    """Load, check, split and shuffle the rows of a data config.

    Args:
        kind: `PreferencePair`, `QuestionAnswer` or `PromptRow`.
        needs: canonical label columns the task cannot do without, as `("better_response_id",)`; rows that lack one are
            dropped and counted. For `QuestionAnswer` from the toy world, no needs means demonstrations.

    Raises:
        UserError: anything wrong with config, files, columns or values; labels that no row has; nothing left to
            train on.
    """
    check_policy(cfg.policy)
    report = DataReport(source=cfg.name, licence=cfg.licence)
    row_kind = cast(type[Row], kind)
    source = load_source(cfg, row_kind, needs)
    report.files = source.files
    given = {split: getattr(source, split) for split in SPLITS if getattr(source, split) is not None}
    for split, rows in given.items():
        report.read[split] = len(rows)
        _require_labels(rows, row_kind, needs, split, source, cfg)
        report.position[split] = position_bias(rows)
    checker = RowChecker(cfg.policy, report, source.places)
    checked = {split: checker.rows(rows, split, needs) for split, rows in given.items()}
    parts = _cut_splits(cfg, checker, checked)
    caps = {"train": cfg.train_rows, "val": cfg.val_rows, "test": cfg.test_rows}
    for split in SPLITS:
        rows = take(parts[split], caps[split], cfg.seed)
        parts[split] = shuffle_sides(rows, cfg.seed) if cfg.shuffle_sides else rows
        report.kept[split] = len(rows)
        if rows:
            report.labels[split] = label_balance(rows)
            report.lengths[split] = word_lengths(rows)
    if not parts["train"]:
        raise UserError("no rows left to train on", _where(cfg), _dropped(report))
    train, val, test = (cast(list[RowT], parts[split]) for split in SPLITS)
    return Splits(
        train=train,
        val=val,
        test=test,
        report=report,
        fingerprint=rows_fingerprint(train, val, test),
        licence=cfg.licence,
    )


def _cut_splits(cfg: DataConfig, checker: RowChecker, checked: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Train, val and test without a common prompt; splits the source has not are cut from train."""
    train, val, test = checked["train"], checked.get("val"), checked.get("test")
    if val is not None and test is not None:
        val = checker.overlap(val, "val", test)
    train = checker.overlap(train, "train", val or (), test or ())
    val_fraction = cfg.val_fraction if val is None else 0.0
    test_fraction = cfg.test_fraction if test is None else 0.0
    if train and val_fraction + test_fraction > 0:
        train, new_val, new_test = split_by_prompt(train, cfg.seed, val_fraction, test_fraction)
        val = new_val if val is None else val
        test = new_test if test is None else test
    return {"train": train, "val": val or [], "test": test or []}


def _require_labels(
    rows: Sequence[Row], kind: type[Row], needs: Sequence[str], split: str, source: SourceRows, cfg: DataConfig
) -> None:
    for name in needs:
        if any(getattr(row, name) is not None for row in rows):
            continue
        has = [n for n in canonical_columns(kind) if n not in _NO_LABELS]
        has = [n for n in has if any(getattr(row, n) is not None for row in rows)]
        where = ", ".join(source.files.get(split, ())) or _where(cfg)
        what = f"the task needs the column '{name}' and no {split} row has it"
        found = ", ".join(has) or "none"
        mend = f"it needs {', '.join(needs)}; labels found: {found}; map with data.columns.{name}=COLUMN"
        raise UserError(what, where, mend)


_NO_LABELS = ("prompt", "response", "response_0", "response_1", "chosen", "rejected")


def _where(cfg: DataConfig) -> str:
    return cfg.path or f"data={cfg.name}"


def _dropped(report: DataReport) -> str:
    counts = {kind: sum(f.dropped for f in by_split.values()) for kind, by_split in report.findings.items()}
    listed = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"dropped: {listed}; see data.policy" if listed else "the data are empty"


# ------------------------------------------------------------------------------------------------ fingerprints
def rows_fingerprint(*splits: Sequence[Row]) -> str:
    """16 hex digits over ids and labels of all rows, in order; the ids stand for the texts."""
    digest = hashlib.sha256()
    for rows in splits:
        digest.update(b"split\x00")
        names = [n for n in canonical_columns(type(rows[0])) if n not in _NO_LABELS] if rows else []
        for row in rows:
            digest.update(_line(row, names).encode())
    return digest.hexdigest()[:16]


def _line(row: Row, names: Sequence[str]) -> str:
    # a pair's id tells its two responses, its first response their order
    first = row.response_0 if isinstance(row, PreferencePair) else ""
    labels = [getattr(row, name) for name in names]
    plain = [sorted(value) if isinstance(value, frozenset) else value for value in labels]
    return f"{row.id}\x00{first}\x00{plain}\n"


def data_fingerprint(cfg: DataConfig) -> str:
    """16 hex digits for the run's identity, known before any row is loaded.

    Files enter by the hash of their bytes. Generated rows enter by the generator's vocabulary and a probe of its rows
    under the configured seed, so a changed generator makes a new run. Counts and policies are in the config.

    Raises:
        UserError: the files are not there.
    """
    if cfg.source == "file":
        files, test = data_files(cfg)
        parts = [content_hash(files.all(), files.root)] + ([content_hash(test.all(), test.root)] if test else [])
        return hashlib.sha256("\x00".join(["file", *parts]).encode()).hexdigest()[:16]
    from saferlhf.data import toyworld

    generators: tuple[Generate, ...] = (toyworld.preference_pairs, toyworld.demonstrations, toyworld.question_answers)
    probes = [list(generate(_PROBE_ROWS, split=split, seed=cfg.seed)) for generate in generators for split in SPLITS]
    words = "\x00".join(toyworld.vocabulary())
    return hashlib.sha256(f"{cfg.source}\x00{words}\x00{rows_fingerprint(*probes)}".encode()).hexdigest()[:16]
