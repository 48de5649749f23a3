"""Temperatures, consistent decisions and what is stored, against scipy, brute force and numbers worked by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, log_loss

from saferlhf.ops.calibration import (
    LEAST,
    TEMPERATURES,
    Calibration,
    Objectives,
    binary_temperature,
    decide,
    fit_calibration,
    severity_given_unsafe,
    severity_share,
    severity_temperature,
    shrunk,
)
from saferlhf.ops.moderation import ModerationLabels, ModerationLogits

NAMES = ("a", "b", "c")


def falling(raw: np.ndarray) -> np.ndarray:
    """(N, 3) cumulative logits from any three numbers a row."""
    return raw[:, :1] - np.cumsum(np.abs(raw) * [0, 1, 1], axis=1)


def drawn(n: int = 400, seed: int = 0, temperature: float = 1.0) -> tuple[ModerationLogits, ModerationLabels]:
    """Rows whose labels follow the logits at temperature 1, given logits that are `temperature` times as large."""
    draw = np.random.default_rng(seed)
    unsafe_logit, category_logit = draw.normal(0, 2, n), draw.normal(-1, 2, (n, 3))
    severity_logit = falling(np.column_stack([draw.normal(0, 2, n), draw.normal(0, 2, (n, 2))]))
    unsafe = draw.random(n) < expit(unsafe_logit)
    given = severity_given_unsafe(severity_logit)
    u = draw.random(n)
    severity = np.where(unsafe, 1 + (u < given[:, 0]) + (u < given[:, 1]), 0)
    category = (draw.random((n, 3)) < expit(category_logit)) & unsafe[:, None]
    logits = ModerationLogits(unsafe_logit * temperature, severity_logit * temperature, category_logit * temperature)
    labels = ModerationLabels(unsafe.astype(np.int64), severity.astype(np.int64), category.astype(np.int64), NAMES)
    return logits, labels


# ------------------------------------------------------------------------------------------------ decide
def test_a_verdict_by_hand() -> None:
    # sigmoid(0) = 1/2; severity logits with sigmoids 0.8, 0.4, 0.2: given unsafe 2 or more 1/2, 3 1/4
    logits = ModerationLogits(
        unsafe=np.array([0.0, -2.0]),
        severity=np.tile(logit([0.8, 0.4, 0.2]), (2, 1)),
        category=np.array([[1.0, -1.0, 2.0]] * 2),
    )
    found = decide(logits, Calibration.default(NAMES))
    assert found.p_unsafe == pytest.approx([0.5, expit(-2)])
    assert found.p_severity[0] == pytest.approx([0.5, 0.25, 0.125, 0.125])
    assert found.unsafe.tolist() == [True, False]
    assert found.severity.tolist() == [2, 0]
    assert found.category.tolist() == [[True, False, True], [False, False, False]]
    lower = replace(Calibration.default(NAMES), thresholds_severity=(0.6, 0.25), threshold_unsafe=0.1)
    assert decide(logits, lower).severity.tolist() == [3, 3]
    higher = replace(lower, thresholds_severity=(0.6, 0.3), temperature_unsafe=2.0)
    assert decide(logits, higher).severity.tolist() == [1, 1]
    assert decide(logits, higher).p_unsafe == pytest.approx([0.5, expit(-1)])


def test_the_nearest_category_where_none_passes() -> None:
    logits = ModerationLogits(np.array([5.0]), None, logit(np.array([[0.3, 0.2, 0.1]])))
    calibration = replace(Calibration.default(NAMES), thresholds_category=(0.8, 0.4, 0.2))
    # log-odds below the threshold: 2.23, 0.98, 0.81
    assert decide(logits, calibration).category.tolist() == [[False, False, True]]
    assert decide(logits, calibration).severity is None


def test_heads_that_are_not_there() -> None:
    found = decide(ModerationLogits(np.array([1.0]), None, None), Calibration.default())
    assert found.unsafe.tolist() == [True]
    assert found.severity is found.category is found.p_severity is found.p_category is None
    with pytest.raises(ValueError, match="3 category logits, 0 thresholds"):
        decide(ModerationLogits(np.zeros(1), None, np.zeros((1, 3))), Calibration.default())


NUMBERS = st.floats(-1e3, 1e3)
SHARES = st.floats(0.001, 0.999)


def test_two_heads_say_together_what_is_unsafe() -> None:
    # a quarter of it from the severity head: (3 * 2 + -2) / 4 = 1, over T = 2
    logits = ModerationLogits(np.array([2.0]), np.array([[-2.0, -3.0, -4.0]]), None)
    found = decide(logits, Calibration(temperature_unsafe=2.0, severity_share=0.25))
    assert found.unsafe_logit == pytest.approx([0.5])
    assert found.p_unsafe == pytest.approx([0.6225], abs=1e-4)
    assert found.p_severity[0, 0] == pytest.approx(1 - 0.6225, abs=1e-4)
    alone = decide(replace(logits, severity=None), Calibration(temperature_unsafe=2.0, severity_share=0.25))
    assert alone.unsafe_logit == pytest.approx([1.0])


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=5),
    shares=st.tuples(SHARES, SHARES, SHARES, SHARES, SHARES),
    temperature=st.floats(*TEMPERATURES),
)
def test_verdicts_are_consistent(rows: list, shares: tuple, temperature: float) -> None:
    table = np.array(rows)
    logits = ModerationLogits(table[:, 0], falling(table[:, 1:4]), table[:, 4:])
    calibration = Calibration(
        categories=("a", "b"),
        temperature_unsafe=temperature,
        temperature_category=temperature,
        temperature_severity=temperature,
        threshold_unsafe=shares[0],
        thresholds_category=shares[1:3],
        thresholds_severity=shares[3:],
    )
    found = decide(logits, calibration)
    assert (found.unsafe == (found.severity > 0)).all()
    assert (found.unsafe == found.category.any(axis=1)).all()
    assert (found.p_severity >= 0).all()
    assert found.p_severity.sum(axis=1) == pytest.approx(np.ones(len(rows)))
    assert 1 - found.p_severity[:, 0] == pytest.approx(found.p_unsafe)


def test_one_polarity() -> None:
    """Swapping safe and unsafe in the head turns every decision of it round."""
    logits, _ = drawn()
    there = decide(logits, Calibration.default(NAMES))
    back = decide(replace(logits, unsafe=-logits.unsafe), Calibration.default(NAMES))
    assert (there.unsafe != back.unsafe).all()
    assert back.p_unsafe == pytest.approx(1 - there.p_unsafe)


# ------------------------------------------------------------------------------------------------ temperatures
@pytest.mark.parametrize("true", [0.4, 1.0, 3.0])
def test_the_temperature_is_found_again(true: float) -> None:
    logits, labels = drawn(20_000, temperature=true)
    found = fit_calibration(logits, labels)
    assert found.temperature_unsafe == pytest.approx(true, rel=0.05)
    assert found.temperature_severity == pytest.approx(true, rel=0.1)


def two_estimates(n: int, noise: float, seed: int = 3) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of two heads that saw the truth through noise, the second's `noise` as large, and the labels."""
    draw = np.random.default_rng(seed)
    truth = draw.normal(0, 2, n)
    return truth + draw.normal(0, 1, n), truth + noise * draw.normal(0, 1, n), draw.random(n) < expit(truth)


