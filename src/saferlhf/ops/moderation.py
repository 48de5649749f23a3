"""Moderation: what a moderator says of a row, its labels, and how three heads become one consistent verdict.

A moderator has up to three heads over the same state: `unsafe` (one logit), `category` (one logit per harm category)
and `severity` (three numbers that give a cumulative link, `severity_logits`). Whatever a data set does not label has no
head. Label conventions are those of the whole project: 1 = unsafe = positive, 0 = safe, -1 = not labelled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SEVERITIES = 4
"""Severity levels: 0 safe, 1 minor, 2 moderate, 3 severe."""


@dataclass(frozen=True)
class ModerationLabels:
    """Labels of N rows.

    Attributes:
        unsafe: (N,) 1 unsafe, 0 safe, -1 not labelled.
        severity: (N,) 0..3, -1 not labelled.
        category: (N, C) 1 has the harm category, 0 has not, -1 not labelled (a whole row).
        categories: C names, in the order of the columns.
    """

    unsafe: Ints
    severity: Ints
    category: Ints
    categories: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.unsafe)

    def take(self, rows: Ints) -> ModerationLabels:
        """Labels of some rows, by their numbers."""
        return ModerationLabels(self.unsafe[rows], self.severity[rows], self.category[rows], self.categories)


@dataclass(frozen=True)
class ModerationLogits:
    """What the heads say of N rows, before temperature and thresholds.

    Attributes:
        unsafe: (N,) logit of "unsafe".
        severity: (N, 3) logits of severity >= 1, >= 2, >= 3, falling along a row; None without that head.
        category: (N, C) one logit per category; None without that head.
    """

    unsafe: Floats
    severity: Floats | None
    category: Floats | None

    def __len__(self) -> int:
        return len(self.unsafe)


@dataclass(frozen=True)
class Verdicts:
    """Calibrated probabilities and decisions; consistent: safe <=> severity 0 <=> no category (where there are heads).

    Attributes:
        p_unsafe: (N,) calibrated probability.
        p_severity: (N, 4) calibrated probability of each level, rows sum to 1; None without that head.
        p_category: (N, C) calibrated probability of each category; None without that head.
        unsafe: (N,) bool decision.
        severity: (N,) 0..3; None without that head.
        category: (N, C) bool; None without that head.
        unsafe_logit: (N,) log-odds of p_unsafe: they rank rows for which it is 1 to the last bit; None: not known.
    """

    p_unsafe: Floats
    p_severity: Floats | None
    p_category: Floats | None
    unsafe: NDArray[np.bool_]
    severity: Ints | None
    category: NDArray[np.bool_] | None
    unsafe_logit: Floats | None = None

    def __len__(self) -> int:
        return len(self.unsafe)

    def take(self, rows: Ints) -> Verdicts:
        """Verdicts on some rows, by their numbers."""
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        chosen: dict[str, Any] = {name: None if value is None else value[rows] for name, value in values.items()}
        return Verdicts(**chosen)
