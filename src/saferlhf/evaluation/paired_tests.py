"""Is one model better than the other on the same rows, or is it chance? Tests for metrics that are no means.

Approximate randomisation (Noreen 1989; Yeh 2000, "More accurate tests for the statistical significance of result
differences"): if the two models were alike, the verdicts on each prompt could as well have been the other's, so p is
the share of swaps, prompt by prompt, whose difference is as far from 0 as the one seen. For a mean over the same rows
this is the sign-flip test of `ops/significance.py` clustered by prompt; it holds for F1 and kappa too, and for AUROC
of ranks. Metrics that are functions of sums need the sums of each prompt only: all swaps are one matrix product.

McNemar's exact test of the decisions takes rows as independent, which rows of one prompt are not, and asks about
accuracy whatever the headline is: it stands beside, it does not decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from saferlhf.evaluation.judgement_measures import RANKS, Measure
from saferlhf.ops.intervals import DRAWS, Codes
from saferlhf.ops.metrics import ranks
from saferlhf.ops.significance import EXACT, mcnemar_p

Floats = NDArray[np.float64]

_BLOCK, _RANKED_BLOCK = 4_000_000, 300_000  # numbers held at once; a rank makes many more of them


def swap_p(first: Measure, second: Measure, name: str, clusters: Codes, *, draws: int = DRAWS, seed: int = 0) -> float:
    """Two-sided p-value that two models differ in a metric by chance: approximate randomisation by prompt.

    Args:
        first, second: of the same area and the same M rows.
        name: of the metric in that area.
        clusters: (M,) codes of the prompts; the verdicts on one prompt are swapped together.
        draws: patterns of swaps; up to `EXACT` prompts all of them are counted.
        seed: of the patterns.

    Returns:
        p in (0, 1]; NaN with fewer than two prompts or where the metric is undefined.
    """
    count = int(clusters.max()) + 1 if len(clusters) else 0
    if count < 2:
        return float("nan")
    ranked = _ranked_gap(first, second, name, clusters) if name in RANKS else None
    gap = ranked or _summed_gap(first, second, name, clusters, count)
    exact = count <= EXACT
    total = 2**count if exact else draws
    seen = float(gap(np.zeros((1, count)))[0])
    if np.isnan(seen):
        return float("nan")
    rng = np.random.default_rng(seed)
    extreme, block = 0, max(1, _RANKED_BLOCK // len(clusters) if ranked else _BLOCK // count)
    for start in range(0, total, block):
        numbers = np.arange(start, min(total, start + block))
        if exact:
            swaps = ((numbers[:, None] >> np.arange(count)) & 1).astype(np.float64)  # (b, K)
        else:
            swaps = rng.integers(0, 2, (len(numbers), count), dtype=np.int8).astype(np.float64)
        # rounding is not a difference; undefined under a swap: as far away as any
        extreme += int((~(np.abs(gap(swaps)) < abs(seen) - 1e-9)).sum())
    return extreme / total if exact else (extreme + 1) / (total + 1)


def _summed_gap(first: Measure, second: Measure, name: str, clusters: Codes, count: int) -> Callable[[Floats], Floats]:
    """From swaps (b, K) to differences (b,): sums of the one lose what sums of the other win."""

    def by_cluster(columns: Floats) -> Floats:
        return np.stack([np.bincount(clusters, weights=column, minlength=count) for column in columns.T], axis=1)

    ours, theirs = by_cluster(first.columns), by_cluster(second.columns)  # (K, m)

    def gap(swaps: Floats) -> Floats:
        moved = swaps @ (theirs - ours)  # (b, m)
        return first.of_sums(ours.sum(axis=0) + moved)[name] - second.of_sums(theirs.sum(axis=0) - moved)[name]

    return gap


def _ranked_gap(first: Measure, second: Measure, name: str, clusters: Codes) -> Callable[[Floats], Floats] | None:
    """The same for metrics of order: scores become ranks first, since those of two models have no common scale."""
    if first.scores is None or second.scores is None or first.labels is None:
        return None
    both = np.concatenate([_as_ranks(first.scores), _as_ranks(second.scores)])  # (2 M, k)
    labels = np.concatenate([first.labels, first.labels])
    ranked = replace(first, scores=both, labels=labels).ranked
    assert ranked is not None

    def gap(swaps: Floats) -> Floats:
        theirs = swaps[:, clusters]  # (b, M) 1 where the other's score is taken
        one = ranked(np.concatenate([1.0 - theirs, theirs], axis=1))[name]
        return one - ranked(np.concatenate([theirs, 1.0 - theirs], axis=1))[name]

    return gap


def _as_ranks(scores: Floats) -> Floats:
    return ranks(scores.ravel()).reshape(scores.shape)


def decisions_p(first: Measure, second: Measure, name: str) -> float:
    """McNemar's p of the decisions behind a metric: its own where it counts decisions, else the area's first.

    NaN without decisions that both are judged by. A tie is no decision.
    """
    own: str | None = name if name in first.right else next(iter(first.right), None)
    if own is None:
        return float("nan")
    one, other = first.right[own].ravel(), second.right[own].ravel()
    known = ~np.isnan(one) & ~np.isnan(other)
    return mcnemar_p(one[known] == 1, other[known] == 1) if known.any() else float("nan")
