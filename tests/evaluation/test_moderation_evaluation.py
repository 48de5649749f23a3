"""Metrics of verdicts under their flat names: values, intervals by prompt, polarity, what is left out."""

from __future__ import annotations

import time

import numpy as np
import pytest
from expanded import expanded
from scipy.special import expit
from sklearn import metrics as sk

from saferlhf.errors import UserError
from saferlhf.evaluation.moderation import category_slugs, evaluate_moderation
from saferlhf.ops.calibration import Calibration, decide
from saferlhf.ops.moderation import ModerationLabels, ModerationLogits, Verdicts

NAMES = ("White-Collar Crime", "Drugs", "discrimination,stereotype,injustice")


def case(n=200, seed=0, names=NAMES, gaps=False):
    """Labels, and logits that know something of them."""
    rng = np.random.default_rng(seed)
    severity = np.where(rng.random(n) < 0.5, 0, rng.integers(1, 4, n))
    unsafe = (severity > 0).astype(np.int64)
    category = ((rng.random((n, len(names))) < 0.5) & (unsafe[:, None] == 1)).astype(np.int64)
    first = np.sort(rng.normal(size=(n, 3)) + severity[:, None] - 1.5, axis=1)[:, ::-1].copy()
    logits = ModerationLogits(2 * rng.normal(size=n) + 3 * unsafe - 1.5, first, rng.normal(size=(n, len(names))))
    if gaps:
        unsafe, severity, category = unsafe.copy(), severity.copy(), category.copy()
        unsafe[:20], severity[10:40], category[30:60] = -1, -1, -1
    return ModerationLabels(unsafe, severity, category, tuple(names)), logits


def ids(n):
    return [f"r{i}" for i in range(n)]


def evaluate(labels, logits, calibration=None, **options):
    verdicts = decide(logits, calibration or Calibration.default(labels.categories))
    options = {"draws": 0} | options
    return evaluate_moderation(ids(len(labels)), labels, logits, verdicts, **options)


@pytest.mark.parametrize("gaps", [False, True])
def test_values_are_scikit_learns(gaps):
    labels, logits = case(gaps=gaps)
    calibration = Calibration(NAMES, 2.0, 1.5, 3.0, 0.4, (0.3, 0.5, 0.6), (0.4, 0.6), rows=9)
    verdicts = decide(logits, calibration)
    found = evaluate(labels, logits, calibration)
    known = labels.unsafe >= 0
    y, said, p = labels.unsafe[known], verdicts.unsafe[known], verdicts.p_unsafe[known]
    assert found["test/unsafe/macro_f1"] == pytest.approx(sk.f1_score(y, said, average="macro"))
    assert found["test/unsafe/auroc"] == pytest.approx(sk.roc_auc_score(y, p))
    assert found["test/unsafe/auprc"] == pytest.approx(sk.average_precision_score(y, p))
    assert found["test/unsafe/nll"] == pytest.approx(sk.log_loss(y, p))
    assert found["test/unsafe/nll_raw"] == pytest.approx(sk.log_loss(y, expit(logits.unsafe[known])))
    assert found["test/unsafe/brier"] == pytest.approx(sk.brier_score_loss(y, p))
    graded = labels.severity >= 0
    s, t = labels.severity[graded], verdicts.severity[graded]
    assert found["test/severity/accuracy"] == pytest.approx(sk.accuracy_score(s, t))
    assert found["test/severity/quadratic_kappa"] == pytest.approx(sk.cohen_kappa_score(s, t, weights="quadratic"))
    assert found["test/severity/nll"] == pytest.approx(sk.log_loss(s, verdicts.p_severity[graded], labels=range(4)))
    whole = labels.category[:, 0] >= 0
    c, d = labels.category[whole], verdicts.category[whole]
    assert found["test/category/exact_match"] == pytest.approx(sk.accuracy_score(c, d))
    assert found["test/category/micro_f1"] == pytest.approx(sk.f1_score(c, d, average="micro"))
    assert found["test/category/macro_f1"] == pytest.approx(sk.f1_score(c, d, average="macro"))
    assert found["test/category/f1_white_collar_crime"] == pytest.approx(sk.f1_score(c[:, 0], d[:, 0]))
    assert found["test/category/support_drugs"] == c[:, 1].sum()
    assert found["test/category/exact_match_n"] == whole.sum()
    assert found["test/unsafe/recall_n"] == (labels.unsafe == 1).sum()
    assert all(np.isfinite(value) for value in found.values())


def swapped(labels, logits):
    """Safe for unsafe, in the labels and in the logits."""
    flip = np.where(labels.unsafe >= 0, 1 - labels.unsafe, -1)
    return ModerationLabels(flip, *rest(labels)), ModerationLogits(-logits.unsafe, None, None)


