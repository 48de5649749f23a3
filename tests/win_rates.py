"""Win rates by a second implementation: every pair of responses, one after the other."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np


def pairwise(ours: Any, theirs: Any, where: Any) -> float:
    """Win rate over all pairs of responses to one prompt, prompts weighted alike."""
    rates = []
    for i in np.flatnonzero(where):
        pairs = list(itertools.product(ours[i], theirs[i]))
        rates.append(sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs))
    return float(np.mean(rates))
