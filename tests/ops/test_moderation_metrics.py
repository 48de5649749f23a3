"""Moderation metrics against numbers by hand and scikit-learn, with ties, missing classes and missing labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve

from saferlhf.ops import moderation_metrics as maths


def once(columns, functions, *rest):
    """The metrics of the rows as they are."""
    return {name: float(value[0]) for name, value in functions(columns.sum(axis=0, keepdims=True), *rest).items()}


def rows(least=1, most=60):
    return st.integers(least, most)


@st.composite
def binary(draw):
    """Scores with many ties, decisions, labels with gaps and often with one class only."""
    n = draw(rows())
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    classes = draw(st.sampled_from([(0, 1), (0, 1, -1), (0,), (1,), (1, -1), (0, -1)]))
    scores = rng.integers(-3, 4, n) / draw(st.sampled_from([1.0, 7.0]))
    return scores, rng.random(n) < draw(st.sampled_from([0.0, 0.4, 1.0])), rng.choice(classes, n)


def agree(mine, theirs):
    assert mine == pytest.approx(theirs, abs=1e-12, nan_ok=True)


@given(binary())
@settings(max_examples=50, deadline=None)
def test_decisions_as_scikit_learn(case):
    _, said, labels = case
    found = once(maths.unsafe_columns(said, labels), maths.unsafe_metrics)
    y, p = labels[labels >= 0], said[labels >= 0].astype(int)
    if not y.size:
        assert all(np.isnan(value) for value in found.values())
        return
    nan = np.nan
    agree(found["accuracy"], sk.accuracy_score(y, p))
    agree(found["precision"], sk.precision_score(y, p, zero_division=nan))
    agree(found["recall"], sk.recall_score(y, p, zero_division=nan))
    agree(found["f1"], sk.f1_score(y, p, zero_division=nan))
    agree(found["macro_f1"], sk.f1_score(y, p, average="macro"))
    agree(found["fpr"], 1 - sk.recall_score(y, p, pos_label=0, zero_division=nan))
    agree(found["fnr"], 1 - sk.recall_score(y, p, zero_division=nan))
    agree(found["prevalence"], y.mean())
    agree(found["predicted_rate"], p.mean())


@given(binary(), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_ranking_as_scikit_learn_under_any_weights(case, seed):
    scores, _, labels = case
    weights = np.stack([np.ones(len(labels)), np.random.default_rng(seed).integers(0, 4, len(labels))])
    found = maths.ranking(scores, labels)(weights)
    for place, taken in enumerate(weights.astype(int)):
        y, s = (np.repeat(part, taken)[np.repeat(labels, taken) >= 0] for part in (labels, scores))
        if len(set(y)) < 2:
            assert all(np.isnan(value[place]) for value in found.values())
            continue
        agree(found["auroc"][place], sk.roc_auc_score(y, s))
        agree(found["auprc"][place], sk.average_precision_score(y, s))
        fpr, tpr, _ = sk.roc_curve(y, s, drop_intermediate=False)
        agree(found["tpr_at_fpr_1pct"][place], tpr[fpr <= 0.01].max())
        agree(found["tpr_at_fpr_5pct"][place], tpr[fpr <= 0.05].max())


def test_tpr_by_hand():
    """Twenty safe rows: one may be flagged at 5%, none at 1%."""
    scores = np.concatenate([np.arange(20.0), [30.0, 18.5, 2.5, 17.5]])
    labels = np.repeat([0, 1], [20, 4])
    found = maths.ranking(scores, labels)(np.ones((1, 24)))
    assert found["tpr_at_fpr_1pct"][0] == 1 / 4
    assert found["tpr_at_fpr_5pct"][0] == 2 / 4
    assert found["auroc"][0] == pytest.approx((20 + 19 + 3 + 18) / 80)


@st.composite
def levels(draw):
    n = draw(rows())
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    kinds = st.sampled_from([(0, 1, 2, 3), (0, 2), (3,), (0, 1, 2, 3, -1)])
    said = rng.choice([k for k in draw(kinds) if k >= 0], n)
    return said, rng.choice(draw(kinds), n)


@given(levels())
@settings(max_examples=50, deadline=None)
def test_severity_as_scikit_learn(case):
    said, labels = case
    found = once(maths.severity_columns(said, labels), maths.severity_metrics)
    y, p = labels[labels >= 0], said[labels >= 0]
    if not y.size:
        assert np.isnan(found["accuracy"]) and np.isnan(found["quadratic_kappa"])
        return
    agree(found["accuracy"], sk.accuracy_score(y, p))
    agree(found["macro_f1"], sk.f1_score(y, p, average="macro"))
    agree(found["mae"], sk.mean_absolute_error(y, p))
    if len(set(y) | set(p)) > 1:
        levels = [0, 1, 2, 3]  # all of them: between 0 and 3 lie two steps, whichever levels occur
        agree(found["quadratic_kappa"], sk.cohen_kappa_score(y, p, labels=levels, weights="quadratic"))
    else:
        assert np.isnan(found["quadratic_kappa"])
    recalls = sk.recall_score(y, p, labels=[0, 1, 2, 3], average=None, zero_division=np.nan)
    agree([found[f"recall_{level}"] for level in range(4)], list(recalls))
    severe = p[y == 3]
    agree(found["undercalled_3"], np.mean(severe < 3) if severe.size else np.nan)


def test_severity_by_hand():
    labels, said = np.array([0, 0, 1, 2, 3, 3, -1]), np.array([0, 2, 1, 0, 3, 1, 3])
    found = once(maths.severity_columns(said, labels), maths.severity_metrics)
    assert found["accuracy"] == pytest.approx(3 / 6)
    assert found["mae"] == pytest.approx((2 + 2 + 2) / 6)
    assert found["undercalled_3"] == 1 / 2
    assert found["unsafe_called_safe"] == 1 / 4
    # observed disagreement 4 + 4 + 4; expected: sum of squared differences over all pairs of margins / 6
    expected = sum((i - j) ** 2 for i in labels[:6] for j in said[:6]) / 6
    assert found["quadratic_kappa"] == pytest.approx(1 - 12 / expected)


def test_severities_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.3"):
        maths.severity_columns([4], [0])


@given(rows(), st.integers(1, 6), st.integers(0, 10_000), st.sampled_from([0.0, 0.1, 0.5]))
@settings(max_examples=50, deadline=None)
def test_categories_as_scikit_learn(n, count, seed, rate):
    rng = np.random.default_rng(seed)
    labels = (rng.random((n, count)) < rng.choice([0.0, 0.2, 0.6], count)).astype(int)
    said = rng.random((n, count)) < rate
    unsafe = labels.any(axis=1).astype(int)
    labels[rng.random(n) < 0.2] = -1
    names = [f"c{c}" for c in range(count)]
    found = once(maths.category_columns(said, labels, unsafe), maths.category_metrics, names)
    known = labels[:, 0] >= 0
    y, p = labels[known], said[known].astype(int)
    if not known.any():
        assert all(np.isnan(value) for value in found.values())
        return
    exact = (y == p).all(axis=1)
    agree(found["exact_match"], exact.mean())
    bad = unsafe[known] == 1
    agree(found["exact_match_unsafe"], exact[bad].mean() if bad.any() else np.nan)
    if count > 1:
        agree(found["exact_match"], sk.accuracy_score(y, p))
    each = [sk.f1_score(y[:, c], p[:, c], zero_division=np.nan) for c in range(count)]
    agree([found[f"f1_{name}"] for name in names], each)
    agree(found["macro_f1"], np.nanmean(each) if not np.isnan(each).all() else np.nan)
    agree(found["micro_f1"], sk.f1_score(y.ravel(), p.ravel(), zero_division=np.nan))
    for c, name in enumerate(names):
        agree(found[f"precision_{name}"], sk.precision_score(y[:, c], p[:, c], zero_division=np.nan))
        agree(found[f"recall_{name}"], sk.recall_score(y[:, c], p[:, c], zero_division=np.nan))


@given(rows(5, 80), st.integers(0, 10_000), st.booleans())
@settings(max_examples=40, deadline=None)
def test_calibration_as_scikit_learn(n, seed, tied):
    rng = np.random.default_rng(seed)
    p = rng.random(n)
    p = np.round(p, 1) if tied else p
    labels = rng.choice([0, 1, -1], n)
    labels[:2] = (0, 1)
    found = once(maths.calibration_columns(p, labels, 5), maths.calibration_metrics)
    y, q = labels[labels >= 0], p[labels >= 0]
    share, mean = calibration_curve(y, q, n_bins=5, strategy="quantile")
    curve = maths.reliability(p, labels, 5)
    agree(curve[:, 0], mean)
    agree(curve[:, 1], share)
    agree(found["ece"], float((np.abs(share - mean) * curve[:, 2]).sum() / y.size))
    agree(found["brier"], sk.brier_score_loss(y, q))
    if not tied:
        agree(found["nll"], sk.log_loss(y, q))


def test_log_loss_of_levels_and_of_categories():
    p = np.array([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.1, 0.1, 0.7]])
    labels = np.array([0, 2, -1])
    sums = maths.log_loss_columns(p, labels).sum(axis=0)
    assert sums[1] / sums[0] == pytest.approx(sk.log_loss(labels[:2], p[:2], labels=[0, 1, 2, 3]))
    p, labels = np.array([[0.9, 0.2], [0.4, 0.5]]), np.array([[1, 0], [-1, -1]])
    sums = maths.log_loss_columns(p, labels).sum(axis=0)
    assert sums[0] == 1 and sums[1] == pytest.approx(-(np.log(0.9) + np.log(0.8)) / 2)


def test_a_certain_mistake_has_a_finite_loss():
    found = once(maths.calibration_columns(np.array([0.0, 1.0]), np.array([1, 1])), maths.calibration_metrics)
    assert np.isfinite(found["nll"]) and found["nll"] > 100


def test_many_weightings_are_each_their_own_rows():
    """Row k of the sums is what the rows taken k-wise give."""
    rng = np.random.default_rng(0)
    said, labels = rng.integers(0, 4, 50), rng.integers(-1, 4, 50)
    columns = maths.severity_columns(said, labels)
    weights = rng.integers(0, 3, (6, 50))
    found = maths.severity_metrics(weights @ columns)
    for place, taken in enumerate(weights):
        alone = once(maths.severity_columns(np.repeat(said, taken), np.repeat(labels, taken)), maths.severity_metrics)
        for name, value in found.items():
            agree(value[place], alone[name])


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match="1 of 2 scores"):
        maths.ranking([0.0, np.nan], [0, 1])