@pytest.mark.parametrize("noise", [0.7, 1.0, 1.5])
def test_the_share_is_a_logistic_regression_on_both_logits(noise: float) -> None:
    u, g, positive = two_estimates(2_000, noise)
    model = LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10).fit(np.column_stack([u, g]), positive)
    a, b = model.coef_[0]
    assert a > 0 and b > 0
    found = severity_share(u, g, positive)
    assert found == pytest.approx(b / (a + b), abs=2e-3)
    # the less noise, the larger the share: inverse variances, 1 / noise^2 against 1
    assert found == pytest.approx(1 / (1 + noise**2), abs=0.1)


def test_a_head_that_says_nothing_or_the_opposite_gets_no_share() -> None:
    u, g, positive = two_estimates(2_000, 1.0)
    assert severity_share(u, -g, positive) == 0.0
    assert severity_share(-u, g, positive) == 1.0
    assert severity_share(-u, -g, positive) == 0.0


def test_both_heads_together_are_likelier_than_one() -> None:
    u, g, positive = two_estimates(4_000, 1.0)
    logits = ModerationLogits(u, np.column_stack([g, g - 1.0, g - 2.0]), None)
    labels = ModerationLabels(positive.astype(np.int64), np.full(4_000, -1), np.full((4_000, 0), -1), ())
    both, alone = fit_calibration(logits, labels), fit_calibration(replace(logits, severity=None), labels)
    assert 0.4 < both.severity_share < 0.6 and alone.severity_share == 0.0
    losses = [log_loss(positive, decide(logits, found).p_unsafe) for found in (both, alone)]
    assert losses[0] < losses[1] - 0.005
    few = fit_calibration(
        ModerationLogits(u[:30], logits.severity[:30], None),
        replace(labels, unsafe=labels.unsafe[:30], severity=labels.severity[:30], category=labels.category[:30]),
    )
    n = min(positive[:30].sum(), (~positive[:30]).sum())
    assert few.severity_share == pytest.approx(severity_share(u[:30], g[:30], positive[:30]) * n / (n + LEAST))


