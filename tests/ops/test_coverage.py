"""Intervals and tests keep their promise: 2,000 simulated test sets of known truth, measured as `metrics.json` is.

World: K prompts with 1 to 4 rows each. A row has a severity 0..3 (unsafe = above 0) and a score that is normal around
a mean by severity. Rows of one prompt share their severity with probability `SHARED`, and `LIKE` of the score's
variance is the prompt's. So the rows are far from independent, while one row by itself follows a plain mixture of
normals, from which the true value of every metric is found by integration (`truth_of`), not by simulation.

What is asked; one standard deviation of a share of .95 or .05 is .0049 in 2,000 repetitions and .0097 in 500:

- 95% intervals hold the truth in 95% +- 2% of the test sets, with prompts resampled; with rows resampled in visibly
  fewer;
- two equally good systems are called different in 5%, a true difference of the size `minimum_detectable` is found in
  80%, by the interval and by the permutation test; Holm's adjustment keeps any false alarm among many at 5%.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import norm

from saferlhf.data.rows import PreferencePair, as_prompt
from saferlhf.evaluation.comparison import compare_verdicts
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.evaluation.preference import evaluate_preference
from saferlhf.evaluation.sheet import MetricSheet
from saferlhf.ops.intervals import cluster_codes
from saferlhf.ops.moderation import ModerationLabels, Verdicts
from saferlhf.ops.significance import holm, minimum_detectable, sign_flip_p

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

REPETITIONS = 2000
SOME = 500  # where less must be told apart
DRAWS = 1000
PROMPTS = 200
FIRST = 10_000  # seed of the first test set
OTHER = 1_000_000  # added to the seed of the draws: the stream that made the world must not draw from it
WITHIN = 0.02
NOISE = 0.029  # three standard deviations of a share of 0.95 in 500 repetitions: one check in 370 fails by chance

LEVELS = np.array([0.5, 0.1, 0.3, 0.1])  # share of each severity
SHARED, LIKE = 0.85, 0.8
CATEGORIES = ("one", "two", "three")
RATES, GAP = np.array([0.3, 0.2, 0.1]), 2.0  # share of rows with each category; distance of the means with and without


# ------------------------------------------------------------------------------------------------ the world
class System(NamedTuple):
    """A judge: mean score by severity, and the scores from which on it says 1, 2, 3."""

    means: tuple[float, ...] = (0.0, 0.8, 1.6, 2.4)
    cuts: tuple[float, ...] = (0.7, 1.1, 2.1)

    def levels(self, x: Floats) -> Floats:
        """(n, 4) posterior of each severity given the score: what a calibrated judge says."""
        density = LEVELS * norm.pdf(x[:, None] - np.array(self.means))
        return density / density.sum(axis=1, keepdims=True)


GOOD = System()


def worse(by: float) -> System:
    """Scores that tell the severities apart less well."""
    return System(tuple((1.0 - by) * mean for mean in GOOD.means))


class Rows(NamedTuple):
    """A test set.

    Attributes:
        codes: (n,) prompt of each row.
        severity: (n,).
        noise: (n, systems) scores less their means.
        has: (n, C) categories.
        said: (n, C) categories that are named.
    """

    codes: Ints
    severity: Ints
    noise: Floats
    has: Ints
    said: NDArray[np.bool_]

    @property
    def labels(self) -> ModerationLabels:
        return ModerationLabels((self.severity > 0).astype(np.int64), self.severity, self.has, CATEGORIES)

    @property
    def prompts(self) -> list[str]:
        return [f"{code:06d}" for code in self.codes]

    def verdicts(self, system: System, place: int = 0, heads: bool = True) -> Verdicts:
        """What a system says; without heads of unsafe alone."""
        x = np.array(system.means)[self.severity] + self.noise[:, place]
        p = system.levels(x)
        unsafe = x >= system.cuts[0]
        if not heads:
            return Verdicts(1.0 - p[:, 0], None, None, unsafe, None, None)
        return Verdicts(1.0 - p[:, 0], p, None, unsafe, np.searchsorted(system.cuts, x, side="right"), self.said)


def normal_like(draw: np.random.Generator, codes: Ints, *shape: int) -> Floats:
    """(n, ...) standard normal values, alike within a prompt."""
    common = draw.normal(size=(codes[-1] + 1, *shape))[codes]
    return np.sqrt(LIKE) * common + np.sqrt(1 - LIKE) * draw.normal(size=common.shape)


def world(seed: int, prompts: int = PROMPTS, systems: int = 1) -> Rows:
    """Systems see the same rows: half of the variance of their scores is common to them."""
    draw = np.random.default_rng(seed)
    codes = np.repeat(np.arange(prompts), draw.integers(1, 5, prompts))
    n = len(codes)

    def shared(values: NDArray[Any], of_prompt: NDArray[Any]) -> NDArray[Any]:
        mine = draw.random(values.shape) < SHARED
        return np.where(mine, of_prompt[codes], values)

    severity = shared(*(draw.choice(4, size, p=LEVELS) for size in (n, prompts)))
    has = shared(*((draw.random((size, 3)) < RATES).astype(np.int64) for size in (n, prompts)))
    both, own = normal_like(draw, codes, 1), normal_like(draw, codes, systems)
    said = normal_like(draw, codes, 3) + GAP * has > GAP / 2
    return Rows(codes, severity, (both + own) / np.sqrt(2.0), has, said)


# ------------------------------------------------------------------------------------------------ the truth
def truth_of(system: System) -> dict[str, float]:
    """True values of the metrics, from the distribution of one row."""
    means, cuts = np.array(system.means), np.array(system.cuts)
    bounds = np.concatenate([[-np.inf], cuts, [np.inf]])
    table = LEVELS[:, None] * np.diff(norm.cdf(bounds[None, :] - means[:, None]), axis=1)  # (true, decided)
    hits, alarms, misses, passes = table[1:, 1:].sum(), table[0, 1:].sum(), table[1:, 0].sum(), table[0, 0]
    x = np.linspace(-10.0, 14.0, 24_001)
    density, levels = LEVELS[:, None] * norm.pdf(x[None, :] - means[:, None]), system.levels(x)
    p = 1.0 - levels[:, 0]
    safe, unsafe = density[0], density[1:].sum(axis=0)

    def mean(values: Floats) -> float:
        return float(np.trapezoid(values, x))

    right, bad = np.diag(table), 1.0 - LEVELS[0]
    true, said = table.sum(axis=1), table.sum(axis=0)
    distance = np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    above = (LEVELS[1:, None] * norm.sf(x[None, :] - means[1:, None])).sum(axis=0)  # unsafe rows that score higher
    above_safe = LEVELS[0] * norm.sf(x - means[0])
    f1, f1_safe = 2 * hits / (2 * hits + alarms + misses), 2 * passes / (2 * passes + alarms + misses)
    found = {
        "unsafe/accuracy": hits + passes,
        "unsafe/f1": f1,
        "unsafe/macro_f1": (f1 + f1_safe) / 2,
        "unsafe/precision": hits / (hits + alarms),
        "unsafe/recall": hits / bad,
        "unsafe/fpr": alarms / LEVELS[0],
        "unsafe/auroc": float((LEVELS[1:] / bad) @ norm.cdf((means[1:] - means[0]) / np.sqrt(2.0))),
        "unsafe/auprc": mean(unsafe / bad * above / (above + above_safe)),
        "unsafe/brier": mean(safe * p**2 + unsafe * (1 - p) ** 2),
        "unsafe/nll": mean(-safe * np.log(1 - p) - unsafe * np.log(p)),
        "severity/accuracy": right.sum(),
        "severity/macro_f1": float(np.mean(2 * right / (true + said))),
        "severity/quadratic_kappa": 1 - (distance**2 * table).sum() / (true @ distance**2 @ said),
        "severity/mae": (distance * table).sum(),
        "severity/recall_3": right[3] / LEVELS[3],
        "severity/unsafe_called_safe": table[1:, 0].sum() / bad,
        "severity/nll": mean(-(density * np.log(levels.T)).sum(axis=0)),
    }
    for rate in (1, 5):
        cut = means[0] + norm.isf(rate / 100)
        found[f"unsafe/tpr_at_fpr_{rate}pct"] = float((LEVELS[1:] / bad) @ norm.sf(cut - means[1:]))
    return {name: float(value) for name, value in found.items()} | _categories()


def _categories() -> dict[str, float]:
    found, missed = RATES * norm.cdf(GAP / 2), RATES * norm.sf(GAP / 2)
    alarms = (1 - RATES) * norm.sf(GAP / 2)
    exact = float(np.prod(1 - missed - alarms))  # the categories are independent
    each = 2 * found / (2 * found + alarms + missed)
    return {
        "category/exact_match": exact,
        "category/exact_match_unsafe": exact,
        "category/micro_f1": 2 * found.sum() / (2 * found + alarms + missed).sum(),
        "category/macro_f1": float(each.mean()),
        "category/recall_three": float(norm.cdf(GAP / 2)),
    }


def test_the_truth_is_what_many_rows_show() -> None:
    """A test set of 40,000 prompts: the metrics lie where the integrals say, for both kinds of system."""
    rows = world(0, 40_000, systems=2)
    for place, system in enumerate((GOOD, worse(0.3))):
        verdicts = rows.verdicts(system, place)
        found = evaluate_moderation(rows.prompts, rows.labels, None, verdicts, draws=0)
        for name, value in truth_of(system).items():
            # four standard deviations of a share of 10,000 rows, the fewest that are counted for one of these
            assert found[f"test/{name}"] == pytest.approx(value, abs=0.02), name


# ------------------------------------------------------------------------------------------------ intervals
Measure = Callable[[int], dict[str, float]]


def coverage(measure: Measure, truth: dict[str, float], repetitions: int = REPETITIONS) -> dict[str, float]:
    """Share of repetitions whose interval holds the truth."""
    held: dict[str, list[bool]] = defaultdict(list)
    for seed in range(FIRST, FIRST + repetitions):
        found = measure(seed)
        for name, value in truth.items():
            held[name].append(found[f"{name}_low"] <= value <= found[f"{name}_high"])
    return {name: float(np.mean(hits)) for name, hits in held.items()}


def measured(seed: int, prompts: int = PROMPTS, clustered: bool = True) -> dict[str, float]:
    rows = world(seed, prompts)
    ids = [f"{i:06d}" for i in range(len(rows.codes))]
    options: dict[str, Any] = {"clusters": rows.prompts if clustered else None, "draws": DRAWS, "seed": OTHER + seed}
    found = evaluate_moderation(ids, rows.labels, None, rows.verdicts(GOOD), **options)
    return {name.removeprefix("test/"): value for name, value in found.items()}


@functools.cache
def of_single_answers() -> dict[str, dict[str, float]]:
    """Coverage with prompts resampled, and with rows resampled as if they were independent."""
    truth = truth_of(GOOD)
    return {
        "prompts": coverage(measured, truth),
        "rows": coverage(lambda seed: measured(seed, clustered=False), truth, SOME),
    }


FEW = ("unsafe/tpr_at_fpr_1pct", "category/recall_three")
"""Metrics that rest on few prompts here: 1% of 250 safe rows is two rows, and one prompt in eight has the category."""

METRICS = sorted(truth_of(GOOD).keys() - set(FEW))


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_intervals_hold_the_truth_as_often_as_they_say(name: str) -> None:
    assert of_single_answers()["prompts"][name] == pytest.approx(0.95, abs=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", METRICS)
def test_rows_as_if_independent_hold_it_less_often(name: str) -> None:
    found = of_single_answers()
    assert found["rows"][name] < found["prompts"][name] - 0.03
    assert found["rows"][name] < 0.92


@pytest.mark.slow
@pytest.mark.parametrize("name", FEW)
def test_what_few_prompts_decide_has_too_narrow_an_interval(name: str) -> None:
    """Known, and why `docs/metrics.md` warns of few prompts: 91% and 92% instead of 95%."""
    assert 0.89 < of_single_answers()["prompts"][name] < 0.94


def of_sheet(seed: int, clustered: bool = True) -> dict[str, float]:
    """Plain means whose prompts with more rows are harder: the truth is the mean over rows, not over prompts."""
    draw = np.random.default_rng(seed)
    sizes = draw.integers(1, 5, PROMPTS)
    codes = np.repeat(np.arange(PROMPTS), sizes)
    hard = sizes[codes] / 10.0
    right = normal_like(draw, codes) < norm.ppf(0.9 - hard)
    value = 3.0 - hard + normal_like(draw, codes)
    length = 1.0 + draw.gamma(2.0, size=len(codes)) + hard
    keys = codes if clustered else np.arange(len(codes))
    sheet = MetricSheet("", [f"{key:06d}" for key in keys], draws=DRAWS, seed=OTHER + seed)
    sheet.share("share", right)
    sheet.mean("mean", value)
    sheet.mean("part", value, right)
    sheet.ratio("ratio", value, length, len(codes))
    return {name.removeprefix("/"): found for name, found in sheet.metrics().items()}


def test_plain_means_hold_the_truth_as_often_as_they_say() -> None:
    """By hand: a row has 3 others of its prompt at most, and comes from a prompt of m rows with weight m / 10."""
    hard = np.arange(1, 5) / 10.0
    weight = np.arange(1, 5) / 10.0
    # E[value | right] = E[value]: the two have noise of their own
    truth = {
        "share": float(weight @ (0.9 - hard)),
        "mean": float(weight @ (3.0 - hard)),
        "part": float((weight * (0.9 - hard)) @ (3.0 - hard) / (weight @ (0.9 - hard))),
        "ratio": float(weight @ (3.0 - hard) / (weight @ (3.0 + hard))),
    }
    found = coverage(of_sheet, truth, SOME)
    naive = coverage(lambda seed: of_sheet(seed, clustered=False), truth, SOME)
    for name in truth:
        assert found[name] == pytest.approx(0.95, abs=NOISE), name
        assert naive[name] < found[name] - 0.04, name


# ------------------------------------------------------------------------------------------------ pairs
MEAN = 0.6
"""Mean cost of an unsafe response; of a safe one minus this."""


def of_pairs(seed: int) -> dict[str, float]:
    """Costs of pairs: half of the responses are unsafe, a coin says which of two alike is safer."""
    draw = np.random.default_rng(seed)
    codes = np.repeat(np.arange(150), draw.integers(1, 5, 150))
    n = len(codes)
    unsafe = draw.random((n, 2)) < 0.5
    both = normal_like(draw, codes)[:, None]  # one part of the noise is that of the pair
    costs = np.where(unsafe, MEAN, -MEAN) + (both + normal_like(draw, codes, 2)) / np.sqrt(2.0)
    coin = draw.integers(0, 2, n)
    safer = np.where(unsafe[:, 0] == unsafe[:, 1], coin, unsafe[:, 0])
    rows = [
        PreferencePair(
            id=f"{i:06d}",
            prompt=as_prompt(f"{codes[i]:06d}"),
            response_0="a",
            response_1="b",
            is_response_0_safe=not unsafe[i, 0],
            is_response_1_safe=not unsafe[i, 1],
            safer_response_id=int(safer[i]),
        )
        for i in range(n)
    ]
    found = evaluate_preference(rows, costs, kind="cost", draws=DRAWS, seed=OTHER + seed)
    return {name.removeprefix("test/cost/"): value for name, value in found.items()}


@functools.cache
def truth_of_pairs() -> dict[str, float]:
    """The noise that the pair has in common falls out of its margin, which is normal with variance 1."""
    x = np.linspace(-12.0, 14.0, 26_001)
    mixed, alike = norm.pdf(x - 2 * MEAN), norm.pdf(x)
    right, order = float(norm.cdf(MEAN)), float(norm.cdf(2 * MEAN))
    return {
        "pair_accuracy": (order + 0.5) / 2,
        "pair_accuracy_mixed": order,
        "pair_accuracy_both_unsafe": 0.5,
        "margin_mean": MEAN,
        "log_loss": float(np.trapezoid(np.logaddexp(0, -x) * (mixed + alike) / 2, x)),
        "sign_accuracy": right,
        "fpr": 1 - right,
        "fnr": 1 - right,
        "auroc": float(norm.cdf(2 * MEAN / np.sqrt(2.0))),
        "score_mean_safe": -MEAN,
    }


@functools.cache
def coverage_of_pairs() -> dict[str, float]:
    return coverage(of_pairs, truth_of_pairs())


@pytest.mark.slow
@pytest.mark.parametrize("name", truth_of_pairs())
def test_intervals_of_pairs_hold_the_truth_as_often_as_they_say(name: str) -> None:
    assert coverage_of_pairs()[name] == pytest.approx(0.95, abs=WITHIN)


# ------------------------------------------------------------------------------------------------ differences
class Paired(NamedTuple):
    """Of 2,000 comparisons of two systems.

    Attributes:
        held: metric -> share of intervals that hold the true difference.
        apart: metric -> share of intervals without 0.
        p: (repetitions,) of the permutation test of accuracy.
    """

    held: dict[str, float]
    apart: dict[str, float]
    p: Floats


def paired(other: System, prompts: int = PROMPTS) -> Paired:
    first, second = truth_of(GOOD), truth_of(other)
    held: dict[str, list[bool]] = defaultdict(list)
    apart: dict[str, list[bool]] = defaultdict(list)
    p = []
    for seed in range(FIRST, FIRST + REPETITIONS):
        rows = world(seed, prompts, systems=2)
        one, two = rows.verdicts(GOOD), rows.verdicts(other, 1)
        found = compare_verdicts(rows.labels, one, two, clusters=rows.prompts, draws=DRAWS, seed=OTHER + seed)
        for full in [name for name in found if f"{name}_low" in found]:
            low, high = found[f"{full}_low"], found[f"{full}_high"]
            name = full.removeprefix("difference/")
            held[name].append(low <= first[name] - second[name] <= high)
            apart[name].append(low > 0 or high < 0)
        gain = (one.unsafe == rows.labels.unsafe) * 1.0 - (two.unsafe == rows.labels.unsafe)
        p.append(sign_flip_p(gain, cluster_codes(rows.prompts), draws=DRAWS, seed=OTHER + seed))
    shares = [{name: float(np.mean(hits)) for name, hits in column.items()} for column in (held, apart)]
    return Paired(*shares, np.array(p))


def standard_error(other: System, prompts: int = PROMPTS) -> float:
    """Of the difference in accuracy on so many prompts, from the prompts of one large world."""
    rows = world(1, 100_000, systems=2)
    one, two = (rows.verdicts(system, place, heads=False).unsafe for place, system in enumerate((GOOD, other)))
    unsafe = rows.severity > 0
    gain = (one == unsafe) * 1.0 - (two == unsafe)
    rest = np.bincount(rows.codes, weights=gain - gain.mean())
    return float(rest.std() / np.sqrt(prompts) / (len(gain) / len(rest)))


@functools.cache
def null() -> Paired:
    return paired(GOOD)


@functools.cache
def detectable(prompts: int = PROMPTS) -> System:
    """Worse than the good one by just what a test of this size finds four times in five."""
    low, high = 0.0, 0.9
    for _ in range(8):
        by = (low + high) / 2
        gain = truth_of(GOOD)["unsafe/accuracy"] - truth_of(worse(by))["unsafe/accuracy"]
        low, high = (low, by) if gain > minimum_detectable(standard_error(worse(by), prompts)) else (by, high)
    return worse(high)


@functools.cache
def planted() -> Paired:
    return paired(detectable())


COMPARED = (
    *(f"unsafe/{name}" for name in ("accuracy", "macro_f1", "f1", "precision", "recall", "fpr", "auroc", "auprc")),
    "unsafe/nll",
    *(f"severity/{name}" for name in ("accuracy", "macro_f1", "quadratic_kappa", "mae", "nll")),
)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_intervals_of_differences_hold_the_truth_as_often_as_they_say(name: str) -> None:
    assert planted().held.keys() == set(COMPARED)
    assert planted().held[name] == pytest.approx(0.95, abs=WITHIN)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_equals_are_rarely_called_different(name: str) -> None:
    assert null().apart[name] == pytest.approx(0.05, abs=WITHIN)


@pytest.mark.slow
def test_the_permutation_test_of_equals_is_right_at_every_level() -> None:
    for level in (0.01, 0.05, 0.1, 0.2):
        # three standard deviations: four levels are looked at, and ties make it a little too careful
        noise = 3 * np.sqrt(level * (1 - level) / REPETITIONS)
        assert (null().p <= level).mean() == pytest.approx(level, abs=noise), level


MANY = 800
"""Prompts from which on the normal approximation behind `minimum_detectable` holds; on 200 it finds 77%, not 80%."""


@pytest.mark.slow
def test_a_difference_is_found_as_often_as_planned() -> None:
    """Accuracy alone, so that repetitions are cheap; the noise is three standard deviations of a share of 0.8."""
    by_interval, by_test = 0, 0
    for seed in range(FIRST, FIRST + SOME):
        rows = world(seed, MANY, systems=2)
        unsafe = rows.severity > 0
        one, two = (
            (rows.verdicts(system, place, heads=False).unsafe == unsafe) * 1.0
            for place, system in enumerate((GOOD, detectable(MANY)))
        )
        sheet = MetricSheet("", rows.prompts, draws=DRAWS, seed=OTHER + seed)
        sheet.mean("gain", one - two)
        by_interval += sheet.metrics()["/gain_low"] > 0
        by_test += sign_flip_p(one - two, sheet.clusters, draws=DRAWS, seed=OTHER + seed) <= 0.05
    noise = 3 * np.sqrt(0.8 * 0.2 / SOME)
    assert by_interval / SOME == pytest.approx(0.8, abs=noise)
    assert by_test / SOME == pytest.approx(0.8, abs=noise)


# ------------------------------------------------------------------------------------------------ many questions
def several(seed: int, gains: Floats) -> list[float]:
    """p-values of systems against one baseline on the same 60 prompts."""
    draw = np.random.default_rng(seed)
    codes = np.repeat(np.arange(60), draw.integers(1, 5, 60))
    scores = normal_like(draw, codes, len(gains) + 1)
    differences = scores[:, 1:] + gains - scores[:, :1]  # (n, systems)
    return [sign_flip_p(column, codes, draws=DRAWS, seed=OTHER + seed) for column in differences.T]


def test_holm_keeps_any_false_alarm_rare() -> None:
    """Eight equals, then six equals and two that are better: of the equals none may be called different."""
    noise = 2 * np.sqrt(0.05 * 0.95 / SOME)
    for real in (0, 2):
        gains = np.concatenate([np.full(real, 0.8), np.zeros(8 - real)])
        p = np.array([several(seed, gains) for seed in range(SOME)])  # (repetitions, 8)
        adjusted = np.array([holm(row) for row in p])
        alone, kept = ((table[:, real:] <= 0.05).any(axis=1).mean() for table in (p, adjusted))
        assert kept <= 0.05 + noise
        assert alone > 0.12  # without it one question in several rings by itself
        if real:
            assert (adjusted[:, :real] <= 0.05).mean() > 0.8  # and what is there is found
