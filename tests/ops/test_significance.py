"""Paired tests by hand, against scipy, and by what they promise: how often they cry wolf and how often they find."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, permutation_test

from saferlhf.ops.significance import EXACT, holm, mcnemar_p, minimum_detectable, sign_flip_p


def test_signs_by_hand() -> None:
    # 1, 2, 3: |sum| = 6 with all signs alike only, 2 of 8 patterns
    assert sign_flip_p([1.0, 2.0, 3.0]) == 0.25
    # 1, 2, -3: |sum| = 0, every pattern is as far
    assert sign_flip_p([1.0, 2.0, -3.0]) == 1.0
    # two clusters, 3 and 3: both patterns with equal signs
    assert sign_flip_p([1.0, 2.0, 3.0], ["a", "a", "b"]) == 0.5
    assert sign_flip_p([1.0, math.nan, 2.0, 3.0]) == 0.25
    assert math.isnan(sign_flip_p([math.nan])) and math.isnan(sign_flip_p([]))
    assert sign_flip_p(np.zeros(40)) == 1.0


@pytest.mark.parametrize("n", [9, EXACT, EXACT + 1, 60])
@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_signs_as_scipy(n: int, shift: float) -> None:
    values = np.random.default_rng(n).normal(shift, 1.0, n)
    theirs = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=20_000, rng=0).pvalue
    assert sign_flip_p(values, draws=20_000) == pytest.approx(theirs, abs=0.012)


def test_many_rows_of_one_prompt_are_one_observation() -> None:
    values = np.random.default_rng(1).normal(0.4, 1.0, 30)
    copies, prompts = np.repeat(values, 5), np.repeat(np.arange(30), 5)
    assert sign_flip_p(copies, prompts) == sign_flip_p(values)
    assert sign_flip_p(copies) < sign_flip_p(values) / 2  # as if there were 150 prompts


def test_false_alarms_are_as_rare_as_promised_and_a_difference_is_found() -> None:
    draw = np.random.default_rng(2)
    null = [sign_flip_p(draw.normal(0.0, 1.0, 40), draws=400, seed=i) for i in range(400)]
    assert 0.03 < np.mean(np.array(null) <= 0.05) < 0.075
    # the smallest difference that is found four times in five
    effect = minimum_detectable(1 / math.sqrt(150))
    found = [sign_flip_p(draw.normal(effect, 1.0, 150), draws=400, seed=i) for i in range(400)]
    assert 0.74 < np.mean(np.array(found) <= 0.05) < 0.86


def test_mcnemar_by_hand() -> None:
    # ten rows that only the first gets right and two that only the second does
    first = np.array([1] * 10 + [0] * 2 + [1] * 30 + [0] * 8, bool)
    second = np.array([0] * 10 + [1] * 2 + [1] * 30 + [0] * 8, bool)
    expected = 2 * binom.cdf(2, 12, 0.5)
    assert mcnemar_p(first, second) == pytest.approx(expected) == pytest.approx(0.03857, abs=1e-5)
    assert mcnemar_p(second, first) == pytest.approx(expected)
    assert mcnemar_p(first, first) == 1.0
    with pytest.raises(ValueError, match="not the same rows"):
        mcnemar_p(first, second[:3])


def test_holm_by_hand() -> None:
    # sorted 0.01, 0.02, 0.03, 0.2 times 4, 3, 2, 1; then never falling
    assert holm([0.03, 0.01, 0.2, 0.02]) == pytest.approx([0.06, 0.04, 0.2, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []
    kept = holm([0.01, math.nan, 0.04])
    assert kept[0] == pytest.approx(0.02) and math.isnan(kept[1]) and kept[2] == pytest.approx(0.04)


@given(st.lists(st.floats(1e-9, 1.0), min_size=1, max_size=12))
def test_holm_lies_between_each_alone_and_bonferroni(p: list[float]) -> None:
    found = holm(p)
    assert all(a <= b + 1e-12 and b <= min(1.0, len(p) * a) + 1e-12 for a, b in zip(p, found, strict=True))
    order = np.argsort(p, kind="stable")
    assert (np.diff(np.array(found)[order]) >= 0).all()


def test_minimum_detectable_by_hand() -> None:
    assert minimum_detectable(0.01) == pytest.approx((1.959964 + 0.841621) * 0.01, abs=1e-7)
    with pytest.raises(ValueError, match="not between 0 and 1"):
        minimum_detectable(0.01, power=1.0)