def test_the_binary_temperature_is_a_logistic_regression_without_intercept() -> None:
    logits, labels = drawn(300, temperature=2.0)
    model = LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10).fit(logits.unsafe[:, None], labels.unsafe)
    assert binary_temperature(logits.unsafe, labels.unsafe == 1) == pytest.approx(1 / model.coef_[0, 0], rel=1e-4)


def test_no_severity_temperature_is_better() -> None:
    logits, labels = drawn(300, temperature=2.0)
    rows = labels.severity > 0

    def nll(t: float) -> float:
        given = severity_given_unsafe(logits.severity[rows], t)
        p = np.column_stack([1 - given[:, 0], given[:, 0] - given[:, 1], given[:, 1]])
        return log_loss(labels.severity[rows], p / p.sum(axis=1, keepdims=True), labels=[1, 2, 3])

    found = severity_temperature(logits.severity[rows], labels.severity[rows])
    assert nll(found) <= min(nll(t) for t in np.geomspace(*TEMPERATURES, 100)) + 1e-9


def test_separable_rows_stay_within_bounds() -> None:
    positive = np.arange(40) % 2 == 1
    assert binary_temperature(np.where(positive, 3.0, -3.0), positive) == pytest.approx(TEMPERATURES[0], rel=1e-3)
    assert binary_temperature(np.where(positive, -3.0, 3.0), positive) == pytest.approx(TEMPERATURES[1], rel=1e-3)


# ------------------------------------------------------------------------------------------------ thresholds
def test_fitted_thresholds_beat_the_default_on_their_rows() -> None:
    logits, labels = drawn(2_000)
    shifted = replace(logits, unsafe=logits.unsafe - 2.0)
    found = fit_calibration(shifted, labels)
    plain = decide(shifted, Calibration.default(NAMES))
    better = decide(shifted, found)
    truth = labels.unsafe == 1
    assert f1_score(truth, better.unsafe, average="macro") > f1_score(truth, plain.unsafe, average="macro") + 0.05
    assert found.threshold_unsafe < 0.4
    assert (better.severity == labels.severity).mean() > (plain.severity == labels.severity).mean()
    assert found.rows == 2_000 and found.fitted and found.fitted_on == "val"


