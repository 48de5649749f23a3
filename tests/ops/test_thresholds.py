"""Threshold searches against brute force with scikit-learn's metrics."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

from saferlhf.ops.thresholds import (
    best_severity_thresholds,
    best_threshold,
    candidates,
    false_positive_rate,
)

METRICS = {
    "accuracy": accuracy_score,
    "f1": lambda truth, said: f1_score(truth, said, zero_division=0),
    "macro_f1": lambda truth, said: f1_score(truth, said, average="macro", zero_division=0, labels=[False, True]),
}


def rows(seed: int, n: int = 40, ties: bool = False) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(seed)
    truth = draw.random(n) < 0.4
    p = np.clip(draw.beta(2, 3, n) + 0.2 * truth, 0, 1)
    return (p.round(1) if ties else p), truth


def test_candidates_divide_the_rows_in_every_way() -> None:
    p = np.array([0.2, 0.9, 0.2, 0.4])
    assert candidates(p) == pytest.approx([0.1, 0.3, 0.65, 0.95])
    assert [int((p >= t).sum()) for t in candidates(p)] == [4, 2, 1, 0]
    extreme = candidates(np.array([0.0, 1.0]))
    assert [int((np.array([0.0, 1.0]) >= t).sum()) for t in extreme] == [2, 1, 0]
    assert candidates(np.zeros(0)).tolist() == [0.5]


@pytest.mark.parametrize("objective", METRICS)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_no_threshold_is_better(objective: str, ties: bool, seed: int) -> None:
    p, truth = rows(seed, ties=ties)
    found = METRICS[objective](truth, p >= best_threshold(p, truth, objective))
    every = np.concatenate([p, np.nextafter(p, 2), [0.0, 1.1]])
    assert found == pytest.approx(max(METRICS[objective](truth, p >= t) for t in every))


def test_among_equals_the_nearest_to_one_half() -> None:
    p, truth = np.array([0.1, 0.2, 0.8, 0.9]), np.array([False, False, True, True])
    assert best_threshold(p, truth, "macro_f1") == pytest.approx(0.5)
    assert best_threshold(np.full(4, 0.7), np.array([True] * 4), "accuracy") == pytest.approx(0.35)


@pytest.mark.parametrize("seed", range(3))
def test_the_false_positive_rate_is_kept_and_recall_is_highest(seed: int) -> None:
    p, truth = rows(seed, n=200)
    for rate in (0.0, 0.05, 0.3):
        said = p >= best_threshold(p, truth, f"fpr@{rate}")
        assert said[~truth].mean() <= rate + 1e-12
        possible = [p >= t for t in np.concatenate([p, [1.1]]) if (p >= t)[~truth].mean() <= rate + 1e-12]
        assert said[truth].mean() == pytest.approx(max(other[truth].mean() for other in possible))


def test_rows_that_are_closed_count_as_negative() -> None:
    p, truth = rows(3, n=60)
    is_open = np.random.default_rng(9).random(60) < 0.6
    t = best_threshold(p, truth, "f1", open_rows=is_open)
    found = f1_score(truth, (p >= t) & is_open, zero_division=0)
    assert found == pytest.approx(max(f1_score(truth, (p >= u) & is_open, zero_division=0) for u in [*p, 0.0, 1.1]))
    assert found < f1_score(truth, p >= best_threshold(p, truth, "f1"))


def test_objectives_are_named_right() -> None:
    assert false_positive_rate("fpr@0.05") == 0.05
    for wrong in ("fpr", "fpr@1", "fpr@-0.1", "tpr=0.5", "fpr@x", "fpr@nan", "f1"):
        assert false_positive_rate(wrong) is None
    with pytest.raises(ValueError, match="unknown objective"):
        best_threshold(np.array([0.1]), np.array([True]), "auc")
    with pytest.raises(ValueError, match="unknown objective"):
        best_severity_thresholds(np.zeros(1), np.zeros(1), np.ones(1, bool), np.zeros(1, np.int64), "f1")


# ------------------------------------------------------------------------------------------------ severity
def levels(at_2: np.ndarray, at_3: np.ndarray, unsafe: np.ndarray, t2: float, t3: float) -> np.ndarray:
    said = []
    for two, three, bad in zip(at_2, at_3, unsafe, strict=True):
        said.append(0 if not bad else 3 if three >= t3 else 2 if two >= t2 else 1)
    return np.array(said)


@pytest.mark.parametrize("objective", ["accuracy", "kappa"])
@pytest.mark.parametrize("seed", range(2))
def test_no_pair_of_severity_thresholds_is_better(objective: str, seed: int) -> None:
    draw = np.random.default_rng(seed)
    n = 18
    severity = draw.integers(0, 4, n)
    at_2 = np.clip(draw.random(n) * 0.5 + 0.2 * (severity >= 2), 0, 1).round(2)
    at_3 = np.minimum(at_2, np.clip(draw.random(n) * 0.5 + 0.3 * (severity == 3), 0, 1)).round(2)
    unsafe = (severity > 0) ^ (draw.random(n) < 0.1)

    def value(t2: float, t3: float) -> float:
        said = levels(at_2, at_3, unsafe, t2, t3)
        if objective == "accuracy":
            return accuracy_score(severity, said)
        return cohen_kappa_score(severity, said, weights="quadratic", labels=range(4))

    found = value(*best_severity_thresholds(at_2, at_3, unsafe, severity, objective))
    every = [value(t2, t3) for t2, t3 in itertools.product([*np.unique(at_2), 1.1], [*np.unique(at_3), 1.1])]
    assert found == pytest.approx(max(every))


def test_many_distinct_values_are_thinned_out() -> None:
    draw = np.random.default_rng(0)
    severity = draw.integers(1, 4, 3000)
    at_2 = np.clip(0.3 * severity + draw.normal(0, 0.1, 3000) - 0.1, 0, 1)
    t2, t3 = best_severity_thresholds(at_2, at_2 * 0.5, np.ones(3000, bool), severity, "accuracy")
    said = levels(at_2, at_2 * 0.5, np.ones(3000, bool), t2, t3)
    assert accuracy_score(severity, said) > 0.9
