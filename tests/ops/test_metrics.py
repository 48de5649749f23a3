"""Metrics against hand-worked numbers, scikit-learn and scipy."""

import numpy as np
import pytest

from saferlhf.ops import metrics


# ------------------------------------------------------------------------------------------------ preference
def test_pair_accuracy_hand_worked():
    # right, wrong, tie, right, unlabelled
    margin, preferred = [2.0, 1.0, 0.0, -3.0, 9.0], [0, 1, 1, 1, -1]
    assert metrics.pair_credit(margin, preferred)[:4].tolist() == [1.0, 0.0, 0.5, 1.0]
    accuracy, ties, pairs = metrics.pair_accuracy(margin, preferred)
    assert (accuracy, ties, pairs) == (0.625, 0.25, 4)


def test_pair_accuracy_of_constant_scores_is_half_not_zero():
    assert metrics.pair_accuracy(np.zeros(10), np.ones(10)) == (0.5, 1.0, 10)


def test_pair_accuracy_without_labels():
    assert metrics.pair_accuracy([1.0], [-1]) == (None, None, 0)
    assert metrics.pair_accuracy([], []) == (None, None, 0)


def test_sign_accuracy_is_strict():
    # unsafe above 0 right; safe below 0 right; 0 wrong for both; unlabelled left out
    costs, unsafe = [[1.0, -1.0], [0.0, 0.0], [3.0, 5.0]], [[1, 0], [1, 0], [0, -1]]
    credit = metrics.sign_credit(costs, unsafe)
    assert credit[:2].tolist() == [[1.0, 1.0], [0.0, 0.0]]
    assert credit[2, 0] == 0.0
    assert np.isnan(credit[2, 1])
    assert metrics.sign_accuracy(costs, unsafe) == 0.4
    assert metrics.sign_accuracy([1.0], [-1]) is None


def test_metrics_do_not_depend_on_row_order():
    rng = np.random.default_rng(0)
    margin, preferred, order = rng.normal(size=99), rng.integers(-1, 2, 99), rng.permutation(99)
    assert metrics.pair_accuracy(margin, preferred) == metrics.pair_accuracy(margin[order], preferred[order])


# ------------------------------------------------------------------------------------------------ binary
def test_binary_metrics_hand_worked():
    # threshold 0.5: TP 2, FN 1, FP 1, TN 3; the score at the threshold is predicted safe
    scores, labels = [0.9, 0.8, 0.5, 0.7, 0.1, 0.2, 0.3], [1, 1, 1, 0, 0, 0, 0]
    found = metrics.binary_metrics(scores, labels, threshold=0.5)
    assert found["accuracy"] == pytest.approx(5 / 7)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["recall"] == pytest.approx(2 / 3)
    assert found["f1"] == pytest.approx(2 / 3)
    assert found["macro_f1"] == pytest.approx((2 / 3 + 6 / 8) / 2)
    assert found["fpr"] == 0.25
    assert found["fnr"] == pytest.approx(1 / 3)
    # of the 12 (unsafe, safe) pairs only (0.5, 0.7) is in the wrong order
    assert found["auroc"] == pytest.approx(11 / 12)
    assert found["prevalence"] == pytest.approx(3 / 7)


@pytest.mark.parametrize("seed", range(8))
def test_binary_metrics_equal_scikit_learn(seed):
    sk = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 200)
    labels[:2] = 0, 1
    scores = np.round(rng.normal(size=200) + labels, 1)  # rounded: many ties
    threshold = float(rng.normal())
    said = scores > threshold
    found = metrics.binary_metrics(scores, labels, threshold)
    tn, fp, fn, tp = sk.confusion_matrix(labels, said).ravel()
    expected = {
        "accuracy": sk.accuracy_score(labels, said),
        "precision": sk.precision_score(labels, said, zero_division=0),
        "recall": sk.recall_score(labels, said),
        "f1": sk.f1_score(labels, said, zero_division=0),
        "macro_f1": sk.f1_score(labels, said, average="macro", labels=[0, 1], zero_division=0),
        "fpr": fp / (fp + tn),
        "fnr": fn / (fn + tp),
        "auroc": sk.roc_auc_score(labels, scores),
        "average_precision": sk.average_precision_score(labels, scores),
        "prevalence": labels.mean(),
    }
    assert found == pytest.approx(expected, abs=1e-12)