def rest(labels):
    return labels.severity, labels.category, labels.categories


def test_polarity():
    """Both swapped: what treats the classes alike stays, the rest changes sides. One swapped: everything turns."""
    labels, logits = case(n=302, gaps=True)  # 282 labelled: no edge of a bin of the ECE falls upon a row
    logits = ModerationLogits(logits.unsafe, None, None)
    other, mirrored = swapped(labels, logits)
    here, there = evaluate(labels, logits), evaluate(other, mirrored)

    def both(name):
        return here[f"test/unsafe/{name}"], there[f"test/unsafe/{name}"]

    for name in ("accuracy", "macro_f1", "auroc", "ece", "brier", "nll"):
        assert both(name)[0] == pytest.approx(both(name)[1]), name
    assert there["test/unsafe/recall"] == pytest.approx(1 - here["test/unsafe/fpr"])
    assert there["test/unsafe/fnr"] == pytest.approx(here["test/unsafe/fpr"])
    assert there["test/unsafe/prevalence"] == pytest.approx(1 - here["test/unsafe/prevalence"])
    assert there["test/unsafe/predicted_rate"] == pytest.approx(1 - here["test/unsafe/predicted_rate"])
    known = labels.unsafe >= 0
    y, said = 1 - labels.unsafe[known], logits.unsafe[known] < 0
    assert there["test/unsafe/f1"] == pytest.approx(sk.f1_score(y, said))
    assert there["test/unsafe/precision"] == pytest.approx(sk.precision_score(y, said))
    assert there["test/unsafe/auprc"] == pytest.approx(sk.average_precision_score(y, -logits.unsafe[known]))
    for metrics in (evaluate(other, logits), evaluate(labels, mirrored)):
        assert metrics["test/unsafe/accuracy"] == pytest.approx(1 - here["test/unsafe/accuracy"])
        assert metrics["test/unsafe/auroc"] == pytest.approx(1 - here["test/unsafe/auroc"])
        assert metrics["test/unsafe/macro_f1"] < here["test/unsafe/macro_f1"]
        assert metrics["test/unsafe/nll"] > here["test/unsafe/nll"]
    # a perfect model whose sign is wrong is wrong everywhere
    perfect = ModerationLogits(np.where(labels.unsafe == 1, 4.0, -4.0), None, None)
    assert evaluate(labels, perfect)["test/unsafe/macro_f1"] == evaluate(labels, perfect)["test/unsafe/auroc"] == 1
    wrong = evaluate(other, perfect)
    assert [wrong[f"test/unsafe/{name}"] for name in ("accuracy", "macro_f1", "auroc", "recall")] == [0, 0, 0, 0]
    assert wrong["test/unsafe/fpr"] == 1


def test_intervals_hold_prompts_together():
    """Ten copies of every row under one prompt tell no more than the row."""
    labels, logits = case(n=60)
    many = ModerationLabels(*(np.repeat(part, 10, axis=0) for part in (labels.unsafe, *rest(labels)[:2])), NAMES)
    copies = ModerationLogits(*(np.repeat(part, 10, axis=0) for part in (logits.unsafe, *parts(logits))))
    alone = evaluate(labels, logits, draws=2000, clusters=ids(60))
    together = evaluate(many, copies, draws=2000, clusters=[f"r{i // 10}" for i in range(600)])
    apart = evaluate(many, copies, draws=2000)
    for name in ("unsafe/macro_f1", "unsafe/auroc", "severity/quadratic_kappa", "category/exact_match"):
        one, ten, wrong = (found[f"test/{name}_high"] - found[f"test/{name}_low"] for found in (alone, together, apart))
        assert ten == pytest.approx(one, rel=1e-9), name
        assert wrong < 0.5 * one
        assert alone[f"test/{name}_low"] <= alone[f"test/{name}"] <= alone[f"test/{name}_high"]


def parts(logits):
    return logits.severity, logits.category


def test_intervals_are_those_of_a_plain_loop():
    """The same draws, one by one, through scikit-learn."""
    labels, logits = case(n=40)
    found = evaluate(labels, logits, draws=200, seed=3)
    said = logits.unsafe >= 0
    order = sorted(range(40), key=lambda i: ids(40)[i])  # clusters are numbered by sorted key
    taken = np.random.default_rng(3).integers(0, 40, size=(200, 40))
    f1 = [sk.f1_score(labels.unsafe[rows], said[rows], average="macro") for rows in np.array(order)[taken]]
    auc = [sk.roc_auc_score(labels.unsafe[rows], logits.unsafe[rows]) for rows in np.array(order)[taken]]
    for name, sample in (("macro_f1", f1), ("auroc", auc)):
        low, high = expanded(sample, 40)
        assert found[f"test/unsafe/{name}_low"] == pytest.approx(low)
        assert found[f"test/unsafe/{name}_high"] == pytest.approx(high)


