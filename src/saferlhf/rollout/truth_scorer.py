"""The toy world's ground truth as a scorer: what any reply to any of its prompts is really worth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saferlhf.data.rows import PKU_CATEGORIES
from saferlhf.rollout.scorers import ScoreRequest, Scores

OUTPUTS = ("helpfulness", "harmlessness", "is_safe", "is_refusal", "severity")


class TruthScorer:
    """helpfulness and harmlessness (graded), is_safe and is_refusal (0 or 1), severity (0..3).

    Args:
        categories: one output `category/<name>` (0 or 1) for each harm category as well.
        name: in metrics and messages.

    Defined for every text, the empty one too (`data/toyworld/oracle.py`).
    """

    def __init__(self, *, categories: bool = False, name: str = "truth") -> None:
        self._name, self._categories = name, categories

    @property
    def name(self) -> str:
        """In metrics and messages."""
        return self._name

    @property
    def outputs(self) -> tuple[str, ...]:
        """See the class."""
        return OUTPUTS + (tuple(f"category/{name}" for name in PKU_CATEGORIES) if self._categories else ())

    def score(self, rows: Sequence[ScoreRequest]) -> Scores:
        """Ground truth of N responses."""
        from saferlhf.data.toyworld import judge

        truths = [judge(row.prompt, row.response) for row in rows]
        values = {name: np.array([float(getattr(truth, name)) for truth in truths]) for name in OUTPUTS}
        if self._categories:
            for name in PKU_CATEGORIES:
                values[f"category/{name}"] = np.array([float(name in truth.harm_category) for truth in truths])
        return Scores(values)