def test_exact_match_as_an_objective() -> None:
    logits, labels = drawn(600)
    found = {}
    for objective in ("f1", "exact_match"):
        verdicts = decide(logits, fit_calibration(logits, labels, Objectives(category=objective)))
        found[objective] = (verdicts.category == (labels.category == 1)).all(axis=1).mean()
    assert found["exact_match"] > found["f1"]


def test_a_promised_false_positive_rate() -> None:
    logits, labels = drawn(500)
    verdicts = decide(logits, fit_calibration(logits, labels, Objectives(unsafe="fpr@0.02")))
    assert verdicts.unsafe[labels.unsafe == 0].mean() <= 0.02


def test_few_positives_keep_the_default() -> None:
    logits, labels = drawn(300)
    category = np.zeros_like(labels.category)
    category[: LEAST - 1, 0] = category[:200, 1] = 1
    found = fit_calibration(logits, replace(labels, category=category))
    assert found.thresholds_category[0] == 0.5 != found.thresholds_category[1]
    assert found.thresholds_category[2] == 0.5
    few = ModerationLabels(*(part[:15] for part in (labels.unsafe, labels.severity, labels.category)), NAMES)
    tiny = fit_calibration(ModerationLogits(logits.unsafe[:15], logits.severity[:15], logits.category[:15]), few)
    assert (tiny.temperature_unsafe, tiny.threshold_unsafe) == (1.0, 0.5)


def test_shrinking() -> None:
    assert shrunk(0.9, LEAST - 1) == 0.5
    # half way in log-odds: ln 9 / 2 = ln 3
    assert shrunk(0.9, LEAST) == pytest.approx(0.75)
    assert shrunk(0.9, 1_000_000) == pytest.approx(0.9, abs=1e-5)
    assert 0 < shrunk(0.0, 50) < shrunk(1.0, 50) < 1


def test_rows_without_a_label_do_not_count() -> None:
    logits, labels = drawn(400)
    more = ModerationLogits(*(np.concatenate([p, p[::-1][:100]]) for p in vars(logits).values()))
    unlabelled = ModerationLabels(
        np.concatenate([labels.unsafe, np.full(100, -1)]),
        np.concatenate([labels.severity, np.full(100, -1)]),
        np.concatenate([labels.category, np.full((100, 3), -1)]),
        NAMES,
    )
    assert fit_calibration(more, unlabelled) == fit_calibration(logits, labels)


def test_nothing_labelled_leaves_the_defaults() -> None:
    logits, labels = drawn(30)
    none = ModerationLabels(*(np.full_like(p, -1) for p in (labels.unsafe, labels.severity, labels.category)), NAMES)
    found = fit_calibration(logits, none)
    assert not found.fitted and found.fitted_on is None
    assert replace(found, objectives={}) == Calibration.default(NAMES)


def test_objectives_are_named_right() -> None:
    assert Objectives(unsafe="fpr@0.1").unsafe == "fpr@0.1"
    for wrong in ({"unsafe": "auc"}, {"category": "kappa"}, {"severity": "f1"}):
        with pytest.raises(ValueError, match="unknown objective"):
            Objectives(**wrong)


# ------------------------------------------------------------------------------------------------ stored
def test_it_survives_json() -> None:
    logits, labels = drawn()
    found = fit_calibration(logits, labels)
    again = Calibration.from_dict(json.loads(json.dumps(found.to_dict())))
    assert again == found
    one, other = decide(logits, found), decide(logits, again)
    assert (one.p_category == other.p_category).all() and (one.category == other.category).all()


@pytest.mark.parametrize("change", [{"thresholds_severity": [0.5]}, {"new": 1}, {"thresholds_category": [0.5]}])
def test_a_damaged_one_is_refused(change: dict) -> None:
    with pytest.raises(ValueError):
        Calibration.from_dict(Calibration.default(NAMES).to_dict() | change)
