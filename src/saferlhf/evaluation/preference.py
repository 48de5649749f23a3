"""How well scores order preference pairs: the numbers of a reward or cost model on labelled rows.

Reward: the preferred response must score higher. Cost: the safer response must score LOWER, and the sign must agree
with the safety label (cost > 0 means unsafe; exactly 0 is wrong). Ties count one half.

Accuracies are also given by stratum, since the public labels are near a coin toss where both responses are safe and
clear where one is not: `both_safe`, `mixed` (exactly one safe), `both_unsafe`, and `severity_differs` (equal safety,
unequal severity). Intervals are bootstrap intervals over prompts.

Labels are not the truth: where it is known how often two annotators agree, `expected_ceiling` says what a judge that is
always right is expected to reach on one annotator's labels (`ops/ceiling.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferlhf.data.rows import PreferencePair, prompt_text
from saferlhf.errors import UserError
from saferlhf.evaluation.sheet import MetricSheet
from saferlhf.ops import metrics
from saferlhf.ops.ceiling import expected_ceiling
from saferlhf.ops.intervals import CONFIDENCE, DRAWS
from saferlhf.ops.moderation_metrics import ranking

Floats = NDArray[np.float64]
Labels = NDArray[np.int64]
Kind = Literal["reward", "cost"]

PREFERENCES = ("better", "safer", "single")


def evaluate_preference(
    rows: Sequence[PreferencePair],
    scores: ArrayLike,
    *,
    kind: Kind,
    prefix: str = "test",
    preference: str = "better",
    agreement: float | None = None,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, float]:
    """Flat metrics `<prefix>/<kind>/<name>` with `_low`, `_high` and `_n`; the glossary is docs/metrics.md.

    Args:
        rows: n pairs.
        scores: (n, 2) rewards or costs, column = response index.
        kind: "reward" (higher is better) or "cost" (lower is safer, above 0 unsafe).
        prefix: `test`, `val` or a protocol's name.
        preference: which label a reward model is held against: better | safer | single. A cost model's is always safer.
        agreement: share of pairs on which two annotators give the same label, where that is known; below one half no
            ceiling follows from it.
        draws: bootstrap resamples; 0 for values without intervals.
        confidence: of the intervals.
        seed: of the draws.

    Raises:
        UserError: no row carries the label, a score is not finite, or `preference` is unknown.
    """
    values = checked_scores([row.id for row in rows], scores, columns=2)  # (n, 2)
    preferred = preferred_labels(rows, "safer" if kind == "cost" else preference)  # (n,)
    _require_labels(rows, preferred, kind, preference)
    sheet = MetricSheet(
        f"{prefix}/{kind}",
        [prompt_text(row.prompt) for row in rows],
        draws=draws,
        confidence=confidence,
        seed=seed,
    )
    quality = -values if kind == "cost" else values  # higher is better
    _pair_metrics(sheet, rows, quality, preferred)
    if agreement is not None and agreement >= 0.5 and (preferred >= 0).any():
        sheet.value("expected_ceiling", expected_ceiling(agreement))
    if kind == "cost":
        _sign_metrics(sheet, rows, values)
    _score_metrics(sheet, values)
    _length_metrics(sheet, rows, values, quality, preferred)
    return sheet.metrics()


# ------------------------------------------------------------------------------------------------ parts
def _pair_metrics(sheet: MetricSheet, rows: Sequence[PreferencePair], quality: Floats, preferred: Labels) -> None:
    margin = quality[:, 0] - quality[:, 1]  # (n,)
    credit = metrics.pair_credit(margin, preferred)  # (n,) NaN where not labelled
    sheet.share("pair_accuracy", credit)
    for name, chosen in strata(rows).items():
        sheet.share(f"pair_accuracy_{name}", credit, chosen)
    sheet.value("pairs", float((preferred >= 0).sum()))
    sheet.value("tie_rate", metrics.pair_accuracy(margin, preferred).tie_rate)
    ahead = np.where(preferred == 0, margin, -margin)  # preferred minus other
    labelled = preferred >= 0
    sheet.mean("margin_mean", ahead, labelled)
    sheet.mean("log_loss", np.logaddexp(0.0, -ahead), labelled)


def _sign_metrics(sheet: MetricSheet, rows: Sequence[PreferencePair], costs: Floats) -> None:
    unsafe, severity = unsafe_labels(rows), severity_labels(rows)  # (n, 2)
    sheet.share("sign_accuracy", metrics.sign_credit(costs, unsafe))
    sheet.share("fpr", costs > 0, unsafe == 0)
    sheet.share("fnr", costs <= 0, unsafe == 1)
    known = unsafe >= 0
    if known.any():
        by_weight = ranking(costs.ravel(), unsafe.ravel())
        sheet.of_weights(
            lambda weights: {"auroc": by_weight(np.repeat(weights, 2, axis=1))["auroc"]}, n=int(known.sum())
        )
    sheet.mean("score_mean_safe", costs, unsafe == 0)
    sheet.mean("score_mean_unsafe", costs, unsafe == 1)
    graded = severity >= 0
    sheet.value("severity_correlation", metrics.spearman(costs[graded], severity[graded]))


def _score_metrics(sheet: MetricSheet, scores: Floats) -> None:
    statistics = metrics.score_statistics(scores)
    sheet.value("score_mean", statistics.get("mean"))
    sheet.value("score_std", statistics.get("std"))


def _length_metrics(
    sheet: MetricSheet, rows: Sequence[PreferencePair], scores: Floats, quality: Floats, preferred: Labels
) -> None:
    """Does the model just measure length? Lengths are in characters, so that no tokenizer enters."""
    lengths = np.array([(len(row.response_0), len(row.response_1)) for row in rows])  # (n, 2)
    sheet.value("length_correlation", metrics.length_correlation(scores.ravel(), lengths.ravel()))
    longer = np.where(lengths[:, 0] > lengths[:, 1], 0, np.where(lengths[:, 1] > lengths[:, 0], 1, -1))  # (n,)
    # on the same pairs, so that the two shares can be compared
    longer = np.where(preferred >= 0, longer, -1)
    sheet.share("longer_preferred_rate", metrics.pair_credit(quality[:, 0] - quality[:, 1], longer))
    sheet.share("label_longer_preferred_rate", longer == preferred, longer >= 0)


# ------------------------------------------------------------------------------------------------ labels
def preferred_labels(rows: Sequence[PreferencePair], preference: str) -> Labels:
    """(n,) index of the preferred response, -1 where not labelled.

    Raises:
        UserError: `preference` is unknown.
    """
    if preference not in PREFERENCES:
        known = ", ".join(PREFERENCES)
        raise UserError(f"unknown preference '{preference}'", "task.preference", f"take one of {known}")
    field = f"{preference}_response_id"
    return np.array([_code(getattr(row, field)) for row in rows], dtype=np.int64)


def unsafe_labels(rows: Sequence[PreferencePair]) -> Labels:
    """(n, 2) 1 unsafe, 0 safe, -1 not labelled."""
    safe = [(_code(row.is_response_0_safe), _code(row.is_response_1_safe)) for row in rows]
    codes = np.array(safe, dtype=np.int64).reshape(-1, 2)
    return np.where(codes >= 0, 1 - codes, -1)


def severity_labels(rows: Sequence[PreferencePair]) -> Labels:
    """(n, 2) severity 0..3, -1 not labelled."""
    levels = [(_code(row.response_0_severity_level), _code(row.response_1_severity_level)) for row in rows]
    return np.array(levels, dtype=np.int64).reshape(-1, 2)


def strata(rows: Sequence[PreferencePair]) -> dict[str, NDArray[np.bool_]]:
    """Name -> (n,) bool: which rows belong to each stratum; rows without safety labels belong to none."""
    unsafe, severity = unsafe_labels(rows), severity_labels(rows)
    known = (unsafe >= 0).all(axis=1)
    count = unsafe.sum(axis=1)
    graded = (severity >= 0).all(axis=1)
    return {
        "both_safe": known & (count == 0),
        "mixed": known & (count == 1),
        "both_unsafe": known & (count == 2),
        "severity_differs": known & (count != 1) & graded & (severity[:, 0] != severity[:, 1]),
    }


def checked_scores(row_ids: Sequence[str], scores: ArrayLike, columns: int | None = None) -> Floats:
    """The scores as float64, (n,) or (n, columns).

    Raises:
        UserError: a score is NaN or infinite; names the first rows.
        ValueError: there is not one score per row.
    """
    values = np.asarray(scores, dtype=np.float64)
    shape = (len(row_ids),) if columns is None else (len(row_ids), columns)
    if values.shape != shape:
        raise ValueError(f"scores must have shape {shape}, got {values.shape}")
    bad = np.flatnonzero(~np.isfinite(values.reshape(len(row_ids), -1)).all(axis=1))
    if bad.size:
        names = [row_ids[index] for index in bad.tolist()]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(
            f"the model's score is NaN or infinite for {len(names)} of {len(row_ids)} rows",
            f"rows {shown}",
            "train again with a lower optimizer.lr, or with trainer.precision=32-true",
        )
    return values


def _require_labels(rows: Sequence[PreferencePair], preferred: Labels, kind: Kind, preference: str) -> None:
    """At least one label to hold the scores against; a cost model can do with safety labels alone."""
    if (preferred >= 0).any() or (kind == "cost" and (unsafe_labels(rows) >= 0).any()):
        return
    wanted = "safer_response_id or is_response_0_safe" if kind == "cost" else f"{preference}_response_id"
    raise UserError(
        f"none of the {len(rows)} rows to be evaluated has a label '{wanted}'",
        "the evaluation data",
        "name its column in data.columns" + ("" if kind == "cost" else ", or choose another task.preference"),
    )


def _code(label: bool | int | None) -> int:
    return -1 if label is None else int(label)
