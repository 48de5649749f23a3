"""Intervals against naive loops, published values and their own promise: coverage."""

import math

import numpy as np
import pytest
from expanded import expanded

from saferlhf.ops import intervals
from saferlhf.ops.metrics import auroc, weighted_auroc


# ------------------------------------------------------------------------------------------------ Wilson
def test_wilson_known_values():
    # 8 of 10 at 95%: Brown, Cai and DasGupta's formula worked by hand with z = 1.959964
    low, high = intervals.wilson(8, 10)
    assert (low, high) == pytest.approx((0.490162, 0.943318), abs=1e-6)
    # no success: high = z^2 / (n + z^2)
    assert intervals.wilson(0, 10) == pytest.approx((0.0, 3.841459 / 13.841459), abs=1e-6)
    assert intervals.wilson(10, 10).high == 1.0


def test_wilson_solves_the_score_equation():
    for successes, total in ((3, 17), (55, 60), (0.5, 4)):
        share = successes / total
        for bound in intervals.wilson(successes, total, confidence=0.9):
            # |share - p| = z sqrt(p (1 - p) / n) at each bound
            assert abs(share - bound) == pytest.approx(1.6448536 * np.sqrt(bound * (1 - bound) / total), abs=1e-6)


def test_wilson_edges():
    assert intervals.wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes"):
        intervals.wilson(5, 4)
    with pytest.raises(ValueError, match="confidence"):
        intervals.wilson(1, 4, confidence=95)


# ------------------------------------------------------------------------------------------------ bootstrap
def clustered(seed: int = 0, clusters: int = 12):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 5, clusters)
    codes = np.repeat(np.arange(clusters), sizes)
    values = rng.normal(size=clusters)[codes] + rng.normal(size=codes.size)
    return codes, values


def test_resampled_sums_equal_a_naive_loop():
    codes, values = clustered()
    table = np.stack([values, np.ones_like(values)], axis=1)
    fast = intervals.resampled_sums(table, codes, draws=50, seed=7)
    taken = np.random.default_rng(7).integers(0, 12, size=(50, 12))
    for draw in range(50):
        rows = np.concatenate([np.flatnonzero(codes == cluster) for cluster in taken[draw]])
        assert fast[draw] == pytest.approx(table[rows].sum(axis=0))


def test_blocks_do_not_change_the_draws(monkeypatch):
    codes, values = clustered()
    whole = intervals.resampled_sums(values[:, None], codes, draws=100, seed=1)
    monkeypatch.setattr(intervals, "_BLOCK_ELEMENTS", 12 * 7)
    blocks = list(intervals._draw_counts(12, 100, 1))
    assert max(block.shape[0] for block in blocks) == 7  # memory is bounded
    assert all((block.sum(axis=1) == 12).all() for block in blocks)
    intervals._kept_counts.cache_clear()
    assert intervals.resampled_sums(values[:, None], codes, draws=100, seed=1) == pytest.approx(whole)


def test_draws_that_are_kept_are_those_that_are_drawn(monkeypatch):
    """A byte holds a count; where there are too many to keep they are drawn each time."""
    codes, values = clustered(clusters=300)
    kept = intervals.resampled_sums(values[:, None], codes, draws=50, seed=4)
    again = intervals.resampled_sums(values[:, None], codes, draws=50, seed=4)
    assert (kept == again).all()
    monkeypatch.setattr(intervals, "_KEPT_ELEMENTS", 300 * 50 - 1)
    assert intervals.resampled_sums(values[:, None], codes, draws=50, seed=4) == pytest.approx(kept)
    assert intervals.resampled_sums(values[:, None], codes, draws=50, seed=5) != pytest.approx(kept)


def test_bootstrap_mean_agrees_with_a_naive_bootstrap():
    codes, values = clustered(clusters=40)
    low, high = intervals.bootstrap_mean(values, codes, draws=10_000, seed=0)
    rng = np.random.default_rng(99)
    means = []
    for _ in range(10_000):
        rows = np.concatenate([np.flatnonzero(codes == cluster) for cluster in rng.integers(0, 40, 40)])
        means.append(values[rows].mean())
    assert (low, high) == pytest.approx(expanded(means, 40), abs=0.02)


