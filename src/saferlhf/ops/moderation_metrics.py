"""Metrics of moderation, computed for one weighting of the rows or for ten thousand at once.

The bootstrap asks for every metric under thousands of row weightings. Two forms serve it:

- What depends on sums over rows (accuracies, F1, kappa, ECE, Brier, NLL) is split in two: `*_columns` gives the rows'
  contributions (n, m), `*_metrics` maps their sums (b, m) to values (b,). Resampled sums are one matrix product.
- What depends on the order of the scores (AUROC, average precision, TPR at an FPR) is a function of row weights (b, n).

Conventions: label 1 = unsafe = positive, 0 = safe, -1 = not labelled (counts nowhere). A metric that is undefined on
the rows is NaN inside this module and left out of `metrics.json` by the caller: precision without a flagged row,
recall without an unsafe one, a macro mean without any class. Macro means run over the classes that occur in labels or
decisions, which is scikit-learn's default for severity and unsafe, and `zero_division=nan` for categories.

Quadratic kappa (Cohen 1968): 1 - sum_ij w_ij O_ij / sum_ij w_ij E_ij with w_ij = (i - j)^2, O the confusion matrix
and E the product of its margins over n. ECE (Naeini et al. 2015, equal-mass bins as Nguyen and O'Connor 2015):
sum over bins of |sum(p) - sum(y)| / n; the bins are fixed on the rows given, also under resampling. Resampling adds
noise within bins, so the interval of an ECE lies too high (it may lie above the value).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

ECE_BINS = 15
TINY = 1e-300  # under a logarithm only: probabilities that underflowed to zero

Values = dict[str, Floats]
"""Name -> (b,) values, NaN where undefined."""


def ratio(over: ArrayLike, under: ArrayLike) -> Floats:
    """Elementwise over / under, NaN where `under` is 0."""
    top, bottom = np.broadcast_arrays(np.asarray(over, np.float64), np.asarray(under, np.float64))
    return np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)


def mean_of_defined(values: Floats) -> Floats:
    """Mean along the last axis over what is not NaN; NaN where nothing is."""
    known = ~np.isnan(values)
    return ratio(np.where(known, values, 0.0).sum(axis=-1), known.sum(axis=-1))


def f1(hits: Floats, alarms: Floats, misses: Floats) -> Floats:
    """2 TP / (2 TP + FP + FN); NaN for a class that is neither there nor predicted."""
    return ratio(2.0 * hits, 2.0 * hits + alarms + misses)


# ------------------------------------------------------------------------------------------------ unsafe
def unsafe_columns(decided: ArrayLike, labels: ArrayLike) -> Floats:
    """(n, 4): hit, false alarm, miss, pass of each row; zeros where not labelled.

    Args:
        decided: (n,) bool, True = called unsafe.
        labels: (n,) 1 unsafe, 0 safe, -1 not labelled.
    """
    said, truth = np.asarray(decided, bool), np.asarray(labels)
    unsafe, safe = truth == 1, truth == 0
    return np.stack([said & unsafe, said & safe, ~said & unsafe, ~said & safe], axis=1).astype(np.float64)


def unsafe_metrics(sums: Floats) -> Values:
    """Metrics of the yes/no decision from sums (b, 4) of `unsafe_columns`."""
    hits, alarms, misses, passes = sums.T
    f1_unsafe, f1_safe = f1(hits, alarms, misses), f1(passes, misses, alarms)
    labelled = hits + alarms + misses + passes
    return {
        "accuracy": ratio(hits + passes, labelled),
        "macro_f1": mean_of_defined(np.stack([f1_unsafe, f1_safe], axis=-1)),
        "f1": f1_unsafe,
        "precision": ratio(hits, hits + alarms),
        "recall": ratio(hits, hits + misses),
        "fpr": ratio(alarms, alarms + passes),
        "fnr": ratio(misses, hits + misses),
        "predicted_rate": ratio(hits + alarms, labelled),
        "prevalence": ratio(hits + misses, labelled),
    }


def ranking(scores: ArrayLike, labels: ArrayLike, fprs: Sequence[float] = (0.01, 0.05)) -> Callable[[Floats], Values]:
    """AUROC, average precision and TPR at given FPRs as a function of row weights; sorts once.

    Args:
        scores: (n,) finite, higher = more unsafe; a logit or a probability. Equal scores cannot be told apart.
        labels: (n,) 1 unsafe, 0 safe, -1 left out.
        fprs: for each, the best TPR of a threshold with at most that share of safe rows flagged: `tpr_at_fpr_1pct`.

    Returns:
        from weights (b, n) to `auroc`, `auprc` (average precision: a step function, no interpolation) and the TPRs,
        each (b,), NaN without both classes.
    """
    values, truth = np.asarray(scores, np.float64), np.asarray(labels)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {values.size} scores are NaN or infinite")
    known = np.flatnonzero(truth >= 0)
    order = known[np.argsort(-values[known], kind="stable")]  # most unsafe first
    falling, positive = values[order], truth[order] == 1
    # first index of each run of equal scores
    starts = np.flatnonzero(np.concatenate(([True], np.diff(falling) != 0))) if order.size else np.zeros(0, np.int64)
    tied = starts.size < order.size
    names = {rate: f"tpr_at_fpr_{100 * rate:g}pct" for rate in fprs}

    def of_weights(weights: Floats) -> Values:
        if order.size == 0:
            return {name: np.full(len(weights), np.nan) for name in ("auroc", "auprc", *names.values())}
        taken = np.take(np.asarray(weights, np.float64), order, axis=1)  # (b, labelled)
        positives, negatives = taken * positive, taken * ~positive
        if tied:
            positives = np.add.reduceat(positives, starts, axis=1)  # (b, runs)
            negatives = np.add.reduceat(negatives, starts, axis=1)
        hits, alarms = np.cumsum(positives, axis=1), np.cumsum(negatives, axis=1)
        pos, neg = hits[:, -1], alarms[:, -1]
        both = (pos > 0) & (neg > 0)
        # a positive beats the negatives behind it, and half of those beside it
        won = (positives * (neg[:, None] - alarms + negatives / 2)).sum(axis=1)
        precision = np.divide(hits, hits + alarms, out=np.zeros_like(hits), where=hits + alarms > 0)
        found = {"auroc": ratio(won, pos * neg), "auprc": ratio((positives * precision).sum(axis=1), pos)}
        for rate, name in names.items():
            # rounding must not push an FPR that is exactly the rate above it
            allowed = alarms <= rate * neg[:, None] * (1 + 1e-12)
            found[name] = ratio(np.where(allowed, hits, 0.0).max(axis=1), pos)
        return {name: np.where(both, value, np.nan) for name, value in found.items()}

    return of_weights


# ------------------------------------------------------------------------------------------------ severity
def severity_columns(decided: ArrayLike, labels: ArrayLike, levels: int = 4) -> Floats:
    """(n, levels^2): one-hot of (true level, decided level), true level slowest; zeros where not labelled.

    Args:
        decided: (n,) 0..levels-1.
        labels: (n,) 0..levels-1, -1 not labelled.
    """
    said, truth = np.asarray(decided, np.int64), np.asarray(labels, np.int64)
    if said.size and not (said.min() >= 0 and said.max() < levels and truth.max() < levels):
        raise ValueError(f"severities must lie in 0..{levels - 1}")
    cell = np.where(truth >= 0, truth * levels + said, -1)
    return (cell[:, None] == np.arange(levels * levels)).astype(np.float64)


def severity_metrics(sums: Floats, levels: int = 4) -> Values:
    """Metrics of ordinal levels from sums (b, levels^2) of `severity_columns`.

    `recall_<k>` is the accuracy over rows of true level k, `undercalled_<top>` the share of rows of the highest level
    that are called lower, `unsafe_called_safe` that of rows of level >= 1 called 0.
    """
    table = np.asarray(sums, np.float64).reshape(len(sums), levels, levels)  # (b, true, decided)
    n = table.sum(axis=(1, 2))
    right = table.diagonal(axis1=1, axis2=2)  # (b, levels)
    true, said = table.sum(axis=2), table.sum(axis=1)  # (b, levels)
    distance = np.abs(np.arange(levels)[:, None] - np.arange(levels)[None, :]).astype(np.float64)
    disagreement = (table * distance**2).sum(axis=(1, 2))
    by_chance = ratio(np.einsum("bi,ij,bj->b", true, distance**2, said), n)
    recall = ratio(right, true)
    found = {
        "accuracy": ratio(right.sum(axis=1), n),
        "macro_f1": mean_of_defined(f1(right, said - right, true - right)),
        "quadratic_kappa": 1.0 - ratio(disagreement, by_chance),
        "mae": ratio((table * distance).sum(axis=(1, 2)), n),
    }
    found |= {f"recall_{level}": recall[:, level] for level in range(levels)}
    found[f"undercalled_{levels - 1}"] = 1.0 - recall[:, -1]
    found["unsafe_called_safe"] = ratio(table[:, 1:, 0].sum(axis=1), true[:, 1:].sum(axis=1))
    return found


# ------------------------------------------------------------------------------------------------ categories
def category_columns(decided: ArrayLike, labels: ArrayLike, unsafe: ArrayLike) -> Floats:
    """(n, 4 + 3 C): exact and labelled over all rows, the same over unsafe rows, then hits, false alarms and misses.

    Args:
        decided: (n, C) bool.
        labels: (n, C) 1 has the category, 0 has not, -1 not labelled (a whole row).
        unsafe: (n,) 1 unsafe, 0 safe, -1 not labelled.
    """
    said, truth = np.asarray(decided, bool), np.asarray(labels)
    labelled: Bools = np.all(truth >= 0, axis=1)  # (n,)
    has = (truth == 1) & labelled[:, None]
    said = said & labelled[:, None]
    exact = labelled & (said == has).all(axis=1)
    bad = labelled & (np.asarray(unsafe) == 1)
    shares = np.stack([exact, labelled, exact & bad, bad], axis=1)
    return np.concatenate([shares, said & has, said & ~has, ~said & has], axis=1).astype(np.float64)


def category_metrics(sums: Floats, names: Sequence[str]) -> Values:
    """Metrics of the categories from sums (b, 4 + 3 C) of `category_columns`.

    Args:
        names: C endings, for `f1_<name>`, `precision_<name>`, `recall_<name>`.
    """
    exact, labelled, exact_unsafe, unsafe = sums[:, :4].T
    hits, alarms, misses = np.split(sums[:, 4:], 3, axis=1)  # (b, C)
    each, precision, recall = f1(hits, alarms, misses), ratio(hits, hits + alarms), ratio(hits, hits + misses)
    found = {
        "exact_match": ratio(exact, labelled),
        "exact_match_unsafe": ratio(exact_unsafe, unsafe),
        "micro_f1": f1(hits.sum(axis=1), alarms.sum(axis=1), misses.sum(axis=1)),
        "macro_f1": mean_of_defined(each),
    }
    for place, name in enumerate(names):
        found |= {f"f1_{name}": each[:, place], f"precision_{name}": precision[:, place]}
        found[f"recall_{name}"] = recall[:, place]
    return found


# ------------------------------------------------------------------------------------------------ calibration
def equal_mass_bins(probabilities: ArrayLike, bins: int = ECE_BINS) -> NDArray[np.int64]:
    """(n,) bin of each row, by quantiles of the values; equal values share a bin, so some bins may be empty."""
    values = np.asarray(probabilities, np.float64)
    if not values.size:
        return np.zeros(0, np.int64)
    edges = np.quantile(values, np.linspace(0, 1, bins + 1))
    return np.searchsorted(edges[1:-1], values)


def calibration_columns(probabilities: ArrayLike, labels: ArrayLike, bins: int = ECE_BINS) -> Floats:
    """(n, 3 + bins): labelled, squared error, log loss, then p - y of each row in the column of its bin.

    Args:
        probabilities: (n,) of "unsafe".
        labels: (n,) 1 unsafe, 0 safe, -1 not labelled.
        bins: of equal mass over the labelled rows.
    """
    p, truth = np.asarray(probabilities, np.float64), np.asarray(labels)
    known = truth >= 0
    gap = np.where(known, p - truth, 0.0)
    loss = -np.log(np.maximum(np.where(truth == 1, p, 1.0 - p), TINY)) * known
    place = np.full(len(p), -1)
    place[known] = equal_mass_bins(p[known], bins)
    binned = (place[:, None] == np.arange(bins)) * gap[:, None]
    return np.concatenate([np.stack([known, gap**2, loss], axis=1), binned], axis=1)


def calibration_metrics(sums: Floats) -> Values:
    """`ece`, `brier` and `nll` from sums (b, 3 + bins) of `calibration_columns`."""
    labelled, squared, loss = sums[:, :3].T
    return {
        "ece": ratio(np.abs(sums[:, 3:]).sum(axis=1), labelled),
        "brier": ratio(squared, labelled),
        "nll": ratio(loss, labelled),
    }


def log_loss_columns(probabilities: ArrayLike, labels: ArrayLike) -> Floats:
    """(n, 2): labelled, and minus the log of the probability that was given to the true outcome.

    Args:
        probabilities: (n, L) of the levels, rows sum to 1, for labels (n,) 0..L-1 or -1; or (n, C) of the categories
            for labels (n, C) 0, 1 or -1: then the mean over the categories.
    """
    p, truth = np.asarray(probabilities, np.float64), np.asarray(labels, np.int64)
    if truth.ndim == 1:
        known: Bools = np.asarray(truth >= 0)
        of_true = np.take_along_axis(p, np.maximum(truth, 0)[:, None], axis=1)[:, 0]
        loss = -np.log(np.maximum(of_true, TINY))
    else:
        known = np.all(truth >= 0, axis=1)
        loss = -np.log(np.maximum(np.where(truth == 1, p, 1.0 - p), TINY)).mean(axis=1)
    return np.stack([known, np.where(known, loss, 0.0)], axis=1)


def reliability(probabilities: ArrayLike, labels: ArrayLike, bins: int = ECE_BINS) -> Floats:
    """(at most bins, 3): mean probability, share unsafe and rows of each bin that has rows, for a plot."""
    p, truth = np.asarray(probabilities, np.float64), np.asarray(labels)
    p, truth = p[truth >= 0], truth[truth >= 0]
    place = equal_mass_bins(p, bins)
    count = np.bincount(place, minlength=bins)
    used = count > 0
    means = [ratio(np.bincount(place, weights=column, minlength=bins), count)[used] for column in (p, truth)]
    return np.stack([*means, count[used].astype(np.float64)], axis=1)
