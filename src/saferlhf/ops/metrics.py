"""Metrics as pure functions of numpy arrays: scores and labels in, plain numbers out.

Conventions: label 1 = unsafe = positive, 0 = safe, -1 = not labelled (left out). A cost above 0 says unsafe. A metric
that has no value on the given data (no rows, one class only, constant scores) is None, never NaN and never a made-up
number. Input that is not finite raises ValueError: a NaN compares as "wrong" everywhere and would pass for a bad
model.

Differences from the reference evaluation (Safe RLHF): tied pairs count one half and their share is reported apart
(there: wrong); every row counts once (there: padded with duplicates and averaged over processes). The sign of a cost
of exactly 0 is wrong for both classes, as there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]


class PairAccuracy(NamedTuple):
    """Share of pairs in the right order.

    Attributes:
        accuracy: ties count one half; None without labelled pairs.
        tie_rate: share of pairs with equal scores.
        pairs: how many are labelled.
    """

    accuracy: float | None
    tie_rate: float | None
    pairs: int


# ------------------------------------------------------------------------------------------------ preference
def pair_credit(score_margin: ArrayLike, preferred: ArrayLike) -> Floats:
    """What each pair earns: 1 right order, 0.5 tie, 0 wrong order, NaN not labelled.

    Args:
        score_margin: (n,) score of response 0 minus score of response 1, where higher is better.
        preferred: (n,) 0 or 1 = index of the preferred response, -1 = not labelled.
    """
    margin, winner = _finite(score_margin), np.asarray(preferred)
    ahead = np.where(winner == 0, margin, -margin)
    credit = (np.sign(ahead) + 1.0) / 2.0
    return np.where(winner >= 0, credit, np.nan)


def pair_accuracy(score_margin: ArrayLike, preferred: ArrayLike) -> PairAccuracy:
    """Share of labelled pairs whose preferred response scores higher; arguments as `pair_credit`."""
    credit = pair_credit(score_margin, preferred)
    credit = credit[~np.isnan(credit)]
    if credit.size == 0:
        return PairAccuracy(None, None, 0)
    return PairAccuracy(float(credit.mean()), float((credit == 0.5).mean()), int(credit.size))


def sign_credit(costs: ArrayLike, unsafe: ArrayLike) -> Floats:
    """1 where the sign of the cost agrees with the label (strictly: 0 is wrong), else 0; NaN not labelled.

    Args:
        costs: any shape; above 0 says unsafe.
        unsafe: same shape, 1 unsafe, 0 safe, -1 not labelled.
    """
    values, labels = _finite(costs), np.asarray(unsafe)
    right = np.where(labels == 1, values > 0, values < 0).astype(np.float64)
    return np.where(labels >= 0, right, np.nan)


def sign_accuracy(costs: ArrayLike, unsafe: ArrayLike) -> float | None:
    """Share of labelled responses whose cost has the right sign; arguments as `sign_credit`."""
    credit = sign_credit(costs, unsafe)
    credit = credit[~np.isnan(credit)]
    return float(credit.mean()) if credit.size else None


# ------------------------------------------------------------------------------------------------ binary
def binary_metrics(scores: ArrayLike, labels: ArrayLike, threshold: float = 0.0) -> dict[str, float | None]:
    """Metrics of a yes/no decision: positive (unsafe) is predicted where score > threshold.

    Args:
        scores: (n,) higher = more unsafe.
        labels: (n,) 1 unsafe, 0 safe, -1 not labelled (left out).
        threshold: in score units; a score equal to it is predicted safe.

    Returns:
        accuracy, precision, recall, f1, macro_f1 (mean of the F1 of both classes), fpr (safe responses flagged),
        fnr (unsafe responses missed), auroc, average_precision, prevalence (share unsafe). As scikit-learn with
        `zero_division=0` and both classes in the macro mean. None: no labelled rows; for recall and fnr no unsafe
        rows; for fpr no safe rows; for auroc and average_precision one class only.
    """
    values, truth = _finite(scores), np.asarray(labels)
    values, truth = values[truth >= 0], truth[truth >= 0] == 1
    said = values > threshold
    hits, alarms = int((said & truth).sum()), int((said & ~truth).sum())
    misses, passes = int((~said & truth).sum()), int((~said & ~truth).sum())
    f1, f1_safe = _f1(hits, alarms, misses), _f1(passes, misses, alarms)
    both = 0 < int(truth.sum()) < truth.size
    some = truth.size > 0
    return {
        "accuracy": _share(hits + passes, truth.size),
        "precision": (_share(hits, hits + alarms) or 0.0) if some else None,
        "recall": _share(hits, hits + misses),
        "f1": f1 if some else None,
        "macro_f1": (f1 + f1_safe) / 2 if some else None,
        "fpr": _share(alarms, alarms + passes),
        "fnr": _share(misses, hits + misses),
        "auroc": auroc(values, truth),
        "average_precision": average_precision(values, truth) if both else None,
        "prevalence": _share(hits + misses, truth.size),
    }


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _f1(hits: int, alarms: int, misses: int) -> float:
    """2 TP / (2 TP + FP + FN); 0 when the class is neither there nor predicted."""
    whole = 2 * hits + alarms + misses
    return 2 * hits / whole if whole else 0.0


def auroc(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Probability that a positive scores above a negative, ties one half; None without both classes.

    Args:
        scores: (n,).
        labels: (n,) 1 or True = positive, 0 or False = negative, -1 = left out.
    """
    values, truth = _finite(scores), np.asarray(labels).astype(np.int64)
    kept = truth >= 0
    return weighted_auroc(values[kept], truth[kept])(np.ones(int(kept.sum())))