def test_same_seed_same_interval_whatever_the_row_order():
    codes, values = clustered()
    keys = [f"prompt {code}" for code in codes]
    order = np.random.default_rng(5).permutation(len(keys))
    first = intervals.bootstrap_mean(values, intervals.cluster_codes(keys), seed=3)
    second = intervals.bootstrap_mean(values[order], intervals.cluster_codes([keys[i] for i in order]), seed=3)
    assert first == pytest.approx(second, abs=1e-12)
    assert first != intervals.bootstrap_mean(values, intervals.cluster_codes(keys), seed=4)


def test_cluster_codes():
    assert intervals.cluster_codes(["b", "a", "b"]).tolist() == [1, 0, 1]
    assert intervals.cluster_codes([]).size == 0


def test_rows_of_one_prompt_are_not_independent():
    """Every row four times: a row-wise interval would halve; the clustered one must not move."""
    rng = np.random.default_rng(1)
    values = rng.random(100)
    alone = intervals.bootstrap_mean(values, seed=0)
    copied = intervals.bootstrap_mean(np.repeat(values, 4), np.repeat(np.arange(100), 4), seed=0)
    naive = intervals.bootstrap_mean(np.repeat(values, 4), seed=0)
    assert copied == pytest.approx(alone)
    assert (naive.high - naive.low) < 0.6 * (alone.high - alone.low)


def test_ratios_are_computed_together_and_separately_alike():
    codes, values = clustered()
    over = np.stack([values, values * (values > 0)], axis=1)
    under = np.stack([np.ones_like(values), (values > 0) * 1.0], axis=1)
    both = intervals.bootstrap_ratios(over, under, codes, draws=500, seed=2)
    for column in range(2):
        (single,) = intervals.bootstrap_ratios(over[:, [column]], under[:, [column]], codes, draws=500, seed=2)
        assert single == pytest.approx(both[column])


def test_bootstrap_statistic_equals_the_matrix_product():
    codes, values = clustered()
    fast = intervals.bootstrap_mean(values, codes, draws=400, seed=6)
    slow = intervals.bootstrap_statistic(lambda w: float((w * values).sum() / w.sum()), codes, draws=400, seed=6)
    assert slow == pytest.approx(fast)


def test_bootstrap_of_auroc_equals_resampled_rows():
    rng = np.random.default_rng(0)
    codes = np.repeat(np.arange(30), 2)
    labels = rng.integers(0, 2, 60)
    scores = labels + rng.normal(size=60)
    found = intervals.bootstrap_statistic(weighted_auroc(scores, labels), codes, draws=300, seed=8)
    sample = []
    for draw in np.random.default_rng(8).integers(0, 30, size=(300, 30)):
        rows = np.concatenate([np.flatnonzero(codes == cluster) for cluster in draw])
        sample.append(auroc(scores[rows], labels[rows]))
    assert found == pytest.approx(expanded(sample, 30))


# ------------------------------------------------------------------------------------------------ degenerate
def test_no_interval_without_two_clusters():
    assert intervals.bootstrap_mean([1.0, 0.0], np.array([0, 0])) is None
    assert intervals.bootstrap_mean([]) is None
    assert intervals.bootstrap_statistic(lambda w: 1.0, np.zeros(3, dtype=int)) is None
    # two clusters, but only one of them has anything to count
    assert intervals.bootstrap_mean([1.0, np.nan], np.array([0, 1])) is None


def test_unanimous_share_is_not_certain():
    """All right: the plain bootstrap claims [1, 1]; the interval of a proportion must leave room."""
    assert intervals.bootstrap_mean(np.ones(50)) == (1.0, 1.0)
    low, high = intervals.bootstrap_mean(np.ones(100), np.repeat(np.arange(50), 2), proportion=True)
    assert (low, high) == intervals.wilson(50, 50)  # 50 prompts, not 100 rows
    assert intervals.bootstrap_mean(np.zeros(50), proportion=True).low == 0.0


