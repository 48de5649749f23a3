"""Models beside each other on the rows of one protocol: values, and paired differences with intervals and tests.

Intervals are of draws that all models share (`paired_intervals.py`). For what a protocol rests on (its headline, and
those of further heads) the question "is the difference more than chance?" is asked too. With one run for each heading:
by randomisation, prompt by prompt, and beside it by McNemar's test of the decisions (`paired_tests.py`). With several
runs (seeds) under a heading: by Student's test, with the standard error and the degrees of freedom of the interval.

Holm's adjustment (`with_holm`) runs over all questions asked, and the smallest difference that could have been found
stands beside each: a difference that was not found may be there.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import t as student

from saferlhf.errors import UserError
from saferlhf.evaluation.headings import slug
from saferlhf.evaluation.judgement_measures import Aligned, Measure, aligned, areas_of, measures_of
from saferlhf.evaluation.judgements import Judgements
from saferlhf.evaluation.paired_intervals import (
    Estimate,
    IntervalRules,
    RunDraws,
    Sampled,
    metric_names,
    sampled_runs,
    signed,
    spread,
    trials_of,
)
from saferlhf.evaluation.paired_tests import decisions_p, swap_p
from saferlhf.ops.intervals import CONFIDENCE, DRAWS, Codes
from saferlhf.ops.significance import holm, minimum_detectable

ALSO_ASKED = ("cost/sign_accuracy", "severity/quadratic_kappa", "category/micro_f1")
"""Headlines beside the protocol's own, where all models have the head."""


@dataclass(frozen=True)
class Difference:
    """First minus second.

    Attributes:
        first, second: headings.
        estimate: of the difference.
        p: two-sided; NaN where the question was not asked or cannot be.
        p_holm: adjusted over all questions; NaN before `with_holm`.
        p_mcnemar: of the decisions, rows taken as independent; NaN without decisions or with several runs.
        mde: minimum detectable difference at a power of 0.8; NaN where the draws have no spread.
    """

    first: str
    second: str
    estimate: Estimate
    p: float = np.nan
    p_holm: float = np.nan
    p_mcnemar: float = np.nan
    mde: float = np.nan


@dataclass(frozen=True)
class MetricComparison:
    """One metric of all models.

    Attributes:
        metric: `<area>/<name>`.
        headline: whether it was asked if differences are more than chance.
        values: heading -> value.
        differences: of the pairs that were asked for.
    """

    metric: str
    headline: bool
    values: Mapping[str, Estimate]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class ProtocolComparison:
    """All models on one protocol.

    Attributes:
        protocol: its name.
        rows, prompts: how many all models have a verdict on.
        runs: heading -> number of its runs.
        left_out: heading -> rows that another model lacks.
        unjudged: heading -> rows without a verdict of its own.
        metrics: headlines first.
        notes: what else a reader must know.
    """

    protocol: str
    rows: int
    prompts: int
    runs: Mapping[str, int]
    left_out: Mapping[str, int]
    unjudged: Mapping[str, int]
    metrics: tuple[MetricComparison, ...]
    notes: tuple[str, ...] = ()


