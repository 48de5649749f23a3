"""Policies of different evaluations held against each other in pairs, from the samples that they left.

Win rates and differences are those of `policy_compare.against`, prompt by prompt. Responses of several runs under one
heading are put together as further responses to the same prompts: what another seed would give is then in the value,
and not in the interval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np

from saferlhf.evaluation.model_comparison import Difference, MetricComparison, ProtocolComparison, slug
from saferlhf.evaluation.paired_intervals import Estimate
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_compare import against
from saferlhf.evaluation.policy_metrics import policy_metrics
from saferlhf.ops.intervals import CONFIDENCE, DRAWS, Interval
from saferlhf.ops.significance import minimum_detectable

ASKED = (("safe_rate",), ("mean_helpfulness", "mean_reward"))
"""Headlines of policies: of each group the first that all of them have."""


def compare_policies(
    protocol: str,
    prompts: PromptSet,
    policies: Mapping[str, Sequence[PolicyAnswers]],
    pairs: Sequence[tuple[str, str]],
    *,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> tuple[ProtocolComparison, dict[str, dict[str, float]]]:
    """Hold policies against each other on the same prompts.

    Args:
        protocol: its name.
        prompts: n prompts that all policies answered.
        policies: heading -> the answers of its runs.
        pairs: (first, second) of the differences.
        draws, confidence, seed: of the bootstrap.

    Returns:
        the headlines as of any protocol; `a − b` -> all that `policy_compare.against` finds.
    """
    options: dict[str, Any] = {"draws": draws, "confidence": confidence, "seed": seed}
    answers = {heading: pooled(runs) for heading, runs in policies.items()}
    own = {heading: policy_metrics(prompts, mine, prefix="p", **options) for heading, mine in answers.items()}
    found = {f"{a} − {b}": against(prompts, answers[a], answers[b], **options) for a, b in pairs}
    asked = [next((n for n in names if all(f"p/{n}" in m for m in own.values())), None) for names in ASKED]
    metrics = []
    for name in filter(None, asked):
        values = {heading: _estimate(m, f"p/{name}") for heading, m in own.items()}
        differences = [_difference(a, b, found[f"{a} − {b}"], f"difference/{name}", confidence) for a, b in pairs]
        metrics.append(MetricComparison(f"policy/{name}", True, values, tuple(differences)))
    runs = {heading: len(several) for heading, several in policies.items()}
    notes = ["responses of several runs are put together: intervals are over prompts alone"] * (max(runs.values()) > 1)
    none = dict.fromkeys(policies, 0)
    distinct = len(set(prompts.texts))
    return ProtocolComparison(protocol, len(prompts), distinct, runs, none, none, tuple(metrics), tuple(notes)), found


def policy_flat(protocol: str, pairs: Mapping[str, Mapping[str, float]], headlines: Sequence[str]) -> dict[str, float]:
    """`compare/<protocol>/policy/<name>/<a>_over_<b>` for win rates, `.../<a>_minus_<b>` for differences.

    Args:
        protocol: its name.
        pairs: as `compare_policies` gives them.
        headlines: names that are told elsewhere, `policy/<name>`.
    """
    found: dict[str, float] = {}
    for text, metrics in pairs.items():
        first, second = (slug(heading) for heading in text.split(" − "))
        for full, value in metrics.items():
            name, between = full, "over"
            if full.startswith("difference/"):
                name, between = full.removeprefix("difference/"), "minus"
            ending = next((e for e in ("_low", "_high", "_n", "_p") if name.endswith(e)), "")
            name = name.removesuffix(ending)
            if between == "over" or f"policy/{name}" not in headlines:
                found[f"compare/{protocol}/policy/{name}/{first}_{between}_{second}{ending}"] = value
    return found


def pooled(runs: Sequence[PolicyAnswers]) -> PolicyAnswers:
    """The responses of several runs as those of one policy; a judge's output counts where all runs have it."""
    first, *others = runs
    if not others:
        return first
    judged = {}
    for judge, said in first.judged.items():
        same = [run.judged[judge] for run in others if judge in run.judged]
        if len(same) == len(others):
            outputs = [o for o in said.values if all(o in other.values for other in same)]
            joined = {
                o: np.concatenate([said.values[o], *(other.values[o] for other in same)], axis=1) for o in outputs
            }
            judged[judge] = Judged(joined)
    known = [run.kl for run in runs if run.kl is not None]
    return replace(
        first,
        texts=tuple(sum(parts, ()) for parts in zip(*(run.texts for run in runs), strict=True)),
        tokens=np.concatenate([run.tokens for run in runs], axis=1),
        truncated=np.concatenate([run.truncated for run in runs], axis=1),
        kl=np.concatenate(known, axis=1) if len(known) == len(runs) else None,
        judged=judged,
    )


def _estimate(metrics: Mapping[str, float], name: str) -> Estimate:
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return Estimate(metrics[name], None if low is None or high is None else Interval(low, high))


def _difference(first: str, second: str, metrics: Mapping[str, float], name: str, confidence: float) -> Difference:
    if name not in metrics:  # no prompt on which both are judged
        return Difference(first, second, Estimate(np.nan, None))
    estimate = _estimate(metrics, name)
    mde = np.nan
    if estimate.interval is not None and estimate.interval.high > estimate.interval.low:
        width = estimate.interval.high - estimate.interval.low
        # the interval's half is so many standard errors, for a mean over many prompts
        error = width / 2 / NormalDist().inv_cdf(0.5 + confidence / 2)
        mde = minimum_detectable(error, confidence=confidence)
    return Difference(first, second, estimate, p=metrics.get(f"{name}_p", np.nan), mde=mde)