def test_mostly_undefined_statistic_has_no_interval():
    values = np.full(100, np.nan)
    values[:50] = 1.0
    assert intervals.percentile_interval(values) is None
    values[50:95] = 2.0
    assert intervals.percentile_interval(values, 0.5) == (1.0, 2.0)


def test_percentiles_of_few_units_lie_further_out():
    """By hand, 10 units: t = 2.262157 with 9 degrees, times sqrt(10 / 9) = 2.384523, Phi of minus that is 0.008551."""
    sample = np.arange(100_001) / 100_000
    low, high = intervals.percentile_interval(sample, 0.95, 10)
    assert (low, high) == pytest.approx((0.008551, 0.991449), abs=1e-5)
    assert intervals.percentile_interval(sample, 0.95) == pytest.approx((0.025, 0.975))
    assert intervals.percentile_interval(sample, 0.95, 10**6) == pytest.approx((0.025, 0.975), abs=1e-5)
    for units, confidence in ((2, 0.9), (7, 0.5), (150, 0.99)):
        found = intervals.percentile_interval(sample, confidence, units)
        assert found == pytest.approx(expanded(sample, units, confidence), abs=1e-9)


def test_what_counts_for_a_share_are_the_prompts_that_have_it():
    """Forty prompts, ten of them with something to count: the interval is that of ten."""
    codes, counted = np.arange(40), np.arange(40) < 10
    right = np.where(counted, (np.arange(40) % 3 == 0) * 1.0, 0.0)
    found = intervals.bootstrap_ratios(right[:, None], counted[:, None], codes, draws=2000, seed=1)[0]
    sums = intervals.resampled_sums(np.stack([right, counted], axis=1), codes, draws=2000, seed=1)
    assert found == pytest.approx(expanded(sums[:, 0] / sums[:, 1], 10))
    assert found.high - found.low > np.diff(np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])) + 0.03


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="values must be"):
        intervals.resampled_sums(np.ones(3), np.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="numerators"):
        intervals.bootstrap_ratios(np.ones((3, 1)), np.ones((3, 2)), np.zeros(3, dtype=int))


# ------------------------------------------------------------------------------------------------ coverage
def test_bootstrap_covers_the_truth_as_often_as_promised():
    """300 worlds of 80 prompts with 1..3 correlated pairs each; 95% intervals must cover the true accuracy in 95%,
    less the small-sample shortfall of percentile intervals. Row-wise intervals fall visibly short on the same data."""
    rng = np.random.default_rng(0)
    truth, worlds, clustered_hits, naive_hits = 0.7, 300, 0, 0
    for world in range(worlds):
        codes = np.repeat(np.arange(80), rng.integers(1, 4, 80))
        # most pairs of a prompt share their fate: correlation 0.8, mean exactly 0.7
        fate, own = rng.random(80) < truth, rng.random(codes.size) < truth
        right = np.where(rng.random(codes.size) < np.sqrt(0.8), fate[codes], own).astype(float)
        low, high = intervals.bootstrap_mean(right, codes, draws=1000, seed=world)
        clustered_hits += low <= truth <= high
        low, high = intervals.bootstrap_mean(right, draws=1000, seed=world)
        naive_hits += low <= truth <= high
    # 3 standard errors of a share of 300 are 3.8 points
    assert 0.91 <= clustered_hits / worlds <= 0.985
    assert naive_hits / worlds < clustered_hits / worlds - 0.04


def test_wilson_covers_the_truth_as_often_as_promised():
    """Exact coverage, by summing binomial probabilities over all outcomes of 50 trials."""
    n = 50
    low, high = np.array([intervals.wilson(k, n) for k in range(n + 1)]).T
    coverages = []
    for truth in np.linspace(0.02, 0.98, 97):
        probabilities = np.array([math.comb(n, k) * truth**k * (1 - truth) ** (n - k) for k in range(n + 1)])
        coverages.append(probabilities[(low <= truth) & (truth <= high)].sum())
    assert 0.945 <= np.mean(coverages) <= 0.96
    assert min(coverages) >= 0.91
