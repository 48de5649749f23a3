"""Every metric on random rows, with integer weights, against scikit-learn; and weights against repeated rows.

The bootstrap is right only if a row taken k times counts k times in every metric. So each metric is computed three
ways: from the weighted sums or weights, by scikit-learn with `sample_weight`, and from rows that are really repeated.
Rows come with ties, one class only, classes that are absent, rows that are not labelled and rows of weight 0.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics as sk

from saferlhf.ops import metrics
from saferlhf.ops import moderation_metrics as maths

NAN = float("nan")
CATEGORIES = 19
CASES = settings(max_examples=60, deadline=None)
KINDS = [(0, 1), (0, 1), (0, 1, -1), (0,), (1,), (1, -1), (0, -1), (-1,)]
seeds = st.integers(0, 100_000)


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    # scikit-learn warns of classes that are not there; the tests look at its numbers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def agree(mine: Any, theirs: Any, what: str = "") -> None:
    np.testing.assert_allclose(mine, theirs, rtol=1e-9, atol=1e-9, equal_nan=True, err_msg=what)


def weighted(
    columns: NDArray[Any], functions: Callable[..., Any], weights: NDArray[Any], *rest: Any
) -> dict[str, float]:
    """Metrics of rows each taken as often as its weight says."""
    return {name: float(value[0]) for name, value in functions(weights[None, :] @ columns, *rest).items()}


def weights_of(draw: np.random.Generator, n: int) -> NDArray[np.int64]:
    return draw.integers(0, 4, n) if draw.random() < 0.8 else np.ones(n, np.int64)


# ------------------------------------------------------------------------------------------------ unsafe
class Binary(NamedTuple):
    scores: NDArray[Any]
    p: NDArray[Any]
    said: NDArray[Any]
    labels: NDArray[Any]
    weights: NDArray[Any]

    def labelled(self) -> Binary:
        """The rows that count: labelled, and taken at least once."""
        return Binary(*(part[(self.labels >= 0) & (self.weights > 0)] for part in self))

    def repeated(self) -> Binary:
        return Binary(*(np.repeat(part, self.weights) for part in self[:4]), np.ones(self.weights.sum(), np.int64))


@st.composite
def binary(draw: Any) -> Binary:
    n, rng = draw(st.integers(1, 60)), np.random.default_rng(draw(seeds))
    scores = rng.integers(-3, 4, n) / 7.0 if draw(st.booleans()) else rng.normal(size=n)  # with ties and without
    p = np.round(rng.random(n), draw(st.sampled_from([1, 12]))) * 0.9 + 0.05
    said = rng.random(n) < draw(st.sampled_from([0.0, 0.4, 1.0]))
    return Binary(scores, p, said, rng.choice(draw(st.sampled_from(KINDS)), n), weights_of(rng, n))


@given(binary())
@CASES
def test_decisions(case: Binary) -> None:
    found = weighted(maths.unsafe_columns(case.said, case.labels), maths.unsafe_metrics, case.weights)
    again = case.repeated()
    columns = maths.unsafe_columns(again.said, again.labels)
    agree(list(found.values()), list(weighted(columns, maths.unsafe_metrics, again.weights).values()))
    _, _, said, y, w = case.labelled()
    if not y.size:
        assert np.isnan(list(found.values())).all()
        return
    given_weights: dict[str, Any] = {"sample_weight": w, "zero_division": NAN}
    expected = {
        "accuracy": sk.accuracy_score(y, said, sample_weight=w),
        "macro_f1": sk.f1_score(y, said, average="macro", sample_weight=w),
        "f1": sk.f1_score(y, said, **given_weights),
        "precision": sk.precision_score(y, said, **given_weights),
        "recall": sk.recall_score(y, said, **given_weights),
        "fpr": 1 - sk.recall_score(y, said, pos_label=0, **given_weights),
        "fnr": 1 - sk.recall_score(y, said, **given_weights),
        "predicted_rate": np.average(said, weights=w),
        "prevalence": np.average(y, weights=w),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        agree(found[name], value, name)


@given(binary())
@CASES
def test_ranks(case: Binary) -> None:
    found = maths.ranking(case.scores, case.labels)(case.weights[None, :].astype(float))
    again = case.repeated()
    rows = maths.ranking(again.scores, again.labels)(np.ones((1, len(again.labels))))
    for name, value in found.items():
        agree(value, rows[name], name)
    scores, _, _, y, w = case.labelled()
    if len(set(y)) < 2:
        assert all(np.isnan(value).all() for value in found.values())
        return
    agree(found["auroc"][0], sk.roc_auc_score(y, scores, sample_weight=w))
    agree(found["auprc"][0], sk.average_precision_score(y, scores, sample_weight=w))
    fpr, tpr, _ = sk.roc_curve(y, scores, sample_weight=w, drop_intermediate=False)
    agree(found["tpr_at_fpr_1pct"][0], tpr[fpr <= 0.01].max())
    agree(found["tpr_at_fpr_5pct"][0], tpr[fpr <= 0.05].max())
    agree(metrics.weighted_auroc(scores, y)(w), found["auroc"][0])


@given(binary())
@CASES
def test_probabilities(case: Binary) -> None:
    found = weighted(maths.calibration_columns(case.p, case.labels), maths.calibration_metrics, case.weights)
    again = case.repeated()
    # the bins of the ECE are those of the rows given, so only the others are the same on repeated rows
    rows = weighted(maths.calibration_columns(again.p, again.labels), maths.calibration_metrics, again.weights)
    _, p, _, y, w = case.labelled()
    if not y.size:
        assert np.isnan(list(found.values())).all()
        return
    for name in ("brier", "nll"):
        agree(found[name], rows[name], name)
    agree(found["brier"], sk.brier_score_loss(y, p, sample_weight=w, pos_label=1))
    agree(found["nll"], sk.log_loss(y, p, sample_weight=w, labels=[0, 1]))
    place = np.full(len(case.p), -1)
    place[case.labels >= 0] = maths.equal_mass_bins(case.p[case.labels >= 0])
    place = place[(case.labels >= 0) & (case.weights > 0)]
    gaps = [abs(np.sum(w[place == b] * (p - y)[place == b])) for b in range(maths.ECE_BINS)]
    agree(found["ece"], sum(gaps) / w.sum())
    assert found["ece"] >= abs(np.average(p - y, weights=w)) - 1e-12  # never less than the gap over all rows


@given(binary(), st.sampled_from([-0.3, 0.0, 1 / 7]))
@CASES
def test_yes_no_decisions_of_any_score(case: Binary, threshold: float) -> None:
    """`binary_metrics`, which has no weights: rows are repeated. Ties with the threshold are safe."""
    scores, _, _, labels, _ = case.repeated()
    found = metrics.binary_metrics(scores, labels, threshold)
    known = labels >= 0
    y, said, s = labels[known], (scores > threshold)[known].astype(int), scores[known]
    if not y.size:
        assert set(found.values()) == {None}
        return
    both = len(set(y)) == 2
    expected = {
        "accuracy": sk.accuracy_score(y, said),
        "precision": sk.precision_score(y, said, zero_division=0),
        "recall": sk.recall_score(y, said) if (y == 1).any() else None,
        "f1": sk.f1_score(y, said, zero_division=0),
        "macro_f1": sk.f1_score(y, said, labels=[0, 1], average="macro", zero_division=0),
        "fpr": 1 - sk.recall_score(y, said, pos_label=0) if (y == 0).any() else None,
        "fnr": 1 - sk.recall_score(y, said) if (y == 1).any() else None,
        "auroc": sk.roc_auc_score(y, s) if both else None,
        "average_precision": sk.average_precision_score(y, s) if both else None,
        "prevalence": y.mean(),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] is None) == (value is None), name
        if value is not None:
            agree(found[name], value, name)


@given(binary())
@CASES
def test_rows_without_a_label_count_nowhere(case: Binary) -> None:
    """Each function by itself: -1 is neither a positive nor a negative."""
    scores, _, _, labels, _ = case.repeated()
    kept = labels >= 0
    for score in (metrics.auroc, metrics.average_precision):
        assert score(scores, labels) == score(scores[kept], labels[kept])
    weights = np.arange(len(labels)) % 3
    whole = metrics.weighted_auroc(scores, labels)(weights)
    assert whole == metrics.weighted_auroc(scores[kept], labels[kept])(weights[kept])


# ------------------------------------------------------------------------------------------------ severity
class Levels(NamedTuple):
    said: NDArray[Any]
    p: NDArray[Any]
    labels: NDArray[Any]
    weights: NDArray[Any]


@st.composite
def levels(draw: Any) -> Levels:
    n, rng = draw(st.integers(1, 60)), np.random.default_rng(draw(seeds))
    kinds = st.sampled_from([(0, 1, 2, 3), (0, 1, 2, 3, -1), (0, 2), (3,), (0, -1), (-1,)])
    said = rng.choice([kind for kind in draw(kinds) if kind >= 0] or [1], n)
    return Levels(said, rng.dirichlet(np.ones(4), n), rng.choice(draw(kinds), n), weights_of(rng, n))


@given(levels())
@CASES
def test_severity(case: Levels) -> None:
    found = weighted(maths.severity_columns(case.said, case.labels), maths.severity_metrics, case.weights)
    said, labels = (np.repeat(part, case.weights) for part in (case.said, case.labels))
    rows = weighted(maths.severity_columns(said, labels), maths.severity_metrics, np.ones(len(said), np.int64))
    for name, value in found.items():
        agree(value, rows[name], name)
    kept = (case.labels >= 0) & (case.weights > 0)
    y, t, w = case.labels[kept], case.said[kept], case.weights[kept]
    if not y.size:
        assert all(np.isnan(value) for value in found.values())
        return
    every = [0, 1, 2, 3]
    recalls = sk.recall_score(y, t, labels=every, average=None, sample_weight=w, zero_division=NAN)
    expected = {
        "accuracy": sk.accuracy_score(y, t, sample_weight=w),
        "macro_f1": sk.f1_score(y, t, average="macro", sample_weight=w),
        "mae": sk.mean_absolute_error(y, t, sample_weight=w),
        "quadratic_kappa": NAN,
        "undercalled_3": 1 - recalls[3],
        "unsafe_called_safe": np.average(t[y > 0] == 0, weights=w[y > 0]) if (y > 0).any() else NAN,
    }
    expected |= {f"recall_{level}": recalls[level] for level in every}
    if len(set(y) | set(t)) > 1:
        expected["quadratic_kappa"] = sk.cohen_kappa_score(y, t, labels=every, weights="quadratic", sample_weight=w)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        agree(found[name], value, name)
    sums = case.weights @ maths.log_loss_columns(case.p, case.labels)
    agree(sums[1] / sums[0], sk.log_loss(y, case.p[kept], labels=every, sample_weight=w))


# ------------------------------------------------------------------------------------------------ categories
class Sets(NamedTuple):
    said: NDArray[Any]
    p: NDArray[Any]
    labels: NDArray[Any]
    unsafe: NDArray[Any]
    weights: NDArray[Any]


@st.composite
def sets(draw: Any) -> Sets:
    """19 categories, many of them in no row, some answers exactly right."""
    n, rng = draw(st.integers(1, 50)), np.random.default_rng(draw(seeds))
    labels = (rng.random((n, CATEGORIES)) < rng.choice([0.0, 0.05, 0.3], CATEGORIES)).astype(np.int64)
    noise = rng.random((n, CATEGORIES)) < draw(st.sampled_from([0.0, 0.02, 0.3]))
    unsafe = labels.any(axis=1).astype(np.int64)
    said = (labels == 1) ^ noise
    labels[rng.random(n) < draw(st.sampled_from([0.0, 0.3, 1.0]))] = -1
    unsafe[rng.random(n) < 0.1] = -1
    return Sets(said, rng.random((n, CATEGORIES)) * 0.98 + 0.01, labels, unsafe, weights_of(rng, n))


@given(sets())
@settings(max_examples=25, deadline=None)
def test_categories(case: Sets) -> None:
    names = [f"c{place}" for place in range(CATEGORIES)]
    columns = maths.category_columns(case.said, case.labels, case.unsafe)
    found = weighted(columns, maths.category_metrics, case.weights, names)
    again = [np.repeat(part, case.weights, axis=0) for part in case]
    rows = maths.category_columns(again[0], again[2], again[3])
    ones = np.ones(len(rows), np.int64)
    agree(list(found.values()), list(weighted(rows, maths.category_metrics, ones, names).values()))
    kept = (case.labels[:, 0] >= 0) & (case.weights > 0)
    y, t, w, bad = case.labels[kept], case.said[kept].astype(int), case.weights[kept], case.unsafe[kept] == 1
    if not kept.any():
        assert all(np.isnan(value) for value in found.values())
        return
    options: dict[str, Any] = {"sample_weight": w, "zero_division": NAN}
    each = sk.f1_score(y, t, average=None, **options)
    expected = {
        "exact_match": sk.accuracy_score(y, t, sample_weight=w),
        "exact_match_unsafe": sk.accuracy_score(y[bad], t[bad], sample_weight=w[bad]) if bad.any() else NAN,
        "micro_f1": sk.f1_score(y, t, average="micro", **options),
        "macro_f1": np.nanmean(each) if not np.isnan(each).all() else NAN,
    }
    precision, recall = (score(y, t, average=None, **options) for score in (sk.precision_score, sk.recall_score))
    for place, name in enumerate(names):
        expected |= {f"f1_{name}": each[place], f"precision_{name}": precision[place]}
        expected[f"recall_{name}"] = recall[place]
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        agree(found[name], value, name)
    sums = case.weights @ maths.log_loss_columns(case.p, case.labels)
    losses = [sk.log_loss(y[:, c], case.p[kept][:, c], labels=[0, 1], sample_weight=w) for c in range(CATEGORIES)]
    agree(sums[1] / sums[0], np.mean(losses))


# ------------------------------------------------------------------------------------------------ pairs, correlations
@given(st.integers(0, 60), seeds, st.booleans())
@CASES
def test_pair_accuracy(n: int, seed: int, tied: bool) -> None:
    """Against scikit-learn on the pairs without a tie, ties one half; and on repeated rows."""
    rng = np.random.default_rng(seed)
    margin = rng.integers(-2, 3, n) / 3.0 if tied else rng.normal(size=n)
    preferred, w = rng.choice([0, 1, -1], n), weights_of(rng, n)
    found = metrics.pair_accuracy(np.repeat(margin, w), np.repeat(preferred, w))
    kept = (preferred >= 0) & (w > 0)
    assert found.pairs == w[kept].sum()
    if not kept.any():
        assert found == (None, None, 0)
        return
    apart, whole = kept & (margin != 0), w[kept].sum()
    ties = w[kept & (margin == 0)].sum()
    right = 0.0
    if apart.any():
        said = (margin[apart] < 0).astype(int)
        right = sk.accuracy_score(preferred[apart], said, normalize=False, sample_weight=w[apart])
    agree(found.accuracy, (right + ties / 2) / whole)
    agree(found.tie_rate, ties / whole)
    credit = metrics.pair_credit(margin, preferred)
    agree(np.nansum(credit * w) / whole, found.accuracy)
    turned = metrics.pair_accuracy(-np.repeat(margin, w), np.repeat(preferred, w))
    agree(found.accuracy + turned.accuracy, 1.0)  # a tie is worth as much either way


@given(binary())
@CASES
def test_sign_accuracy(case: Binary) -> None:
    """A cost of exactly 0 is wrong either way, so it is taken away before scikit-learn counts."""
    costs, _, _, labels, _ = case.repeated()
    found = metrics.sign_accuracy(costs, labels)
    known = labels >= 0
    if not known.any():
        assert found is None
        return
    clear = known & (costs != 0)
    right = sk.accuracy_score(labels[clear], costs[clear] > 0, normalize=False) if clear.any() else 0
    agree(found, right / known.sum())


@given(st.integers(2, 60), seeds, st.booleans())
@CASES
def test_correlations(n: int, seed: int, tied: bool) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 4, n).astype(float) if tied else rng.normal(size=n)
    y = x + rng.integers(-1, 2, n)
    found = metrics.spearman(x, y), metrics.pearson(x, y)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert found == (None, None)
        return
    agree(found[0], stats.spearmanr(x, y).statistic)
    agree(found[1], np.corrcoef(x, y)[0, 1])
    agree(metrics.ranks(x), stats.rankdata(x))


# ------------------------------------------------------------------------------------------------ scale
@given(binary(), st.floats(0.25, 8.0), st.floats(-3.0, 3.0))
@CASES
def test_ranks_do_not_see_the_scale_of_scores(case: Binary, scale: float, shift: float) -> None:
    """Any rising map of distinct values leaves AUROC, average precision and TPRs as they are."""
    places = np.unique(case.scores, return_inverse=True)[1].astype(float)
    one, other = (
        maths.ranking(scores, case.labels)(case.weights[None, :]) for scores in (places, places * scale + shift)
    )
    for name, value in one.items():
        agree(value, other[name], name)
    agree(maths.ranking(case.scores, case.labels)(case.weights[None, :])["auroc"], one["auroc"])