def test_a_share_of_one_still_has_an_interval():
    labels, _ = case(n=30)
    perfect = ModerationLogits(np.where(labels.unsafe == 1, 4.0, -4.0), None, None)
    found = evaluate(labels, perfect, draws=100)
    assert found["test/unsafe/accuracy"] == found["test/unsafe/accuracy_high"] == 1
    assert 0.85 < found["test/unsafe/accuracy_low"] < 0.95  # Wilson for 30 of 30


def test_order_of_rows_changes_nothing():
    labels, logits = case(n=50, gaps=True)
    turn = np.random.default_rng(1).permutation(50)
    moved = ModerationLabels(labels.unsafe[turn], labels.severity[turn], labels.category[turn], NAMES)
    shuffled = ModerationLogits(logits.unsafe[turn], logits.severity[turn], logits.category[turn])
    first = evaluate(labels, logits, draws=100)
    verdicts = decide(shuffled, Calibration.default(NAMES))
    second = evaluate_moderation([ids(50)[i] for i in turn], moved, shuffled, verdicts, draws=100)
    assert first.keys() == second.keys()
    assert list(second.values()) == pytest.approx(list(first.values()))


def test_what_has_no_value_is_left_out():
    labels, logits = case(n=30)
    safe = ModerationLabels(np.zeros(30, int), np.full(30, -1), np.full((30, 3), -1), NAMES)
    found = evaluate(safe, ModerationLogits(np.full(30, -1.0), *parts(logits)), draws=50)
    assert found["test/unsafe/accuracy"] == 1 and found["test/unsafe/fpr"] == 0
    for name in ("auroc", "auprc", "recall", "fnr", "f1", "precision", "tpr_at_fpr_1pct"):
        assert f"test/unsafe/{name}" not in found
    assert not [name for name in found if "severity" in name or "category" in name]
    one = evaluate(labels, ModerationLogits(logits.unsafe, None, None), draws=50, clusters=["the same prompt"] * 30)
    assert not [name for name in one if name.endswith("_low")]


def test_probabilities_alone():
    labels, logits = case()
    verdicts = decide(logits, Calibration.default(NAMES))
    found = evaluate_moderation(ids(200), labels, None, verdicts, draws=0)
    with_logits = evaluate(labels, logits)
    assert "test/unsafe/nll_raw" in with_logits and "test/unsafe/nll_raw" not in found
    assert found["test/unsafe/auroc"] == pytest.approx(with_logits["test/unsafe/auroc"])


def test_wrong_input_is_refused():
    labels, logits = case(n=5)
    broken = ModerationLogits(np.array([0.0, np.nan, 0, 0, 0]), *parts(logits))
    with pytest.raises(UserError, match="rows r1"):
        evaluate_moderation(ids(5), labels, broken, decide(logits, Calibration.default(NAMES)))
    none = ModerationLabels(np.full(5, -1), np.full(5, -1), np.full((5, 3), -1), NAMES)
    with pytest.raises(UserError, match="none of the 5 rows to be evaluated has a label"):
        evaluate(none, logits)
    with pytest.raises(ValueError, match="5 labels"):
        evaluate_moderation(ids(4), labels, logits, decide(logits, Calibration.default(NAMES)))
    fewer = ModerationLabels(labels.unsafe, labels.severity, labels.category[:, :2], NAMES[:2])
    with pytest.raises(ValueError, match="3 columns for 2 categories"):
        evaluate_moderation(ids(5), fewer, None, decide(logits, Calibration.default(NAMES)))


def test_names_of_categories():
    assert category_slugs(NAMES) == ["white_collar_crime", "drugs", "discrimination_stereotype_injustice"]


def test_ten_thousand_draws_take_seconds():
    labels, logits = case(n=1138, names=tuple(f"c{i}" for i in range(19)))
    start = time.process_time()
    evaluate(labels, logits, draws=10_000, clusters=[f"p{i // 2}" for i in range(1138)])
    assert time.process_time() - start < 10


def test_verdicts_need_no_all_heads():
    labels, logits = case(n=20)
    verdicts = Verdicts(expit(logits.unsafe), None, None, logits.unsafe > 0, None, None)
    found = evaluate_moderation(ids(20), labels, ModerationLogits(logits.unsafe, None, None), verdicts, draws=0)
    assert {name.split("/")[1] for name in found} == {"unsafe"}
