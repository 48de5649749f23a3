"""Thresholds that maximise an objective on labelled rows: exhaustive searches, each one pass over sorted scores.

A row is called positive where its probability is at or above the threshold. Candidates are the midpoints between
neighbouring distinct probabilities and one place beyond each end, so every possible division of the rows is tried.
Among equally good ones the candidate nearest to the default 1/2 is taken.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DEFAULT = 0.5
MOST_CANDIDATES = 256
"""Candidates for each of the two severity thresholds: above so many distinct values, quantiles of them."""


def candidates(probabilities: Floats) -> Floats:
    """(K,) thresholds in rising order that divide the rows in every possible way, from all positive to none.

    Args:
        probabilities: (N,) in [0, 1].
    """
    values = np.unique(probabilities)
    if not len(values):
        return np.array([DEFAULT])
    # beyond the ends: half way to 0 and to 1, so that "all" stays below every value seen and "none" above
    top = (values[-1] + 1.0) / 2 if values[-1] < 1.0 else np.nextafter(1.0, 2.0)
    return np.concatenate([[values[0] / 2], (values[:-1] + values[1:]) / 2, [top]])


def best_threshold(
    probabilities: Floats, positive: NDArray[np.bool_], objective: str, *, open_rows: NDArray[np.bool_] | None = None
) -> float:
    """The threshold that maximises an objective.

    Args:
        probabilities: (N,).
        positive: (N,) truth.
        objective: accuracy | f1 (of the positive class) | macro_f1 (mean of both classes) | fpr@X (the most positives
            found while at most a share X of the negatives is called positive).
        open_rows: (N,) False: the row is called negative whatever the threshold (it still counts); None: all open.

    Raises:
        ValueError: unknown objective.
    """
    is_open = np.ones(len(positive), dtype=bool) if open_rows is None else open_rows
    options = candidates(probabilities[is_open])  # (K,)
    found = probabilities[is_open]
    hits = _at_or_above(found[positive[is_open]], options)  # (K,)
    alarms = _at_or_above(found[~positive[is_open]], options)  # (K,)
    value = _objective(objective, hits, alarms, int(positive.sum()), int((~positive).sum()))
    return float(_nearest_of_best(options, value))


def _at_or_above(values: Floats, thresholds: Floats) -> Floats:
    """(K,) how many values are at or above each threshold."""
    return (len(values) - np.searchsorted(np.sort(values), thresholds, side="left")).astype(np.float64)


def _objective(name: str, hits: Floats, alarms: Floats, positives: int, negatives: int) -> Floats:
    misses, passes = positives - hits, negatives - alarms
    if name == "accuracy":
        return (hits + passes) / max(1, positives + negatives)
    if name == "f1":
        return _f1(hits, alarms, misses)
    if name == "macro_f1":
        return (_f1(hits, alarms, misses) + _f1(passes, misses, alarms)) / 2
    allowed = false_positive_rate(name)
    if allowed is None:
        raise ValueError(f"unknown objective {name!r}; accuracy, f1, macro_f1 or fpr@0.05")
    return np.where(alarms <= allowed * negatives + 1e-9, hits, -1.0)


def _f1(hits: Floats, alarms: Floats, misses: Floats) -> Floats:
    whole = 2 * hits + alarms + misses
    return np.where(whole > 0, 2 * hits / np.maximum(whole, 1), 0.0)


def false_positive_rate(objective: str) -> float | None:
    """X of "fpr@X" with 0 <= X < 1; None for any other text."""
    name, _, number = objective.partition("@")
    try:
        rate = float(number)
    except ValueError:
        return None
    return rate if name == "fpr" and 0 <= rate < 1 else None


def _nearest_of_best(options: Floats, value: Floats) -> float:
    best = options[value >= value.max() - 1e-12]
    return float(best[np.argmin(np.abs(best - DEFAULT))])


# ------------------------------------------------------------------------------------------------ severity
def best_severity_thresholds(
    at_least_2: Floats, at_least_3: Floats, unsafe: NDArray[np.bool_], severity: Ints, objective: str
) -> tuple[float, float]:
    """The two thresholds on P(severity >= 2 | >= 1) and P(severity >= 3 | >= 1), searched together.

    Args:
        at_least_2, at_least_3: (N,) the two probabilities.
        unsafe: (N,) the decision; a row that is called safe has severity 0 whatever the thresholds.
        severity: (N,) truth, 0..3.
        objective: accuracy | kappa (quadratic weights), over all N rows.

    Raises:
        ValueError: unknown objective.
    """
    if objective not in ("accuracy", "kappa"):
        raise ValueError(f"unknown objective {objective!r}; accuracy or kappa")
    first, second = _few(candidates(at_least_2[unsafe])), _few(candidates(at_least_3[unsafe]))  # (K,), (L,)
    # called 3: second threshold passed; 2: only the first; 1: none. Counts of each for all K x L pairs at once
    at = np.searchsorted(first, at_least_2[unsafe], side="right")  # (M,) how many candidates the row passes
    to = np.searchsorted(second, at_least_3[unsafe], side="right")  # (M,)
    called = np.zeros((4, 4, len(first), len(second)))  # truth, decision, K, L
    for level in range(4):
        called[level, 0] = int((severity[~unsafe] == level).sum())
        grid = np.zeros((len(first) + 1, len(second) + 1))
        of_level = severity[unsafe] == level
        np.add.at(grid, (at[of_level], to[of_level]), 1)
        total = grid.sum()
        # rows that fail both: fewer candidates passed than the index + 1
        neither = grid.cumsum(axis=0).cumsum(axis=1)[:-1, :-1]  # (K, L)
        not_third = grid.sum(axis=0).cumsum()[:-1][None, :]  # (1, L)
        called[level, 1] = neither
        called[level, 2] = not_third - neither
        called[level, 3] = total - not_third
    value = _accuracy(called) if objective == "accuracy" else _quadratic_kappa(called)  # (K, L)
    good = value >= value.max() - 1e-12
    distance = np.hypot(first[:, None] - DEFAULT, second[None, :] - DEFAULT)
    k, l = np.unravel_index(np.argmin(np.where(good, distance, np.inf)), good.shape)  # noqa: E741
    return float(first[k]), float(second[l])


def _few(options: Floats) -> Floats:
    if len(options) <= MOST_CANDIDATES:
        return options
    return options[np.linspace(0, len(options) - 1, MOST_CANDIDATES).round().astype(int)]


def _accuracy(called: Floats) -> Floats:
    return np.einsum("iikl->kl", called) / max(1.0, float(called[:, :, 0, 0].sum()))


def _quadratic_kappa(called: Floats) -> Floats:
    """Cohen's kappa with quadratic weights of each confusion matrix (4, 4, K, L); 0 where it is undefined."""
    levels = np.arange(4)
    weight = (levels[:, None] - levels[None, :]) ** 2
    truth, said = called.sum(axis=1), called.sum(axis=0)  # (4, K, L)
    observed = np.einsum("ij,ijkl->kl", weight, called)
    expected = np.einsum("ij,ikl,jkl->kl", weight, truth, said) / np.maximum(1.0, called.sum(axis=(0, 1)))
    return np.where(expected > 0, 1.0 - observed / np.where(expected > 0, expected, 1.0), 0.0)
