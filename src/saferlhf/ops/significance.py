"""Is a paired difference more than chance? Tests for two systems measured on the same prompts.

- `sign_flip_p`: permutation test of a mean difference (Fisher 1935, "The Design of Experiments", chapter 3). If the two
  systems were alike each prompt's difference could as well have had the other sign; p is the share of sign patterns
  whose mean is as far from 0 as the one seen. Rows of one prompt keep a common sign.
- `mcnemar_p`: exact test for two classifiers on the same rows (McNemar 1947): of the rows that only one of them gets
  right, is either's share more than half?
- `holm`: p-values of several questions asked at once, each adjusted so that the chance of any false alarm stays at the
  level (Holm 1979, "A simple sequentially rejective multiple test procedure").
- `minimum_detectable`: the smallest true difference that a test of this size would find with the given power.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest, norm

from saferlhf.ops.intervals import DRAWS

Floats = NDArray[np.float64]

EXACT = 13
"""Up to so many clusters every sign pattern is counted (8,192 of them); above, patterns are drawn."""

_BLOCK = 4_000_000  # signs held at once


def sign_flip_p(
    differences: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = DRAWS, seed: int = 0
) -> float:
    """Two-sided p-value of mean(differences) = 0.

    Args:
        differences: (n,) one system minus the other; NaN is left out.
        clusters: (n,) codes; rows of one cluster have a common sign. None: every row by itself.
        draws: sign patterns; the one seen counts as one more, so p is never 0 (Phipson & Smyth 2010).
        seed: of the patterns.

    Returns:
        p in (0, 1]; NaN without a difference to test. Half of it is the one-sided p in the direction that was seen.
    """
    values = np.asarray(differences, np.float64)
    codes = np.arange(len(values)) if clusters is None else np.asarray(clusters)
    known = ~np.isnan(values)
    if not known.any():
        return float("nan")
    _, codes = np.unique(codes[known], return_inverse=True)
    sums = np.bincount(codes, weights=values[known])  # (K,)
    seen = abs(sums.sum()) - 1e-9 * np.abs(sums).sum()  # rounding is not a difference
    if len(sums) <= EXACT:
        patterns = (np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums))) & 1  # (2^K, K)
        return float((np.abs((2 * patterns - 1) @ sums) >= seen).mean())
    rng = np.random.default_rng(seed)
    extreme, left, block = 0, draws, max(1, _BLOCK // len(sums))
    while left:
        count = min(block, left)
        signs = 2 * rng.integers(0, 2, (count, len(sums)), dtype=np.int8) - 1
        extreme += int((np.abs(signs @ sums) >= seen).sum())
        left -= count
    return (extreme + 1) / (draws + 1)


def mcnemar_p(first_right: ArrayLike, second_right: ArrayLike) -> float:
    """Exact two-sided p-value that two classifiers are right equally often.

    Args:
        first_right, second_right: (n,) bool, on the same independent rows.

    Returns:
        p in (0, 1]; 1 where they are right on the same rows.
    """
    first, second = np.asarray(first_right, bool), np.asarray(second_right, bool)
    if first.shape != second.shape:
        raise ValueError(f"{first.shape} and {second.shape} are not the same rows")
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    if only_first + only_second == 0:
        return 1.0
    return float(binomtest(only_first, only_first + only_second, 0.5).pvalue)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values in the same order: reject those at or below the level, as if each were the only one.

    NaN (no test) stays NaN and is not counted among the questions.
    """
    p = np.asarray(p_values, np.float64)
    asked = np.flatnonzero(~np.isnan(p))
    order = asked[np.argsort(p[asked], kind="stable")]
    steps = p[order] * np.arange(len(order), 0, -1)
    adjusted = p.copy()
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(order) else []
    return [float(value) for value in adjusted]


def minimum_detectable(standard_error: float, *, confidence: float = 0.95, power: float = 0.8) -> float:
    """Smallest true difference that a two-sided test at 1 - confidence finds with this probability.

    Args:
        standard_error: of the difference, as of its bootstrap sample.
        confidence: of the interval that has to exclude 0.
        power: probability of finding it.
    """
    if not (0.0 < confidence < 1.0 and 0.0 < power < 1.0):
        raise ValueError(f"confidence {confidence} and power {power} are not between 0 and 1")
    return float((norm.ppf(0.5 + confidence / 2) + norm.ppf(power)) * standard_error)
