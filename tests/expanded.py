"""Percentiles of draws of few units, written a second time with scipy's distributions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.stats import norm, t


def expanded(sample: Sequence[float] | np.ndarray, units: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds at the percentiles that Hesterberg (2015) moves outwards."""
    z = t.ppf((1 + confidence) / 2, units - 1) * np.sqrt(units / (units - 1))
    low, high = np.quantile(sample, [norm.cdf(-z), norm.cdf(z)])
    return float(low), float(high)
