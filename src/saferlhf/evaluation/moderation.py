"""How good verdicts on single answers are: unsafe, severity and harm categories against their labels.

Decisions and probabilities come from the verdicts (calibrated, decoded consistently), ranks and the numbers "before
calibration" (`*_raw`) from the logits. All intervals are bootstrap intervals over prompts, from one set of draws. What
is not labelled, or has no head, is left out. The maths is in `ops/moderation_metrics.py`, the glossary in
docs/metrics.md.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.errors import UserError
from saferlhf.evaluation.preference import checked_scores
from saferlhf.evaluation.sheet import MetricSheet
from saferlhf.ops import moderation_metrics as maths
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.ops.intervals import CONFIDENCE, DRAWS
from saferlhf.ops.moderation import SEVERITIES, ModerationLabels, ModerationLogits, Verdicts

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_UNSAFE_SHARES = ("accuracy", "precision", "recall", "fpr", "fnr", "predicted_rate", "prevalence")
_SEVERITY_SHARES = (
    "accuracy",
    *(f"recall_{level}" for level in range(SEVERITIES)),
    f"undercalled_{SEVERITIES - 1}",
    "unsafe_called_safe",
)


def evaluate_moderation(
    row_ids: Sequence[str],
    labels: ModerationLabels,
    logits: ModerationLogits | None,
    verdicts: Verdicts,
    *,
    clusters: Sequence[str] | None = None,
    prefix: str = "test",
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, float]:
    """Flat metrics `<prefix>/{unsafe,severity,category}/<name>` with `_low`, `_high` and `_n`.

    Args:
        row_ids: N, to name rows whose logits are not finite.
        labels: of N rows; `categories` in the order of the verdicts' columns.
        logits: of N rows, before temperature; None: only probabilities are known, and no `*_raw` are given.
        verdicts: of N rows.
        clusters: N prompts, rows of one prompt are resampled together; None: every row by itself.
        prefix: `test`, `val` or a protocol's name.
        draws: bootstrap resamples; 0 for values without intervals.
        confidence: of the intervals.
        seed: of the draws.

    Raises:
        UserError: a logit is not finite, or nothing is labelled.
        ValueError: the parts differ in length, or in their number of categories.
    """
    _check(row_ids, labels, logits, verdicts)
    keys = list(row_ids if clusters is None else clusters)
    options: dict[str, Any] = {"draws": draws, "confidence": confidence, "seed": seed}
    raw = None if logits is None else decide(logits, Calibration.default(labels.categories[: _width(logits)]))
    found: dict[str, float] = {}
    if (labels.unsafe >= 0).any():
        sheet = MetricSheet(f"{prefix}/unsafe", keys, **options)
        scores = verdicts.p_unsafe if verdicts.unsafe_logit is None else verdicts.unsafe_logit
        _unsafe(sheet, labels.unsafe, scores, verdicts, None if raw is None else raw.p_unsafe)
        found |= sheet.metrics()
    if verdicts.severity is not None and (labels.severity >= 0).any():
        sheet = MetricSheet(f"{prefix}/severity", keys, **options)
        _severity(sheet, labels.severity, verdicts, None if raw is None else raw.p_severity)
        found |= sheet.metrics()
    if verdicts.category is not None and (labels.category >= 0).any():
        sheet = MetricSheet(f"{prefix}/category", keys, **options)
        _category(sheet, labels, verdicts, None if raw is None else raw.p_category)
        found |= sheet.metrics()
    return found


def category_slugs(categories: Sequence[str]) -> list[str]:
    """Names of categories as parts of metric names: `White-Collar Crime` -> `white_collar_crime`."""
    return [re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") for name in categories]


# ------------------------------------------------------------------------------------------------ heads
def _unsafe(
    sheet: MetricSheet, labels: NDArray[np.int64], scores: Floats, verdicts: Verdicts, raw: Floats | None
) -> None:
    known, unsafe, safe = labels >= 0, labels == 1, labels == 0
    counted = dict.fromkeys(("accuracy", "macro_f1", "f1", "predicted_rate", "prevalence"), known)
    counted |= {"precision": known & verdicts.unsafe, "recall": unsafe, "fnr": unsafe, "fpr": safe}
    columns = maths.unsafe_columns(verdicts.unsafe, labels)
    sheet.of_sums(columns, maths.unsafe_metrics, counted, _UNSAFE_SHARES)
    sheet.of_weights(maths.ranking(scores, labels), n=int(known.sum()))
    _calibration(sheet, labels, verdicts.p_unsafe, "")
    if raw is not None:
        _calibration(sheet, labels, raw, "_raw")


def _calibration(sheet: MetricSheet, labels: NDArray[np.int64], p_unsafe: Floats, ending: str) -> None:
    names = [f"{name}{ending}" for name in ("ece", "brier", "nll")]

    def functions(sums: Floats) -> Mapping[str, Floats]:
        return {f"{name}{ending}": value for name, value in maths.calibration_metrics(sums).items()}

    sheet.of_sums(maths.calibration_columns(p_unsafe, labels), functions, dict.fromkeys(names, labels >= 0))


def _severity(sheet: MetricSheet, labels: NDArray[np.int64], verdicts: Verdicts, raw: Floats | None) -> None:
    known = labels >= 0
    counted: dict[str, Bools] = dict.fromkeys(("accuracy", "macro_f1", "quadratic_kappa", "mae"), known)
    counted |= {f"recall_{level}": labels == level for level in range(SEVERITIES)}
    counted |= {f"undercalled_{SEVERITIES - 1}": labels == SEVERITIES - 1, "unsafe_called_safe": labels > 0}
    columns = maths.severity_columns(verdicts.severity, labels, SEVERITIES)  # type: ignore[arg-type]
    sheet.of_sums(columns, maths.severity_metrics, counted, _SEVERITY_SHARES)
    _log_loss(sheet, verdicts.p_severity, raw, labels)


def _category(sheet: MetricSheet, labels: ModerationLabels, verdicts: Verdicts, raw: Floats | None) -> None:
    slugs = category_slugs(labels.categories)
    known: Bools = np.all(labels.category >= 0, axis=1)
    has = (labels.category == 1) & known[:, None]  # (N, C)
    said: Bools = np.asarray(verdicts.category) & known[:, None]
    bad = known & (labels.unsafe == 1)
    counted: dict[str, Bools] = {"exact_match": known, "exact_match_unsafe": bad, "micro_f1": has, "macro_f1": has}
    shares = ["exact_match", "exact_match_unsafe"]
    for place, slug in enumerate(slugs):
        mine, flagged = has[:, place], said[:, place]
        counted |= {f"f1_{slug}": mine, f"recall_{slug}": mine, f"precision_{slug}": flagged}
        shares += [f"recall_{slug}", f"precision_{slug}"]
    columns = maths.category_columns(said, labels.category, labels.unsafe)
    sheet.of_sums(columns, lambda sums: maths.category_metrics(sums, slugs), counted, shares)
    for place, slug in enumerate(slugs):
        sheet.value(f"support_{slug}", float(has[:, place].sum()))
    _log_loss(sheet, verdicts.p_category, raw, labels.category)


def _log_loss(sheet: MetricSheet, p: Floats | None, raw: Floats | None, labels: NDArray[np.int64]) -> None:
    known = labels >= 0 if labels.ndim == 1 else (labels >= 0).all(axis=1)
    for name, probabilities in (("nll", p), ("nll_raw", raw)):
        if probabilities is not None:
            losses = maths.log_loss_columns(probabilities, labels)
            sheet.mean(name, losses[:, 1], known)


# ------------------------------------------------------------------------------------------------ checks
def _width(logits: ModerationLogits) -> int:
    return 0 if logits.category is None else logits.category.shape[1]


def _check(
    row_ids: Sequence[str], labels: ModerationLabels, logits: ModerationLogits | None, verdicts: Verdicts
) -> None:
    n = len(row_ids)
    if not len(labels) == len(verdicts) == n or (logits is not None and len(logits) != n):
        raise ValueError(f"{n} rows, {len(labels)} labels, {len(verdicts)} verdicts")
    heads = (verdicts.category, verdicts.p_category, None if logits is None else logits.category)
    for found in heads:
        if found is not None and found.shape[1] != len(labels.categories):
            raise ValueError(f"{found.shape[1]} columns for {len(labels.categories)} categories")
    if logits is not None:
        parts = [logits.unsafe[:, None], logits.severity, logits.category]
        table = np.concatenate([part for part in parts if part is not None], axis=1)
        checked_scores(row_ids, table, columns=table.shape[1])
    if not any((part >= 0).any() for part in (labels.unsafe, labels.severity, labels.category)):
        raise UserError(
            f"none of the {n} rows to be evaluated has a label",
            "the evaluation data",
            "name the column of is_safe in data.columns, or classify the rows with mode=moderate",
        )
