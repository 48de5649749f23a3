"""Verdicts broken down by what the rows are: language, topic, kind of test, answering model.

A group such as `en/drugs` counts under each of its parts: `by_language/en` and `by_topic/drugs`. Accuracy and the share
that is called unsafe are given for every group, the order of the scores (AUROC) where a group has both labels. All
groups share one set of bootstrap draws over prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from saferlhf.evaluation.moderation import category_slugs
from saferlhf.evaluation.sheet import MetricSheet
from saferlhf.ops.intervals import CONFIDENCE, DRAWS
from saferlhf.ops.moderation import Verdicts
from saferlhf.ops.moderation_metrics import ranking


def group_metrics(
    groups: Sequence[str],
    levels: Sequence[str],
    unsafe: NDArray[np.int64],
    verdicts: Verdicts,
    *,
    clusters: Sequence[str],
    prefix: str = "test",
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> dict[str, float]:
    """`<prefix>/by_<level>/<group>_{accuracy,predicted_rate,auroc}`.

    Args:
        groups: of n rows, parts separated by `/`; empty: in no group.
        levels: what the parts are, from the first; parts beyond them are not told apart.
        unsafe: (n,) 1 unsafe, 0 safe, -1 not labelled.
        verdicts: of n rows.
        clusters: n prompts.
        prefix, draws, confidence, seed: as `evaluate_moderation`.
    """
    known = unsafe >= 0
    scores = verdicts.p_unsafe if verdicts.unsafe_logit is None else verdicts.unsafe_logit
    right = (verdicts.unsafe == (unsafe == 1)).astype(np.float64)
    found: dict[str, float] = {}
    for place, level in enumerate(levels):
        parts = np.array([(*group.split("/"), *[""] * len(levels))[place] for group in groups])
        names = [str(name) for name in np.unique(parts) if name]
        sheet = MetricSheet(f"{prefix}/by_{level}", clusters, draws=draws, confidence=confidence, seed=seed)
        for name, slug in zip(names, category_slugs(names), strict=True):
            mine = known & (parts == name)
            if not mine.any():
                continue
            sheet.share(f"{slug}_accuracy", right, mine)
            sheet.share(f"{slug}_predicted_rate", verdicts.unsafe.astype(np.float64), mine)
            area = ranking(scores, np.where(mine, unsafe, -1))(np.ones((1, len(unsafe))))["auroc"][0]
            sheet.value(f"{slug}_auroc", None if np.isnan(area) else float(area))
        found |= sheet.metrics()
    return found