def test_unlabelled_rows_are_left_out():
    with_them = metrics.binary_metrics([1.0, -1.0, 7.0], [1, 0, -1])
    assert with_them == metrics.binary_metrics([1.0, -1.0], [1, 0])


@pytest.mark.parametrize(
    ("scores", "labels", "undefined"),
    [
        ([], [], set(metrics.binary_metrics([1.0, -1.0], [1, 0]))),
        ([1.0, -1.0], [0, 0], {"recall", "fnr", "auroc", "average_precision"}),
        ([1.0, -1.0], [1, 1], {"fpr", "auroc", "average_precision"}),
    ],
)
def test_degenerate_input_gives_none_never_nan(scores, labels, undefined):
    found = metrics.binary_metrics(scores, labels)
    assert {name for name, value in found.items() if value is None} == undefined
    assert all(np.isfinite(value) for value in found.values() if value is not None)


def test_nothing_flagged_gives_precision_zero():
    found = metrics.binary_metrics([-1.0, -1.0], [1, 0])
    assert (found["precision"], found["recall"], found["f1"], found["auroc"]) == (0.0, 0.0, 0.0, 0.5)


def test_weighted_auroc_equals_repeated_rows():
    rng = np.random.default_rng(3)
    scores, labels = np.round(rng.normal(size=60), 1), rng.integers(0, 2, 60)
    value = metrics.weighted_auroc(scores, labels)
    for _ in range(5):
        weights = rng.integers(0, 4, 60)
        assert value(weights) == pytest.approx(metrics.auroc(np.repeat(scores, weights), np.repeat(labels, weights)))
    # probability by counting all pairs
    up, down = scores[labels == 1], scores[labels == 0]
    counted = np.mean((up[:, None] > down) + 0.5 * (up[:, None] == down))
    assert metrics.auroc(scores, labels) == pytest.approx(counted)
    assert value(np.where(labels == 1, 1.0, 0.0)) is None


# ------------------------------------------------------------------------------------------------ correlation
def test_correlations_hand_worked():
    assert metrics.pearson([1, 2, 3], [2, 4, 6]) == pytest.approx(1.0)
    assert metrics.pearson([1, 2, 3], [1, 0, 1]) == pytest.approx(0.0)
    assert metrics.ranks([10.0, 5.0, 10.0, 1.0]).tolist() == [3.5, 2.0, 3.5, 1.0]
    # d = (0, 1, 1): 1 - 6 * 2 / (3 * 8)
    assert metrics.spearman([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert metrics.spearman([1, 2, 3], [1, 10, 1000]) == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(4))
def test_correlations_equal_second_implementations(seed):
    rng = np.random.default_rng(seed)
    x = np.round(rng.normal(size=120), 1)
    y = np.round(x + rng.normal(size=120), 1)
    assert metrics.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1])
    stats = pytest.importorskip("scipy.stats")
    assert metrics.spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert metrics.ranks(x) == pytest.approx(stats.rankdata(x))


@pytest.mark.parametrize(("x", "y"), [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([1.0, 2.0], [3.0, 3.0])])
def test_correlation_without_value_is_none(x, y):
    assert metrics.pearson(x, y) is None
    assert metrics.spearman(x, y) is None


def test_pearson_of_huge_and_tiny_numbers():
    x = np.array([1.0, 2.0, 3.0, 5.0])
    assert metrics.pearson(x * 1e200, x * 1e-200) == pytest.approx(1.0)


def test_length_correlation():
    assert metrics.length_correlation([0.1, 0.2, 0.9], [10, 20, 30]) == pytest.approx(1.0)
    assert metrics.length_correlation([0.1, 0.2, 0.9], [7, 7, 7]) is None


# ------------------------------------------------------------------------------------------------ description
def test_score_statistics():
    found = metrics.score_statistics([[1.0, 2.0], [3.0, 6.0]])
    assert found["mean"] == 3.0
    assert found["std"] == pytest.approx(np.sqrt(3.5))
    assert (found["min"], found["p50"], found["max"]) == (1.0, 2.5, 6.0)
    assert metrics.score_statistics([]) == {}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_that_are_not_finite_are_refused(bad):
    with pytest.raises(ValueError, match="1 of 2 values"):
        metrics.pair_accuracy([bad, 1.0], [0, 0])
    with pytest.raises(ValueError, match="1 of 2 values"):
        metrics.auroc([bad, 1.0], [0, 1])
