"""Intervals of paired values: several models, each of one run or several, on the same draws of prompts.

All models are measured on the same resampled prompts, so what makes a draw easy for all of them does not widen the
interval of a difference (`ops/intervals.py`). With one run of each it is the percentile interval over prompts.

Several runs (seeds) of a model: the value is the mean over runs, and a two-level bootstrap resamples prompts and runs,
so that the interval covers what another seed would give (Davison and Hinkley 1997, "Bootstrap methods and their
application", section 3.8). Values of runs differ also since each errs on prompts of its own, which resampling prompts
shows already; with v_r the value of run r under a draw of prompts, v the mean over the R runs and s^2 the variance of
the values,

    variance of the mean that is due to runs = max(0, s^2 / R - mean_r var(v_r - v) / (R - 1)),

and the deviations of runs are shrunk to it before they are resampled (scaled by sqrt(R / (R - 1)) too, for resampling R
of them gives (R - 1) / R of the variance of their mean: Rao and Wu 1988). Few seeds say little about their spread, so
the interval is Student's, with the degrees of freedom of Welch (1947) and Satterthwaite (1946) over the parts of the
variance: prompts, and the runs of either side. With one run the variance of its seed is unknown and in no interval.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from saferlhf.evaluation.judgement_measures import Measure
from saferlhf.ops.intervals import (
    Codes,
    Interval,
    percentile_interval,
    resampled_statistics,
    resampled_sums,
    wilson,
)

Floats = NDArray[np.float64]

UNBOUNDED = ("nll", "mae", "quadratic_kappa")
"""Metrics that may lie outside of [0, 1]."""


class Estimate(NamedTuple):
    """A value with its interval, None where there is none."""

    value: float
    interval: Interval | None


# ------------------------------------------------------------------------------------------------ draws
RunDraws = Mapping[str, tuple[float, Floats]]
"""Metric of one run -> its value, and its values under the draws (draws,)."""


def sampled_runs(
    measures: Mapping[str, Sequence[Mapping[str, Measure]]], area: str, clusters: Codes, draws: int, seed: int
) -> dict[str, list[RunDraws]]:
    """Heading -> its runs, measured on the same draws of prompts: sums by one matrix product over all runs."""
    parts = [(heading, run[area]) for heading, runs in measures.items() for run in runs]
    width = parts[0][1].columns.shape[1]
    table = np.concatenate([measure.columns for _, measure in parts], axis=1)  # (M, runs * width)
    sums = resampled_sums(table, clusters, draws=draws, seed=seed) if draws else np.zeros((0, table.shape[1]))
    found: dict[str, list[RunDraws]] = {}
    for place, (heading, measure) in enumerate(parts):
        mine = slice(place * width, (place + 1) * width)
        whole = measure.of_sums(table[:, mine].sum(axis=0, keepdims=True))
        resampled = dict(measure.of_sums(sums[:, mine]))
        values = {name: float(value[0]) for name, value in whole.items()}
        if (ranked := measure.ranked) is not None:
            values |= {name: float(value[0]) for name, value in ranked(np.ones((1, len(table)))).items()}
            resampled |= resampled_statistics(ranked, clusters, draws=draws, seed=seed) if draws else {}
        none = np.zeros(0)
        run = {name: (value, resampled.get(name, none)) for name, value in values.items() if not np.isnan(value)}
        found.setdefault(heading, []).append(run)
    return found


def metric_names(sampled: Mapping[str, Mapping[str, Sequence[RunDraws]]]) -> list[str]:
    """Metrics that every run has, `<area>/<name>`."""
    found = []
    for area, models in sampled.items():
        runs = [run for several in models.values() for run in several]
        found += [f"{area}/{name}" for name in runs[0] if all(name in run for run in runs)]
    return found


@dataclass(frozen=True)
class Sampled:
    """One metric of one model.

    Attributes:
        values: (R,) of its runs.
        prompts: (draws,) mean over runs under the draws of prompts.
        both: (draws,) the same with runs resampled too.
        seed_variance: of the mean over runs, as far as it comes from the runs; 0 for a single one.
    """

    values: Floats
    prompts: Floats
    both: Floats
    seed_variance: float

    @classmethod
    def of(cls, runs: Sequence[RunDraws], name: str, heading: str, seed: int) -> Sampled:
        """Of runs that have this metric; how runs are drawn depends on seed and heading alone."""
        values = np.array([run[name][0] for run in runs])
        table = np.stack([run[name][1] for run in runs])  # (R, draws)
        prompts = table.mean(axis=0)
        count = len(runs)
        if count == 1 or not prompts.size:
            return cls(values, prompts, prompts, 0.0)
        whole = float(values.var(ddof=1)) / count
        of_prompts = float(np.mean([spread(row) ** 2 for row in table - prompts])) / (count - 1)
        seed_variance = max(0.0, whole - of_prompts)
        shrink = np.sqrt(seed_variance / whole) if whole else 0.0
        effects = shrink * np.sqrt(count / (count - 1)) * (values - values.mean())  # (R,)
        # not by the place among the models: their order changes nothing
        rng = np.random.default_rng([seed, zlib.crc32(heading.encode())])
        picked = effects[rng.integers(0, count, (prompts.size, count))].mean(axis=1)  # (draws,)
        return cls(values, prompts, prompts + picked, seed_variance)


class IntervalRules(NamedTuple):
    """How one metric's draws become intervals."""

    name: str
    clusters: int
    confidence: float

    def estimate(self, sides: Sequence[Sampled], signs: Sequence[float], trials: int | None = None) -> Estimate:
        """The signed sum of the sides, with its interval; `trials`: prompts that a share counts."""
        value = float(sum(sign * side.values.mean() for sign, side in zip(signs, sides, strict=True)))
        if self.clusters < 2 or not sides[0].prompts.size:
            return Estimate(value, None)
        sample = signed([side.both for side in sides], signs)
        if any(len(side.values) > 1 for side in sides):
            half = float(student.ppf(0.5 + self.confidence / 2, self.freedom(sides, signs))) * spread(sample)
            return Estimate(value, self._bounded(Interval(value - half, value + half), len(sides)))
        if trials is not None and value in (0.0, 1.0):  # no draw differs, which is not certainty
            return Estimate(value, wilson(value * trials, trials, self.confidence))
        return Estimate(value, percentile_interval(sample, self.confidence, trials or self.clusters))

    def freedom(self, sides: Sequence[Sampled], signs: Sequence[float]) -> float:
        """Degrees of freedom of the variance of a signed sum (Welch-Satterthwaite)."""
        parts = [(spread(signed([side.prompts for side in sides], signs)) ** 2, self.clusters - 1)]
        parts += [(side.seed_variance, len(side.values) - 1) for side in sides if len(side.values) > 1]
        whole = sum(variance for variance, _ in parts)
        return whole**2 / sum(variance**2 / freedom for variance, freedom in parts) if whole else np.inf

    def _bounded(self, interval: Interval, sides: int) -> Interval:
        """Student's interval may leave [0, 1], the metric may not."""
        if sides > 1 or self.name in UNBOUNDED:
            return interval
        return Interval(max(interval.low, 0.0), min(interval.high, 1.0))


def trials_of(measure: Measure, name: str, clusters: Codes) -> int | None:
    """Prompts that a share counts; None for what is no share."""
    counted = measure.shares.get(name)
    return None if counted is None else len(np.unique(clusters[counted]))


def signed(samples: Sequence[Floats], signs: Sequence[float]) -> Floats:
    """(draws,) the signed sum of samples of the same draws."""
    return np.asarray(sum(sign * sample for sign, sample in zip(signs, samples, strict=True)), np.float64)


def spread(sample: Floats) -> float:
    """Standard deviation of draws, which is the standard error of what was drawn; NaN draws are left out."""
    known = sample[~np.isnan(sample)]
    return float(known.std(ddof=1)) if known.size > 1 else 0.0
