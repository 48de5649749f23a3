"""Build: one call from the data config to checked, split rows with their report.

Order: read -> checks row by row, held-out rows first, since train rows must not share a prompt with them -> pairs taken
apart where answers or prompts are wanted -> counts and shares of a mixture -> cut missing splits -> near copies of
held-out prompts -> cap the counts -> shuffle sides. Caps come after the checks, so that `train_rows=1000` is a thousand
good rows where the file has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar, cast

from saferlhf.config.data_parts import OF_THE_MIX, part_configs
from saferlhf.config.identity import identity_tree
from saferlhf.config.schema import DataConfig
from saferlhf.data.checks import RowChecker, check_policy, shuffle_sides
from saferlhf.data.columns import canonical_columns
from saferlhf.data.melt import as_kind
from saferlhf.data.report import SPLITS, DataReport, position_bias
from saferlhf.data.rows import PreferencePair, Row, label_columns
from saferlhf.data.sources import Generate, SourceRows, load_source, locate
from saferlhf.data.sources.mix import draw
from saferlhf.data.splits import prompt_keys, split_by_prompt, take
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
        groups: row id -> the stratum that numbers are broken down by (language, topic, function, answering model), of
            the rows that have one.
    """

    train: list[RowT]
    val: list[RowT]
    test: list[RowT]
    report: DataReport
    fingerprint: str
    licence: str | None
    groups: dict[str, str] = field(default_factory=dict)


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
    report = DataReport(source=cfg.name, licence=cfg.licence, policy=asdict(cfg.policy))
    row_kind = cast(type[Row], kind)
    source = load_source(cfg, row_kind, needs)
    report.files, report.places, report.facts = source.files, source.places, source.facts
    report.revision, report.hash_rule, report.notes = source.revision, source.hash_rule, source.notes
    given = {split: getattr(source, split) for split in SPLITS if getattr(source, split) is not None}
    for split, rows in given.items():
        report.read[split] = len(rows) + len(source.bad.get(split, ()))
        _require_labels(rows, needs, split, source, cfg)
        report.position[split] = position_bias(rows)
    checker = RowChecker(cfg.policy, report, source.places)
    checked: dict[str, list[Row]] = {}
    held_out: dict[str, set[str]] = {}
    for split in ("test", "val", "train"):
        if split in given:
            bad, lines = source.bad.get(split, ()), source.lines.get(split, ())
            groups = source.line_groups.get(split, ())
            checked[split] = checker.rows(given[split], split, needs, bad, held_out, lines, groups)
            held_out[split] = prompt_keys(checked[split])
    checker.raise_first()
    source.groups |= checker.groups
    wanted = {split: _as_wanted(rows, row_kind, split, source, cfg, report) for split, rows in checked.items()}
    if cfg.source == "mix":
        wanted["train"] = draw(cfg, wanted["train"], source.part_of)
    parts = _cut_splits(cfg, wanted)
    parts["val"] = checker.near(parts["val"], "val", prompt_keys(parts["test"]))
    parts["train"] = checker.near(parts["train"], "train", prompt_keys(parts["val"], parts["test"]))
    checker.raise_first()
    caps = {"train": cfg.train_rows, "val": cfg.val_rows, "test": cfg.test_rows}
    for split in SPLITS:
        rows = take(parts[split], caps[split], cfg.seed)
        parts[split] = shuffle_sides(rows, cfg.seed) if cfg.shuffle_sides else rows
        report.describe(split, rows)
    if not parts["train"] and cfg.split in (None, "train"):
        raise UserError("no rows left to train on", _where(cfg), _dropped(report))
    train, val, test = (cast(list[RowT], parts[split]) for split in SPLITS)
    return Splits(
        train=train,
        val=val,
        test=test,
        report=report,
        fingerprint=rows_fingerprint(train, val, test),
        licence=cfg.licence,
        groups={row.id: source.groups[row.id] for row in (*train, *val, *test) if row.id in source.groups},
    )


def _cut_splits(cfg: DataConfig, checked: dict[str, list[Row]]) -> dict[str, list[Row]]:
    """Train, val and test without a common prompt; splits the source has not are cut from train."""
    train, val, test = checked["train"], checked.get("val"), checked.get("test")
    val_fraction = cfg.val_fraction if val is None else 0.0
    test_fraction = cfg.test_fraction if test is None else 0.0
    if train and val_fraction + test_fraction > 0:
        train, new_val, new_test = split_by_prompt(train, cfg.seed, val_fraction, test_fraction)
        val = new_val if val is None else val
        test = new_test if test is None else test
    return {"train": train, "val": val or [], "test": test or []}


def _as_wanted(
    rows: Sequence[Row], kind: type[Row], split: str, source: SourceRows, cfg: DataConfig, report: DataReport
) -> list[Row]:
    """Checked rows of a split as the task wants them; rows taken out of others keep place, part and stratum."""
    melted, counts = as_kind(rows, kind, cfg.answers)
    if counts.total():
        report.melted[split] = {name: counts[name] for name in ("made", "repeated", "other_labels")}
    for row, origin in melted:
        for known in (source.places, source.part_of, source.groups):
            if row.id not in known and origin in known:
                known[row.id] = known[origin]
    return [row for row, _ in melted]


def _require_labels(rows: Sequence[Row], needs: Sequence[str], split: str, source: SourceRows, cfg: DataConfig) -> None:
    kinds = {type(row) for row in rows}
    for name in needs if rows else ():
        if any(all(getattr(row, n) is not None for n in label_columns(type(row), (name,))) for row in rows):
            continue
        labels = dict.fromkeys(n for kind in kinds for n in canonical_columns(kind) if n not in _NO_LABELS)
        has = [n for n in labels if any(getattr(row, n, None) is not None for row in rows)]
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

    Files enter by the hash of their bytes, parts of a mixture by their fingerprints and keys. Generated rows enter by
    the generator's vocabulary and a probe of its rows under the configured seed, so a changed generator makes a new
    run. Counts and policies are in the config.

    Raises:
        UserError: the files are not there.
    """
    if cfg.source == "file":
        return hashlib.sha256("\x00".join(["file", *locate(cfg).content()]).encode()).hexdigest()[:16]
    if cfg.source == "mix":
        mixed = {label: (data_fingerprint(part), _keys(part)) for label, part in part_configs(cfg).items()}
        return hashlib.sha256(json.dumps(["mix", *mixed.items()], sort_keys=True).encode()).hexdigest()[:16]
    from saferlhf.data import toyworld

    # who labels them is in the config
    generators: tuple[Generate, ...] = (toyworld.preference_pairs, toyworld.demonstrations, toyworld.question_answers)
    probes = [list(generate(_PROBE_ROWS, split=split, seed=cfg.seed)) for generate in generators for split in SPLITS]
    words = "\x00".join(toyworld.vocabulary())
    return hashlib.sha256(f"{cfg.source}\x00{words}\x00{rows_fingerprint(*probes)}".encode()).hexdigest()[:16]


def _keys(part: DataConfig) -> dict[str, Any]:
    """What of a part's keys makes its rows: not where its files lie, and not what holds for the whole mixture."""
    tree = identity_tree(part, lambda key, value: "by fingerprint")
    return {key: value for key, value in tree.items() if key not in (*OF_THE_MIX, "licence")}
