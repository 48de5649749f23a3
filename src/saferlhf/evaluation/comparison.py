"""Verdicts beside one another: baselines under their names, and paired differences of two judges on the same rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.evaluation.sheet import MetricSheet
from saferlhf.ops import moderation_metrics as maths
from saferlhf.ops.intervals import CONFIDENCE, DRAWS
from saferlhf.ops.moderation import SEVERITIES, ModerationLabels, Verdicts

Floats = NDArray[np.float64]

HEADLINES = {
    "unsafe": ("macro_f1", "accuracy", "f1", "precision", "recall", "fpr", "auroc", "auprc", "nll"),
    "severity": ("accuracy", "macro_f1", "quadratic_kappa", "mae", "nll"),
    "category": ("exact_match", "micro_f1", "macro_f1", "nll"),
}
"""What baselines and differences are given for, by area."""

_ENDINGS = ("", "_low", "_high", "_n")


def baseline_metrics(
    row_ids: Sequence[str], labels: ModerationLabels, verdicts: Mapping[str, Verdicts], **options: Any
) -> dict[str, float]:
    """The headline metrics of baselines, as `<prefix>/baseline_<name>/<area>/<metric>` with intervals.

    Args:
        row_ids, labels: as `evaluate_moderation`.
        verdicts: baseline -> its verdicts.
        options: of `evaluate_moderation`.
    """
    prefix = options.pop("prefix", "test")
    found: dict[str, float] = {}
    for name, given in verdicts.items():
        area = f"{prefix}/baseline_{name}"
        every = evaluate_moderation(row_ids, labels, None, given, prefix=area, **options)
        kept = [f"{area}/{head}/{m}{end}" for head, names in HEADLINES.items() for m in names for end in _ENDINGS]
        found |= {full: every[full] for full in kept if full in every}
    return found


def compare_verdicts(
    labels: ModerationLabels,
    first: Verdicts,
    second: Verdicts,
    *,
    clusters: Sequence[str],
    prefix: str = "difference",
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, float]:
    """First minus second on the same rows, `<prefix>/<area>/<metric>` with paired bootstrap intervals.

    Both are measured on the same resampled prompts, so what makes a draw easy for both does not widen the interval. A
    head that one of them lacks is left out.
    """
    options: dict[str, Any] = {"draws": draws, "confidence": confidence, "seed": seed}
    found: dict[str, float] = {}
    for area, names in HEADLINES.items():
        sheet = MetricSheet(f"{prefix}/{area}", clusters, **options)
        one, other = _columns(area, labels, first), _columns(area, labels, second)
        if one is None or other is None or not one.any():
            continue
        width = one.shape[1]

        def gain(sums: Floats, area: str = area, width: int = width, names: Sequence[str] = names) -> dict[str, Floats]:
            ours, theirs = (_of_sums(area, part, len(labels.categories)) for part in (sums[:, :width], sums[:, width:]))
            return {name: ours[name] - theirs[name] for name in names if name in ours}

        sheet.of_sums(np.concatenate([one, other], axis=1), gain)
        if area == "unsafe":
            ranks = [maths.ranking(verdicts.p_unsafe, labels.unsafe) for verdicts in (first, second)]

            def gained(weights: Floats, ranks: Any = ranks) -> dict[str, Floats]:
                ours, theirs = ranks[0](weights), ranks[1](weights)
                return {name: ours[name] - theirs[name] for name in ("auroc", "auprc")}

            sheet.of_weights(gained, n=int((labels.unsafe >= 0).sum()))
        found |= sheet.metrics()
    return found


def _columns(area: str, labels: ModerationLabels, verdicts: Verdicts) -> Floats | None:
    """Contributions of the rows to one area's metrics, its log loss in the last two columns; None without the head."""
    if area == "unsafe":
        p = np.stack([1.0 - verdicts.p_unsafe, verdicts.p_unsafe], axis=1)
        columns, loss = maths.unsafe_columns(verdicts.unsafe, labels.unsafe), maths.log_loss_columns(p, labels.unsafe)
    elif area == "severity":
        if verdicts.severity is None or verdicts.p_severity is None:
            return None
        columns = maths.severity_columns(verdicts.severity, labels.severity, SEVERITIES)
        loss = maths.log_loss_columns(verdicts.p_severity, labels.severity)
    else:
        if verdicts.category is None or verdicts.p_category is None:
            return None
        columns = maths.category_columns(verdicts.category, labels.category, labels.unsafe)
        loss = maths.log_loss_columns(verdicts.p_category, labels.category)
    return np.concatenate([columns, loss], axis=1)


def _of_sums(area: str, sums: Floats, categories: int) -> dict[str, Floats]:
    counts, nll = sums[:, :-2], maths.ratio(sums[:, -1], sums[:, -2])
    if area == "unsafe":
        return maths.unsafe_metrics(counts) | {"nll": nll}
    if area == "severity":
        return maths.severity_metrics(counts, SEVERITIES) | {"nll": nll}
    return maths.category_metrics(counts, [str(place) for place in range(categories)]) | {"nll": nll}