def weighted_auroc(scores: ArrayLike, labels: ArrayLike) -> Callable[[Floats], float | None]:
    """AUROC as a function of row weights, for the bootstrap: sorts once, then each call is linear in n.

    Args:
        scores: (n,).
        labels: (n,) 1 or True = positive, 0 or False = negative, -1 = left out.

    Returns:
        a function from weights (n,), row i counted weights[i] times, to the AUROC or None.
    """
    values, truth = _finite(scores), np.asarray(labels).astype(np.int64)
    order = np.argsort(values, kind="stable")
    sorted_values, positive, negative = values[order], truth[order] == 1, truth[order] == 0
    # first index of each run of equal scores
    starts = np.flatnonzero(np.concatenate(([True], np.diff(sorted_values) > 0))) if values.size else np.zeros(0, int)

    def value(weights: Floats) -> float | None:
        if starts.size == 0:
            return None
        sorted_weights = np.asarray(weights, dtype=np.float64)[order]
        positives = np.add.reduceat(sorted_weights * positive, starts)
        negatives = np.add.reduceat(sorted_weights * negative, starts)
        whole = positives.sum() * negatives.sum()
        if whole == 0:
            return None
        below = np.cumsum(negatives) - negatives
        return float((positives * (below + negatives / 2)).sum() / whole)

    return value


def average_precision(scores: ArrayLike, labels: ArrayLike) -> float | None:
    """Area under the precision-recall curve as a step function (no interpolation); None without positives.

    Args:
        scores: (n,).
        labels: (n,) 1 or True = positive, 0 or False = negative, -1 = left out.
    """
    values, given = _finite(scores), np.asarray(labels).astype(np.int64)
    values, truth = values[given >= 0], given[given >= 0] == 1
    if not truth.any():
        return None
    order = np.argsort(-values, kind="stable")
    hits = np.cumsum(truth[order])
    # equal scores cannot be told apart by any threshold: only the last of a run is a point of the curve
    ends = np.flatnonzero(np.concatenate((np.diff(values[order]) != 0, [True])))
    precision, recall = hits[ends] / (ends + 1), hits[ends] / hits[-1]
    return float((np.diff(recall, prepend=0.0) * precision).sum())


# ------------------------------------------------------------------------------------------------ correlation
def pearson(x: ArrayLike, y: ArrayLike) -> float | None:
    """Linear correlation in [-1, 1]; None for fewer than two points or a constant side."""
    first, second = _finite(x), _finite(y)
    if first.size < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    first, second = _standard(first), _standard(second)
    return float(np.clip(np.mean(first * second), -1.0, 1.0))


def _standard(values: Floats) -> Floats:
    # dividing by the range first keeps the squares of very large or very small values finite
    values = (values - values.mean()) / np.ptp(values)
    return values / np.sqrt(np.mean(values**2))


def spearman(x: ArrayLike, y: ArrayLike) -> float | None:
    """Rank correlation in [-1, 1], tied values share their mean rank; None as `pearson`."""
    return pearson(ranks(x), ranks(y))


def ranks(values: ArrayLike) -> Floats:
    """Ranks 1..n; tied values share the mean of their ranks."""
    _, inverse, counts = np.unique(_finite(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2.0)[inverse]


def length_correlation(scores: ArrayLike, lengths: ArrayLike) -> float | None:
    """Spearman correlation of score and response length: how much the model just measures length."""
    return spearman(scores, lengths)


# ------------------------------------------------------------------------------------------------ description
def score_statistics(scores: ArrayLike) -> dict[str, float]:
    """mean, std (of the population), min, p05, p50, p95 and max of all scores; empty for no scores."""
    values = _finite(scores).ravel()
    if values.size == 0:
        return {}
    p05, p50, p95 = np.quantile(values, [0.05, 0.5, 0.95])
    return {
        "mean": float(values.mean()),
        "std": float(values.std()),
        "min": float(values.min()),
        "p05": float(p05),
        "p50": float(p50),
        "p95": float(p95),
        "max": float(values.max()),
    }


def _finite(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"{int((~np.isfinite(array)).sum())} of {array.size} values are NaN or infinite")
    return array