def compare_protocol(
    models: Mapping[str, Sequence[Judgements]],
    *,
    baseline: str | None = None,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> ProtocolComparison:
    """Hold models against each other on one protocol.

    Args:
        models: heading -> its runs, which are one model trained with different seeds; two headings at least.
        baseline: heading that each other is held against (other minus baseline); None: all pairs, earlier minus later.
        draws: bootstrap resamples and swaps; 0 for values without intervals and tests.
        confidence: of the intervals.
        seed: of the draws.

    Raises:
        UserError: judgements that cannot be compared (`aligned`), or a headline metric that does not exist.
    """
    pairs = pairs_of(list(models), baseline)
    rows = aligned(models)
    areas = areas_of(rows)
    measures = {heading: [measures_of(run, areas) for run in runs] for heading, runs in rows.runs.items()}
    sampled = {area: sampled_runs(measures, area, rows.clusters, draws, seed) for area in areas}
    asked = _headlines(rows, sampled)
    found = []
    for metric in [*asked, *(m for m in metric_names(sampled) if m not in asked)]:
        area, _, name = metric.partition("/")
        models_here = {heading: Sampled.of(runs, name, heading, seed) for heading, runs in sampled[area].items()}
        rules = IntervalRules(name, int(rows.clusters.max()) + 1, confidence)
        values = {
            heading: rules.estimate([given], [1.0], trials_of(measures[heading][0][area], name, rows.clusters))
            for heading, given in models_here.items()
        }
        differences = []
        for first, second in pairs:
            sides = [models_here[first], models_here[second]]
            found_here = Difference(first, second, rules.estimate(sides, [1.0, -1.0]))
            if metric in asked and draws:
                parts = [measures[heading][0][area] for heading in (first, second)]
                single = max(len(measures[heading]) for heading in (first, second)) == 1
                found_here = _tested(found_here, sides, parts if single else None, name, rules, rows.clusters, seed)
            differences.append(found_here)
        found.append(MetricComparison(metric, metric in asked, values, tuple(differences)))
    return ProtocolComparison(
        protocol=next(iter(models.values()))[0].protocol,
        rows=len(rows.clusters),
        prompts=int(rows.clusters.max()) + 1,
        runs={heading: len(runs) for heading, runs in rows.runs.items()},
        left_out=rows.left_out,
        unjudged=rows.unjudged,
        metrics=tuple(found),
        notes=rows.notes,
    )


def pairs_of(headings: Sequence[str], baseline: str | None = None) -> list[tuple[str, str]]:
    """(first, second) of the differences.

    Raises:
        UserError: fewer than two headings, or the baseline is none of them.
    """
    if len(headings) < 2:
        raise UserError("a comparison needs two models at least", "models", "models=[A,B]")
    if baseline is None:
        return list(itertools.combinations(headings, 2))
    if baseline not in headings:
        raise UserError(f"the baseline '{baseline}' is not among the models", "models", f"one of {', '.join(headings)}")
    return [(heading, baseline) for heading in headings if heading != baseline]


def with_holm(comparisons: Sequence[ProtocolComparison]) -> list[ProtocolComparison]:
    """The same with p-values adjusted over all questions of all protocols together."""
    asked = [d.p for c in comparisons for metric in c.metrics for d in metric.differences]
    adjusted = iter(holm(asked))

    def of_metric(metric: MetricComparison) -> MetricComparison:
        return replace(metric, differences=tuple(replace(d, p_holm=next(adjusted)) for d in metric.differences))

    return [replace(c, metrics=tuple(of_metric(metric) for metric in c.metrics)) for c in comparisons]


# ------------------------------------------------------------------------------------------------ flat
def flat_metrics(comparisons: Iterable[ProtocolComparison]) -> dict[str, float]:
    """`compare/<protocol>/<area>/<metric>/<model>` and `/<a>_minus_<b>`, with what belongs to them.

    Intervals are `_low` and `_high`; of headlines `_p`, `_p_holm`, `_p_mcnemar` and `_mde`. What has no value is left
    out.
    """
    found: dict[str, float] = {}
    for comparison in comparisons:
        area = f"compare/{comparison.protocol}"
        found |= {f"{area}/rows": float(comparison.rows), f"{area}/prompts": float(comparison.prompts)}
        for name, counts in (("left_out", comparison.left_out), ("unjudged", comparison.unjudged)):
            found |= {f"{area}/{name}/{slug(heading)}": float(count) for heading, count in counts.items() if count}
        for metric in comparison.metrics:
            full = f"{area}/{metric.metric}"
            for heading, estimate in metric.values.items():
                found |= _flat(f"{full}/{slug(heading)}", estimate)
            for d in metric.differences:
                name = f"{full}/{slug(d.first)}_minus_{slug(d.second)}"
                found |= _flat(name, d.estimate)
                more = {"p": d.p, "p_holm": d.p_holm, "p_mcnemar": d.p_mcnemar, "mde": d.mde}
                found |= {f"{name}_{ending}": value for ending, value in more.items() if not np.isnan(value)}
    return found


def _flat(name: str, estimate: Estimate) -> dict[str, float]:
    if np.isnan(estimate.value):
        return {}
    found = {name: estimate.value}
    if estimate.interval is not None:
        found |= {f"{name}_low": estimate.interval.low, f"{name}_high": estimate.interval.high}
    return found


def _headlines(rows: Aligned, sampled: Mapping[str, Mapping[str, Sequence[RunDraws]]]) -> list[str]:
    """The protocol's metric, and those of further heads.

    Raises:
        UserError: the models cannot be compared by the protocol's metric.
    """
    first = next(iter(rows.runs.values()))[0]
    known = metric_names(sampled)
    if first.metric not in known:
        what = f"{first.protocol} rests on {first.metric}, which not every model has"
        raise UserError(what, "models", f"known here: {', '.join(known)}")
    return [first.metric, *(metric for metric in ALSO_ASKED if metric in known and metric != first.metric)]


# ------------------------------------------------------------------------------------------------ tests
def _tested(
    found: Difference,
    sides: Sequence[Sampled],
    measures: Sequence[Measure] | None,
    name: str,
    rules: IntervalRules,
    clusters: Codes,
    seed: int,
) -> Difference:
    """With p-values and the minimum detectable difference; `measures` of both if each is one run, else None."""
    error = spread(signed([side.both for side in sides], [1.0, -1.0]))
    # models that say the same on every row: no draw can tell what else would have been seen
    mde = minimum_detectable(error, confidence=rules.confidence) if error else np.nan
    if measures is None:
        freedom = rules.freedom(sides, [1.0, -1.0])
        p = float(2 * student.sf(abs(found.estimate.value) / error, freedom)) if error else np.nan
        return replace(found, p=p, mde=mde)
    p = swap_p(measures[0], measures[1], name, clusters, draws=len(sides[0].prompts), seed=seed)
    return replace(found, p=p, p_mcnemar=decisions_p(measures[0], measures[1], name), mde=mde)
