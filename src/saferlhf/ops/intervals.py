"""Confidence intervals: bootstrap over prompts, and Wilson for plain proportions.

Two pairs of one prompt are not independent, so prompts (clusters) are resampled, not rows (Field and Welsh 2007,
"Bootstrapping clustered data"): each draw takes K of the K clusters with replacement, and the interval is the
percentile interval of the statistic over the draws (Efron and Tibshirani 1993, chapter 13), expanded for few clusters
(Hesterberg 2015).

Everything that is a function of sums over rows (means, ratios, accuracies, F1, kappa, Pearson) needs only the K
cluster sums: one draw is a row of multinomial counts, and all draws are one matrix product (draws, K) @ (K, m), done
in blocks so that memory stays bounded. Statistics that are no function of sums (AUROC) take the row weights of a block
of draws at once (`resampled_statistics`).

When every cluster says the same (all right, or all wrong), the bootstrap has no spread and would claim certainty;
`bootstrap_ratios(..., proportion=True)` then gives the Wilson interval for K independent clusters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, stdtrit

Floats = NDArray[np.float64]
Codes = NDArray[np.int64]

DRAWS = 10_000
CONFIDENCE = 0.95
_BLOCK_ELEMENTS = 4_000_000  # numbers held at once: 32 MB of float64
_KEPT_ELEMENTS = 100_000_000  # counts of draws that are kept for the next metric, a byte each
_WEIGHT_ELEMENTS = 150_000  # row weights handed to a statistic at once: what it makes of them stays in the cache


class Interval(NamedTuple):
    """Bounds of a confidence interval, low <= high."""

    low: float
    high: float


# ------------------------------------------------------------------------------------------------ proportions
def wilson(successes: float, total: float, confidence: float = CONFIDENCE) -> Interval:
    """Wilson score interval of a proportion (Wilson 1927).

    Args:
        successes: may be fractional (ties counted one half).
        total: number of independent trials; 0 gives (0, 1).
        confidence: between 0 and 1.
    """
    if not 0 <= successes <= total:
        raise ValueError(f"successes must lie in [0, total], got {successes} of {total}")
    if total == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf(0.5 + _checked(confidence) / 2)
    share = float(successes) / float(total)
    scale = 1 + z * z / total
    centre = (share + z * z / (2 * total)) / scale
    half = z * sqrt(share * (1 - share) / total + z * z / (4 * total * total)) / scale
    # at the edges the exact bound is 0 or 1; rounding must not exclude it
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == total else min(1.0, centre + half)
    return Interval(low, high)


# ------------------------------------------------------------------------------------------------ clusters
def cluster_codes(keys: Sequence[Hashable]) -> Codes:
    """Numbers 0..K-1 for K distinct keys, by sorted key: the same whatever the order of the rows (n,)."""
    position = {key: code for code, key in enumerate(sorted(set(keys), key=lambda key: (str(type(key)), str(key))))}
    return np.fromiter((position[key] for key in keys), dtype=np.int64, count=len(keys))


def _draw_counts(clusters: int, draws: int, seed: int) -> Iterator[NDArray[Any]]:
    """Yields blocks (block, K) of how often each cluster is taken in each draw; every row sums to K.

    The metrics of one table are many calls with the same draws, so the last ones are kept.
    """
    if draws * clusters > _KEPT_ELEMENTS:
        yield from _drawn(clusters, draws, seed)
        return
    kept = _kept_counts(clusters, draws, seed)
    block = max(1, _BLOCK_ELEMENTS // clusters)
    for start in range(0, draws, block):
        yield kept[start : start + block]


@functools.lru_cache(maxsize=2)
def _kept_counts(clusters: int, draws: int, seed: int) -> NDArray[np.uint8]:
    """(draws, K). One cluster is taken more than 255 times with a probability below 1e-500."""
    blocks = [counts.astype(np.uint8) for counts in _drawn(clusters, draws, seed)]
    return np.concatenate(blocks) if blocks else np.zeros((0, clusters), np.uint8)


def _drawn(clusters: int, draws: int, seed: int) -> Iterator[Codes]:
    rng = np.random.default_rng(seed)
    block = max(1, _BLOCK_ELEMENTS // clusters)
    for start in range(0, draws, block):
        size = min(block, draws - start)
        taken = rng.integers(0, clusters, size=(size, clusters))
        taken += np.arange(size)[:, None] * clusters
        yield np.bincount(taken.ravel(), minlength=size * clusters).reshape(size, clusters)


# ------------------------------------------------------------------------------------------------ bootstrap
def resampled_sums(values: ArrayLike, clusters: Codes, *, draws: int = DRAWS, seed: int = 0) -> Floats:
    """Sums over rows under resampling of clusters.

    Args:
        values: (n, m) one column per sum.
        clusters: (n,) codes 0..K-1.
        draws: number of resamples.
        seed: of the draws; the same seed gives the same clusters to every statistic.

    Returns:
        (draws, m).
    """
    table = np.asarray(values, dtype=np.float64)  # (n, m)
    if table.ndim != 2 or table.shape[0] != len(clusters):
        raise ValueError(f"values must be (n, m) with n = {len(clusters)} clusters given, got shape {table.shape}")
    if not len(clusters):
        return np.zeros((draws, table.shape[1]))
    count = int(clusters.max()) + 1
    sums = np.stack([np.bincount(clusters, weights=column, minlength=count) for column in table.T], axis=1)  # (K, m)
    return np.concatenate([counts @ sums for counts in _draw_counts(count, draws, seed)])


def percentile_interval(sample: ArrayLike, confidence: float = CONFIDENCE, units: int | None = None) -> Interval | None:
    """Percentile interval of bootstrap values (draws,), expanded for few units.

    Draws of n units spread like a variance with 1/n in the place of 1/(n - 1), and their percentiles are those of a
    normal distribution where a known-by-estimate variance asks for Student's. Both are mended by taking the percentiles
    at Phi(-sqrt(n / (n - 1)) t), t Student's quantile with n - 1 degrees of freedom (Hesterberg 2015, "What teachers
    should know about the bootstrap", section 5.3): at 95% the 0.9% and 99.1% points for 10 units, 2.3% and 97.7% for
    100.

    Args:
        sample: NaN draws (statistic undefined) are left out.
        confidence: between 0 and 1.
        units: what was drawn and counts for this statistic; None: many.

    Returns:
        None when more than one draw in ten is undefined: an interval over the rest would be too narrow.
    """
    values = np.asarray(sample, dtype=np.float64)
    known = values[~np.isnan(values)]
    if known.size == 0 or known.size < 0.9 * values.size:
        return None
    tail = (1 - _checked(confidence)) / 2
    if units is not None and units >= 2:
        tail = float(ndtr(sqrt(units / (units - 1)) * stdtrit(units - 1, tail)))
    low, high = np.quantile(known, [tail, 1 - tail])
    return Interval(float(low), float(high))


def bootstrap_ratios(
    numerators: ArrayLike,
    denominators: ArrayLike,
    clusters: Codes,
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    proportion: bool = False,
) -> list[Interval | None]:
    """Intervals of m ratios sum(numerator) / sum(denominator), all from the same draws.

    Args:
        numerators, denominators: (n, m). A mean over some of the rows has value and 1 there, 0 and 0 elsewhere.
        clusters: (n,) codes from `cluster_codes`.
        proportion: the ratios are shares in [0, 1]; where all clusters agree on 0 or on 1, Wilson over clusters.

    Returns:
        m intervals; None for fewer than two clusters with a denominator.
    """
    over, under = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)  # (n, m)
    if over.shape != under.shape or over.ndim != 2:
        raise ValueError(f"numerators and denominators must both be (n, m), got {over.shape} and {under.shape}")
    columns = over.shape[1]
    sums = resampled_sums(np.concatenate([over, under], axis=1), clusters, draws=draws, seed=seed)  # (draws, 2m)
    intervals: list[Interval | None] = []
    for column in range(columns):
        present = len(np.unique(clusters[under[:, column] != 0]))
        if present < 2:
            intervals.append(None)
            continue
        whole = under[:, column].sum()
        share = over[:, column].sum() / whole if whole else np.nan
        if proportion and share in (0.0, 1.0):
            intervals.append(wilson(share * present, present, confidence))
            continue
        bottom = sums[:, columns + column]
        ratio = np.divide(sums[:, column], bottom, out=np.full(draws, np.nan), where=bottom != 0)
        intervals.append(percentile_interval(ratio, confidence, present))
    return intervals


def bootstrap_mean(
    values: ArrayLike,
    clusters: Codes | None = None,
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
    proportion: bool = False,
) -> Interval | None:
    """Interval of the mean of `values` (n,); NaN rows are left out. Without clusters each row is one."""
    numbers = np.asarray(values, dtype=np.float64)
    known = ~np.isnan(numbers)
    codes = np.arange(numbers.size) if clusters is None else clusters
    (interval,) = bootstrap_ratios(
        np.where(known, numbers, 0.0)[:, None],
        known[:, None],
        codes,
        draws=draws,
        confidence=confidence,
        seed=seed,
        proportion=proportion,
    )
    return interval


def resampled_statistics(
    statistics: Callable[[Floats], Mapping[str, Floats]],
    clusters: Codes,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[str, Floats]:
    """Values of statistics of row weights under resampling of clusters, for those that are no function of sums.

    Args:
        statistics: from weights (b, n), row i taken weights[:, i] times, to names with values (b,), NaN where
            undefined; all b draws of a block at once.
        clusters: (n,) codes from `cluster_codes`.
        draws, seed: as `resampled_sums`; the same seed gives the same clusters.

    Returns:
        name -> (draws,).
    """
    if not len(clusters):
        return {}
    rows = max(1, _WEIGHT_ELEMENTS // len(clusters))
    samples: dict[str, list[Floats]] = {}
    for counts in _draw_counts(int(clusters.max()) + 1, draws, seed):
        for start in range(0, len(counts), rows):
            weights = counts[start : start + rows][:, clusters].astype(np.float64)  # (b, n)
            for name, values in statistics(weights).items():
                samples.setdefault(name, []).append(values)
    return {name: np.concatenate(parts) for name, parts in samples.items()}


def bootstrap_statistic(
    statistic: Callable[[Floats], float | None],
    clusters: Codes,
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval | None:
    """Interval of one statistic of row weights that is not vectorised.

    Args:
        statistic: from weights (n,), row i taken weights[i] times, to its value, or None where undefined.
        clusters: (n,) codes from `cluster_codes`.

    Returns:
        None for fewer than two clusters or a statistic that is mostly undefined.
    """
    if not len(clusters) or int(clusters.max()) < 1:
        return None

    def of_block(weights: Floats) -> dict[str, Floats]:
        values = [statistic(row) for row in weights]
        return {"": np.array([np.nan if value is None else value for value in values], dtype=np.float64)}

    sample = resampled_statistics(of_block, clusters, draws=draws, seed=seed)[""]
    return percentile_interval(sample, confidence, int(clusters.max()) + 1)


def _checked(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    return confidence
