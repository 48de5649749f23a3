"""Mix: several data sets as one.

Splits stay what they are in each part; a test split of any part is the test split of the mixture, and prompts of it are
kept out of the training rows of every part. How much of a part is trained on is settled after the checks, so that a
count is a count of good rows: `rows` takes at most so many, `share` makes the part that share of all training rows.
With fixed parts of F rows together and shares that sum to S, the whole has F / (1 - S) rows; without fixed parts it is
as large as the smallest part allows. Which rows are taken depends on `data.seed` and the row alone.

Taxonomies are never merged: a row of PKU-SafeRLHF that has none of the 14 categories of BeaverTails was never asked for
them. The mixture's taxonomy is `data.taxonomy`, with `auto` that of the first part with labelled training rows; rows of
a part with other names lose their categories and keep the rest, and the report says so. `open` leaves all as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from saferlhf.config.data_parts import DataPartConfig, part_configs
from saferlhf.config.schema import DataConfig
from saferlhf.data.report import SPLITS
from saferlhf.data.rows import Row, categories_of, without_categories
from saferlhf.data.sources.base import SourceRows
from saferlhf.data.splits import take
from saferlhf.data.taxonomy import TAXONOMIES, taxonomy_of
from saferlhf.errors import UserError


def mix_rows(cfg: DataConfig, load: Callable[[DataConfig], SourceRows]) -> SourceRows:
    """The rows of all parts, one after the other.

    Args:
        cfg: with settled `parts`.
        load: reads one part.

    Raises:
        UserError: no parts, or what a part's own source raises.
    """
    parts = part_configs(cfg)
    if not parts:
        mend = "as 'data.parts={pku_saferlhf: {}, hh_rlhf: {rows: 1000}}'"
        raise UserError("a mixture without parts", "data.parts", mend)
    out = SourceRows(train=[])
    revisions = []
    loaded = {label: load(part) for label, part in parts.items()}
    _one_taxonomy(cfg, loaded, out.notes)
    for label, found in loaded.items():
        for split in SPLITS:
            rows: list[Row] | None = getattr(found, split)
            if rows is not None:
                _append(out, found, split, rows)
                for row in rows:
                    out.part_of.setdefault(row.id, label)
            if split in found.files:
                out.files.setdefault(split, []).extend(f"{label}: {name}" for name in found.files[split])
            for name, count in found.hash_rule.get(split, {}).items():
                counts = out.hash_rule.setdefault(split, {})
                counts[name] = counts.get(name, 0) + count
        for mended in (value.row for values in found.bad.values() for value in values):
            if mended is not None:
                out.part_of.setdefault(mended.id, label)
        out.places = {**found.places, **out.places}
        out.groups = {**found.groups, **out.groups}
        out.facts += [replace(fact, name=f"{label}: {fact.name}") for fact in found.facts]
        revisions += [found.revision] if found.revision else []
    out.revision = ", ".join(revisions) or None
    return out


def _one_taxonomy(cfg: DataConfig, loaded: Mapping[str, SourceRows], notes: list[str]) -> None:
    """Take the categories from rows of parts that name them otherwise than the mixture does, in place."""
    if cfg.taxonomy == "open":
        return
    names = {label: {name for row in _all(found) for name in categories_of(row)} for label, found in loaded.items()}
    first = next((label for label, found in loaded.items() if found.train and names[label]), None)
    if cfg.taxonomy != "auto":
        ours = set(TAXONOMIES[cfg.taxonomy])
    elif first is not None:
        ours = set(taxonomy_of(names[first]))
    else:
        return
    for label, found in loaded.items():
        if names[label] and not names[label] & ours:
            for split in SPLITS:
                rows: list[Row] | None = getattr(found, split)
                if rows is not None:
                    setattr(found, split, [without_categories(row) for row in rows])
            for value in (value for values in found.bad.values() for value in values):
                value.row = None if value.row is None else without_categories(value.row)
            notes.append(f"{label}: its harm categories are of another taxonomy and were left out.")


def _all(found: SourceRows) -> list[Row]:
    return [*found.train, *(found.val or ()), *(found.test or ())]


def _append(out: SourceRows, found: SourceRows, split: str, rows: Sequence[Row]) -> None:
    before: list[Row] = getattr(out, split) or []
    for value in found.bad.get(split, ()):
        value.before = len(before) + (value.before or 0)
        out.bad.setdefault(split, []).append(value)
    out.lines.setdefault(split, []).extend(found.lines.get(split) or [""] * len(rows))
    out.line_groups.setdefault(split, []).extend(found.line_groups.get(split) or [""] * len(rows))
    setattr(out, split, [*before, *rows])


def draw(cfg: DataConfig, rows: Sequence[Row], part_of: Mapping[str, str]) -> list[Row]:
    """The training rows that counts and shares leave, in their order.

    Args:
        cfg: with settled `parts`.
        rows: checked training rows of all parts.
        part_of: row id -> part.

    Raises:
        UserError: a share that a part is too small for, or shares that leave nothing for the others.
    """
    parts = part_configs(cfg)
    # a duplicate that was kept has a number after its id
    of = [part_of.get(row.id) or part_of[row.id.rpartition("-")[0]] for row in rows]
    there = {label: of.count(label) for label in parts}
    wanted = _counts(parts, there)
    kept: set[str] = set()
    for label, count in wanted.items():
        own = [row for row, part in zip(rows, of, strict=True) if part == label]
        kept |= {row.id for row in take(own, count, cfg.seed)}
    return [row for row in rows if row.id in kept]


def _counts(parts: Mapping[str, DataPartConfig], there: Mapping[str, int]) -> dict[str, int]:
    """Training rows to take of each part."""
    shares = {label: part.share for label, part in parts.items() if part.share is not None}
    fixed = {
        label: there[label] if part.rows is None else min(part.rows, there[label])
        for label, part in parts.items()
        if label not in shares
    }
    if not shares:
        return fixed
    total = sum(shares.values())
    if fixed:
        if total >= 1:
            mend = f"together below 1, or a share for {', '.join(fixed)} too"
            raise UserError(f"shares sum to {total:g} and leave nothing for {', '.join(fixed)}", "data.parts", mend)
        whole = sum(fixed.values()) / (1 - total)
    else:
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise UserError(f"shares sum to {total:g}", "data.parts", "make them sum to 1, or give one part by rows")
        whole = min(there[label] / share for label, share in shares.items())
    out = dict(fixed)
    for label, share in shares.items():
        # the small number keeps an exact product from being rounded down
        count = math.floor(whole * share + 1e-6)
        if count > there[label]:
            what = f"a share of {share:g} is {count:,} rows and {label} has {there[label]:,}"
            raise UserError(what, f"data.parts.{label}.share", "lower it, or give the other parts fewer rows")
        out[label] = count
    return out
