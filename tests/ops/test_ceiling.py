"""The ceiling that annotators' agreement sets: by hand, with simulated annotators, and as a bound on any rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from saferlhf.ops.ceiling import (
    BEAVERTAILS_AGREEMENT,
    SAFE_RLHF_AGREEMENT,
    accuracy_on_labels,
    expected_ceiling,
)


def test_by_hand() -> None:
    # 0.9^2 + 0.1^2 = 0.82; 0.8^2 + 0.2^2 = 0.68
    assert expected_ceiling(0.82) == pytest.approx(0.9)
    assert expected_ceiling(0.68) == pytest.approx(0.8)
    assert expected_ceiling(1.0) == 1.0
    assert expected_ceiling(0.5) == 0.5
    assert accuracy_on_labels(1.0, 0.82) == pytest.approx(0.9)
    assert accuracy_on_labels(0.9, 0.82) == pytest.approx(0.82)  # as good as an annotator: agrees like one
    assert accuracy_on_labels(0.5, 0.82) == pytest.approx(0.5)
    assert accuracy_on_labels(0.0, 0.82) == pytest.approx(0.1)
    assert accuracy_on_labels(0.7, 0.82) == pytest.approx(0.7 * 0.9 + 0.3 * 0.1)


@given(st.floats(0.5, 1.0))
def test_the_ceiling_gives_the_agreement_back(agreement: float) -> None:
    p = expected_ceiling(agreement)
    assert p**2 + (1 - p) ** 2 == pytest.approx(agreement, abs=1e-12)
    assert agreement - 1e-12 <= p <= 1.0


@pytest.mark.parametrize("bad", [0.49, 1.01, -1.0, math.nan, math.inf])
def test_what_is_no_agreement_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"between 0\.5 and 1"):
        expected_ceiling(bad)


@pytest.mark.parametrize("bad", [-0.1, 1.1, math.nan])
def test_what_is_no_probability_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        accuracy_on_labels(bad, 0.8)


def test_simulated_annotators() -> None:
    """Two annotators of known quality: the ceiling found from their agreement is what the truth scores on one."""
    draw = np.random.default_rng(0)
    n = 200_000
    truth = draw.random(n) < 0.3
    one, other = (truth ^ (draw.random(n) > 0.87) for _ in range(2))
    judge = truth ^ (draw.random(n) > 0.75)
    agreement = float((one == other).mean())
    assert expected_ceiling(agreement) == pytest.approx((truth == one).mean(), abs=0.005)
    assert accuracy_on_labels(0.75, agreement) == pytest.approx((judge == one).mean(), abs=0.005)


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=30))
def test_no_judge_can_expect_more_on_rows_of_any_hardness(shares: list[float]) -> None:
    """Row by row the best judge says the likelier label; its accuracy never passes the ceiling of the agreement."""
    r = np.array(shares)  # probability that an annotator says unsafe, by row
    agreement = float((r**2 + (1 - r) ** 2).mean())
    best = float(np.maximum(r, 1 - r).mean())
    assert best <= expected_ceiling(min(max(agreement, 0.5), 1.0)) + 1e-9


def test_the_papers_figures() -> None:
    assert expected_ceiling(BEAVERTAILS_AGREEMENT["safety"]) == pytest.approx(0.898, abs=5e-4)
    assert expected_ceiling(SAFE_RLHF_AGREEMENT["safety"]) == pytest.approx(0.7875, abs=5e-4)
    for figures in (BEAVERTAILS_AGREEMENT, SAFE_RLHF_AGREEMENT):
        assert all(0.5 < figure < expected_ceiling(figure) < 1 for figure in figures.values())
