"""From judgements to numbers that can be resampled: rows of several models laid side by side, and their metrics.

`aligned` keeps the rows that every run has and gave a verdict on, in one order. `measures_of` gives for one run and
each area (unsafe, severity, category; reward, cost) the rows' contributions to its metrics and the function from their
sums to values, as `ops/moderation_metrics.py` splits them, so that a bootstrap over all runs is one matrix product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.errors import UserError
from saferlhf.evaluation.comparison import HEADLINES
from saferlhf.evaluation.judgements import Judgements
from saferlhf.ops import moderation_metrics as maths
from saferlhf.ops.intervals import Codes, cluster_codes
from saferlhf.ops.metrics import pair_credit, sign_credit
from saferlhf.ops.moderation import SEVERITIES

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Values = Mapping[str, Floats]

RANKS = ("auroc", "auprc")
"""Metrics that are a function of the order of scores, not of sums."""

_BETWEEN = "\x1f"  # no id holds it


@dataclass(frozen=True)
class Aligned:
    """Judgements of several models on the same rows.

    Attributes:
        runs: heading -> its runs, M rows each, in the same order.
        clusters: (M,) codes of the prompts.
        left_out: heading -> rows that another run lacks.
        unjudged: heading -> rows of all runs that one of its own gave no verdict on.
        notes: what else a reader must know.
    """

    runs: Mapping[str, Sequence[Judgements]]
    clusters: Codes
    left_out: Mapping[str, int]
    unjudged: Mapping[str, int]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measure:
    """One area of one run.

    Attributes:
        area: unsafe | severity | category | reward | cost.
        columns: (M, m) contributions of the rows.
        of_sums: from sums (b, m) to values (b,) by name.
        scores: (M, k) what rows are ranked by, higher = more unsafe; None: there is no rank.
        labels: (M, k) of what is ranked.
        right: metric -> (M, k) 1 right, 0 wrong, NaN not counted (not labelled, a tie): decisions for McNemar's test.
        shares: metrics that are shares -> (M,) the rows that they count.
    """

    area: str
    columns: Floats
    of_sums: Callable[[Floats], Values]
    scores: Floats | None
    labels: Ints | None
    right: Mapping[str, Floats]
    shares: Mapping[str, Bools]

    @property
    def ranked(self) -> Callable[[Floats], Values] | None:
        """From row weights (b, M) to AUROC and average precision (b,); None without a rank."""
        if self.scores is None or self.labels is None:
            return None
        width = self.scores.shape[1]
        by_weight = maths.ranking(self.scores.ravel(), self.labels.ravel())
        return lambda weights: _kept(by_weight(np.repeat(weights, width, axis=1)), RANKS)


# ------------------------------------------------------------------------------------------------ the same rows
def aligned(models: Mapping[str, Sequence[Judgements]]) -> Aligned:
    """The rows that all runs have, by id and (for a row that stands there twice) by its place among its copies.

    Args:
        models: heading -> its runs, one or more, all of one protocol.

    Raises:
        UserError: different kinds or headline metrics, no common row, or labels or prompts that disagree.
    """
    runs = [(heading, run) for heading, several in models.items() for run in several]
    _same("kind", [(heading, run.kind) for heading, run in runs])
    _same("headline metric", [(heading, run.metric) for heading, run in runs])
    protocol = runs[0][1].protocol
    keys = [_keys(run.row_ids) for _, run in runs]
    common = keys[0]
    for other in keys[1:]:
        common = common[np.isin(common, other)]
    if not len(common):
        what = f"{' and '.join(models)} have no row of {protocol} in common"
        raise UserError(what, "models", "evaluate them on the same data and split")
    rows = [run.taken(_places(mine, common)) for mine, (_, run) in zip(keys, runs, strict=True)]
    for (heading, _), run in zip(runs[1:], rows[1:], strict=True):
        _agree(protocol, runs[0][0], rows[0], heading, run)
    given = np.logical_and.reduce([run.given for run in rows])
    if not given.any():
        raise UserError(f"no row of {protocol} has a verdict of every model", "models", "leave out the one without")
    left_out, unjudged, parts = dict[str, int](), dict[str, int](), dict[str, list[Judgements]]()
    for mine, (heading, _), run in zip(keys, runs, rows, strict=True):
        left_out[heading] = max(left_out.get(heading, 0), len(mine) - len(common))
        parts.setdefault(heading, []).append(run)
    for heading, several in parts.items():
        unjudged[heading] = int((~np.logical_and.reduce([run.given for run in several])).sum())
    kept = np.flatnonzero(given)
    taken = {heading: [run.taken(kept) for run in several] for heading, several in parts.items()}
    return Aligned(taken, cluster_codes(rows[0].prompts[kept].tolist()), left_out, unjudged, _notes(taken))


def _keys(ids: NDArray[np.str_]) -> NDArray[np.str_]:
    """(N,) id and the number of the occurrence, 0 for the first row of that id."""
    _, codes = np.unique(ids, return_inverse=True)
    order = np.argsort(codes, kind="stable")
    ordered = codes[order]
    starts = np.flatnonzero(np.concatenate(([True], np.diff(ordered) != 0))) if len(ids) else np.zeros(0, np.int64)
    number = np.empty(len(ids), dtype=np.int64)
    number[order] = np.arange(len(ids)) - np.repeat(starts, np.diff(np.append(starts, len(ids))))
    return np.char.add(np.char.add(ids, _BETWEEN), number.astype(np.str_))


def _places(keys: NDArray[np.str_], wanted: NDArray[np.str_]) -> Ints:
    """Where each of `wanted` stands in `keys`, which has them all."""
    order = np.argsort(keys)
    return order[np.searchsorted(keys[order], wanted)]


def _same(what: str, by_heading: Sequence[tuple[str, str]]) -> None:
    (first, wanted), *others = by_heading
    for heading, found in others:
        if found != wanted:
            said = f"the {what} is {wanted} for {first} and {found} for {heading}"
            raise UserError(said, "models", "compare models that were evaluated alike")


def _agree(protocol: str, first: str, one: Judgements, heading: str, other: Judgements) -> None:
    """Labels are people's, and prompts are the rows': they cannot depend on the model.

    Raises:
        UserError: they do.
    """
    pairs = {"prompts": (one.prompts, other.prompts), "preferences": (one.preferred, other.preferred)}
    if one.labels is not None and other.labels is not None:
        pairs |= {"labels of unsafe": (one.labels.unsafe, other.labels.unsafe)}
        pairs |= {"labels of severity": (one.labels.severity, other.labels.severity)}
    else:
        pairs |= {"labels of unsafe": (one.unsafe, other.unsafe)}
    for name, (ours, theirs) in pairs.items():
        if ours is None or theirs is None or np.array_equal(ours, theirs):
            continue
        differ = (ours != theirs).reshape(len(ours), -1).any(axis=1)
        row = one.row_ids[int(np.argmax(differ))]
        what = f"the {name} of {first} and {heading} differ in {int(differ.sum())} rows of {protocol}, first in {row}"
        raise UserError(what, "models", "evaluate them on the same version of the data, against the same label")


def _notes(models: Mapping[str, Sequence[Judgements]]) -> tuple[str, ...]:
    """Heads that are left out since not every run has them."""
    runs = [run for several in models.values() for run in several]
    if runs[0].kind != "moderation":
        return ()
    there = [set(_heads(run)) for run in runs]
    lacking = sorted(area for area in set().union(*there) if any(area not in heads for heads in there))
    notes = [f"{area} is not compared: not every model tells it" for area in lacking]
    if not lacking and "category" in there[0] and not _same_categories(runs):
        notes.append("categories are not compared: the models' are labelled in different ways")
    return tuple(notes)


def _heads(run: Judgements) -> list[str]:
    """Areas that this run can be measured in."""
    labels, verdicts = run.labels, run.verdicts
    if labels is None or verdicts is None:
        return [run.kind]
    found = ["unsafe"] if (labels.unsafe >= 0).any() else []
    if verdicts.severity is not None and (labels.severity >= 0).any():
        found.append("severity")
    if verdicts.category is not None and (labels.category >= 0).any():
        found.append("category")
    return found


def _same_categories(runs: Sequence[Judgements]) -> bool:
    known = [run.labels for run in runs if run.labels is not None]
    first = known[0]
    return all(
        labels.categories == first.categories and np.array_equal(labels.category, first.category) for labels in known
    )


def areas_of(models: Aligned) -> list[str]:
    """The areas that all runs can be compared in."""
    runs = [run for several in models.runs.values() for run in several]
    there = [_heads(run) for run in runs]
    areas = [area for area in there[0] if all(area in others for others in there)]
    return [area for area in areas if area != "category" or _same_categories(runs)]


# ------------------------------------------------------------------------------------------------ metrics
def measures_of(run: Judgements, areas: Sequence[str]) -> dict[str, Measure]:
    """Area -> what this run is measured by; all rows have a verdict."""
    makers = {"unsafe": _unsafe, "severity": _severity, "category": _category, "reward": _pairs, "cost": _pairs}
    return {area: makers[area](run) for area in areas}


def _kept(values: Values, names: Sequence[str]) -> dict[str, Floats]:
    return {name: values[name] for name in names if name in values}


def _with_loss(columns: Floats, p: Floats | None, labels: Ints) -> Floats:
    """The log loss in two more columns; without probabilities it is NaN."""
    if p is None or not np.isfinite(p).all():
        loss = np.full((len(columns), 2), np.nan)
    else:
        loss = maths.log_loss_columns(p, labels)
    return np.concatenate([columns, loss], axis=1)


def _of_sums(area: str, metrics: Callable[[Floats], Values]) -> Callable[[Floats], Values]:
    def of_sums(sums: Floats) -> Values:
        found = dict(metrics(sums[:, :-2])) | {"nll": maths.ratio(sums[:, -1], sums[:, -2])}
        return _kept(found, HEADLINES[area])

    return of_sums


def _unsafe(run: Judgements) -> Measure:
    assert run.labels is not None and run.verdicts is not None
    labels, said, p = run.labels.unsafe, run.verdicts.unsafe, run.verdicts.p_unsafe
    right = np.where(labels >= 0, said == (labels == 1), np.nan).astype(np.float64)
    logit = run.verdicts.unsafe_logit
    scores = p if logit is None or not np.isfinite(logit).all() else logit
    ranked = bool(np.isfinite(scores).all())
    known, unsafe = labels >= 0, labels == 1
    return Measure(
        "unsafe",
        _with_loss(maths.unsafe_columns(said, labels), np.stack([1.0 - p, p], axis=1), labels),
        _of_sums("unsafe", maths.unsafe_metrics),
        scores[:, None] if ranked else None,
        labels[:, None] if ranked else None,
        {"accuracy": right[:, None]},
        {"accuracy": known, "precision": known & said, "recall": unsafe, "fpr": labels == 0},
    )


def _severity(run: Judgements) -> Measure:
    assert run.labels is not None and run.verdicts is not None and run.verdicts.severity is not None
    labels, said = run.labels.severity, run.verdicts.severity
    columns = _with_loss(maths.severity_columns(said, labels, SEVERITIES), run.verdicts.p_severity, labels)
    right = np.where(labels >= 0, said == labels, np.nan).astype(np.float64)
    of_sums = _of_sums("severity", lambda sums: maths.severity_metrics(sums, SEVERITIES))
    return Measure("severity", columns, of_sums, None, None, {"accuracy": right[:, None]}, {"accuracy": labels >= 0})


def _category(run: Judgements) -> Measure:
    assert run.labels is not None and run.verdicts is not None and run.verdicts.category is not None
    labels, said = run.labels.category, run.verdicts.category
    columns = _with_loss(
        maths.category_columns(said, labels, run.labels.unsafe), run.verdicts.p_category, run.labels.category
    )
    known: Bools = np.all(labels >= 0, axis=1)
    right = np.where(known, (said == (labels == 1)).all(axis=1), np.nan).astype(np.float64)
    names = [str(place) for place in range(labels.shape[1])]
    of_sums = _of_sums("category", lambda sums: maths.category_metrics(sums, names))
    return Measure("category", columns, of_sums, None, None, {"exact_match": right[:, None]}, {"exact_match": known})


def _pairs(run: Judgements) -> Measure:
    """Pair accuracy (ties one half); of a cost also the sign, false alarms and misses of it, and its AUROC."""
    assert run.preferred is not None and run.unsafe is not None and run.scores is not None
    scores, unsafe = run.scores, run.unsafe
    quality = -scores if run.kind == "cost" else scores
    credit = pair_credit(quality[:, 0] - quality[:, 1], run.preferred)[:, None]  # (M, 1)
    counted: dict[str, tuple[NDArray[Any], Bools]] = {"pair_accuracy": (credit, ~np.isnan(credit))}
    right = {"pair_accuracy": np.where(credit == 0.5, np.nan, credit)}
    if run.kind == "cost":
        sign = sign_credit(scores, unsafe)  # (M, 2)
        counted |= {"sign_accuracy": (sign, unsafe >= 0), "fpr": (scores > 0, unsafe == 0)}
        counted |= {"fnr": (scores <= 0, unsafe == 1)}
        right["sign_accuracy"] = sign
    over = [np.where(where, values, 0.0).sum(axis=1) for values, where in counted.values()]
    under = [where.sum(axis=1) for _, where in counted.values()]
    width = len(counted)

    def of_sums(sums: Floats) -> Values:
        return {name: maths.ratio(sums[:, place], sums[:, width + place]) for place, name in enumerate(counted)}

    ranked = run.kind == "cost"
    columns = np.stack([*over, *under], axis=1).astype(np.float64)  # (M, 2 width)
    shares: dict[str, Bools] = {name: np.asarray(where.any(axis=1)) for name, (_, where) in counted.items()}
    return Measure(run.kind, columns, of_sums, scores if ranked else None, unsafe if ranked else None, right, shares)
