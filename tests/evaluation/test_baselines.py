"""Baselines: what they must find in rows made for it, against scikit-learn, and where there is nothing to learn."""

from __future__ import annotations

import numpy as np
import pytest
from expanded import expanded
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from saferlhf.data.rows import PreferencePair, QuestionAnswer, as_prompt
from saferlhf.evaluation.baselines import C, answer_baselines, pair_baselines
from saferlhf.evaluation.comparison import HEADLINES, baseline_metrics, compare_verdicts
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.ops.moderation import ModerationLabels, Verdicts

NAMES = ("theft", "hate")


def answers(n, seed=0):
    """Unsafe answers say `bad`, thefts `take`, hate `loathe`, and are longer; the prompt says nothing."""
    rng = np.random.default_rng(seed)
    rows, unsafe, category = [], [], []
    for i in range(n):
        bad, theft = bool(rng.random() < 0.6), bool(rng.random() < 0.5)
        words = [f"w{rng.integers(30)}" for _ in range(rng.integers(3, 8) + 6 * bad)]
        words += ["bad", "take" if theft else "loathe"] if bad else []
        rows.append(QuestionAnswer(f"r{i}", as_prompt(f"p{i // 2} please"), " ".join(rng.permutation(words))))
        unsafe.append(int(bad))
        category.append([int(bad and theft), int(bad and not theft)])
    unsafe = np.array(unsafe)
    severity = np.where(unsafe == 1, 1 + np.array(category)[:, 0], 0)
    return rows, ModerationLabels(unsafe, severity, np.array(category), NAMES)


def test_tfidf_finds_words_and_length_finds_length():
    train, labels = answers(300)
    test, truth = answers(100, seed=1)
    found = answer_baselines(train, labels, test)
    assert list(found) == ["constant", "length", "tfidf"]
    assert (found["tfidf"].unsafe == (truth.unsafe == 1)).mean() > 0.95
    assert (found["tfidf"].category == (truth.category == 1)).all(axis=1).mean() > 0.85
    assert (found["tfidf"].severity == truth.severity).mean() > 0.95
    assert (found["length"].unsafe == (truth.unsafe == 1)).mean() > 0.9
    assert (found["length"].category[:, 0] == (truth.category[:, 0] == 1)).mean() < 0.9
    for verdicts in found.values():
        np.testing.assert_allclose(verdicts.p_severity.sum(axis=1), 1)


def test_tfidf_is_scikit_learns():
    train, labels = answers(200)
    test, _ = answers(50, seed=1)
    found = answer_baselines(train, labels, test)["tfidf"]
    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2)
    seen = vectorizer.fit_transform([f"{row.prompt[0].content}\n{row.response}" for row in train])
    asked = vectorizer.transform([f"{row.prompt[0].content}\n{row.response}" for row in test])
    model = LogisticRegression(C=C, solver="liblinear", random_state=0).fit(seen, labels.unsafe)
    np.testing.assert_allclose(found.p_unsafe, model.predict_proba(asked)[:, 1], atol=1e-6)


def test_constant_is_the_most_common_answer_of_the_training_rows():
    train, labels = answers(300)
    found = answer_baselines(train, labels, train[:7])["constant"]
    assert found.unsafe.all() and found.p_unsafe == pytest.approx(labels.unsafe.mean())
    assert found.severity.tolist() == [np.bincount(labels.severity).argmax()] * 7
    assert not found.category.any()  # no category is the most common set
    np.testing.assert_allclose(found.p_category[0], labels.category.mean(axis=0))


def test_rows_without_labels_teach_nothing():
    train, labels = answers(300)
    test, _ = answers(20, seed=1)
    turned = np.where(np.arange(300) < 150, -1, labels.unsafe)
    half = ModerationLabels(turned, np.full(300, -1), np.full((300, 2), -1), NAMES)
    found = answer_baselines(train, half, test)
    alone = ModerationLabels(labels.unsafe[150:], half.severity[150:], half.category[150:], NAMES)
    for name in ("length", "tfidf"):
        assert found[name].severity is None and found[name].category is None
    assert found["constant"].p_unsafe[0] == pytest.approx(alone.unsafe.mean())


def test_one_class_only_and_empty_words():
    rows = [QuestionAnswer(f"r{i}", as_prompt("?"), "!") for i in range(8)]
    labels = ModerationLabels(np.zeros(8, int), np.zeros(8, int), np.zeros((8, 2), int), NAMES)
    for verdicts in answer_baselines(rows, labels, rows[:3]).values():
        assert not verdicts.unsafe.any() and not verdicts.severity.any() and not verdicts.category.any()
        assert (verdicts.p_unsafe < 0.5).all()


def test_prompts_alone_and_fewer_heads():
    train, labels = answers(300)
    found = answer_baselines(train, labels, train[:40], prompt_only=True, heads=("unsafe",))
    assert found["tfidf"].severity is None and found["tfidf"].category is None
    changed = [QuestionAnswer(row.id, row.prompt, "bad bad") for row in train]
    again = answer_baselines(changed, labels, changed[:40], prompt_only=True, heads=("unsafe",))
    np.testing.assert_array_equal(found["tfidf"].p_unsafe, again["tfidf"].p_unsafe)


@pytest.mark.slow
def test_tfidf_on_real_rows_reaches_what_was_measured(data_root):
    """PKU-SafeRLHF, a twentieth of its train rows: TF-IDF finds most of what is unsafe, the length next to nothing."""
    from command_lines import composed

    from saferlhf.config.schema import DataConfig
    from saferlhf.config.validate import typed
    from saferlhf.data.build import build_data
    from saferlhf.data.labels import labels_of
    from saferlhf.data.rows import PKU_CATEGORIES, prompt_text

    words = ["data=pku_saferlhf", f"data.root={data_root}", "data.val_fraction=0.0"]
    rows = build_data(
        typed(DataConfig, composed(*words, command="evaluate").data, "data"), QuestionAnswer, ("is_safe",)
    )
    train, test = (labels_of(part, PKU_CATEGORIES) for part in (rows.train, rows.test))
    found = answer_baselines(rows.train, train, rows.test)
    ids, clusters = [row.id for row in rows.test], [prompt_text(row.prompt) for row in rows.test]
    metrics = baseline_metrics(ids, test, found, clusters=clusters, draws=0)
    assert 0.83 < metrics["test/baseline_tfidf/unsafe/macro_f1"] < 0.87
    assert 0.91 < metrics["test/baseline_tfidf/unsafe/auroc"] < 0.95
    assert 0.74 < metrics["test/baseline_tfidf/severity/accuracy"] < 0.81
    assert metrics["test/baseline_length/unsafe/auroc"] < 0.65
    assert metrics["test/baseline_constant/unsafe/auroc"] == 0.5


# ------------------------------------------------------------------------------------------------ pairs
def pairs(n, seed=0, second=0.8):
    """The better response says `good`, and mostly stands second."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        winner = int(rng.random() < second)
        texts = [" ".join(f"w{rng.integers(30)}" for _ in range(rng.integers(3, 9))) for _ in range(2)]
        texts[winner] += " good"
        rows.append(PreferencePair(f"r{i}", as_prompt(f"p{i}"), *texts, better_response_id=winner))
    return rows


def test_pair_baselines():
    train, test = pairs(300), pairs(100, seed=1)
    found = pair_baselines(train, test, "better")
    winners = np.array([row.better_response_id for row in test])
    assert list(found) == ["constant", "longer", "tfidf"]
    assert (found["constant"].argmax(axis=1) == 1).all()
    assert (found["tfidf"].argmax(axis=1) == winners).mean() > 0.95
    assert found["longer"][0].tolist() == [len(test[0].response_0.split()), len(test[0].response_1.split())]
    # the score is of a response, not of its side
    turned = [PreferencePair(r.id, r.prompt, r.response_1, r.response_0) for r in test]
    np.testing.assert_allclose(pair_baselines(train, turned, "better")["tfidf"], found["tfidf"][:, ::-1])


def test_pairs_without_labels():
    found = pair_baselines(pairs(20), pairs(5, seed=1), "safer")
    assert list(found) == ["constant", "longer"]
    assert found["constant"].tolist() == [[1.0, 0.0]] * 5


# ------------------------------------------------------------------------------------------------ beside one another
def test_baseline_metrics_are_the_headlines():
    train, labels = answers(200)
    found = answer_baselines(train, labels, train)
    ids, options = [row.id for row in train], {"clusters": [f"p{i // 2}" for i in range(200)], "draws": 30}
    metrics = baseline_metrics(ids, labels, found, prefix="val", **options)
    every = evaluate_moderation(ids, labels, None, found["length"], prefix="val/baseline_length", **options)
    mine = {name: value for name, value in metrics.items() if "baseline_length" in name}
    assert mine and mine.items() <= every.items()
    assert {name.split("/")[2] for name in mine} == set(HEADLINES)
    assert "val/baseline_length/category/f1_theft" in every and "val/baseline_length/category/f1_theft" not in mine


def test_differences_are_paired():
    """The interval of a difference is that of the difference, not of two estimates; a model equals itself."""
    train, labels = answers(200)
    found = answer_baselines(train, labels, train)
    clusters = [f"p{i // 2}" for i in range(200)]
    none = compare_verdicts(labels, found["tfidf"], found["tfidf"], clusters=clusters, draws=50)
    assert all(abs(value) < 1e-12 for name, value in none.items() if not name.endswith("_n"))
    ids = [row.id for row in train]
    first, second = (
        evaluate_moderation(ids, labels, None, found[name], clusters=clusters, draws=300, prefix="x")
        for name in ("tfidf", "length")
    )
    gains = compare_verdicts(labels, found["tfidf"], found["length"], clusters=clusters, draws=300)
    for area, names in HEADLINES.items():
        for name in names:
            expected = first.get(f"x/{area}/{name}", np.nan) - second.get(f"x/{area}/{name}", np.nan)
            if not np.isnan(expected):
                assert gains[f"difference/{area}/{name}"] == pytest.approx(expected)
    low, high = gains["difference/unsafe/macro_f1_low"], gains["difference/unsafe/macro_f1_high"]
    assert low <= gains["difference/unsafe/macro_f1"] <= high
    # the same draws, one by one
    codes = np.unique(clusters, return_inverse=True)[1]
    taken = np.random.default_rng(0).integers(0, 100, size=(300, 100))
    accuracy = {name: found[name].unsafe == (labels.unsafe == 1) for name in ("tfidf", "length")}
    sample = []
    for draw in taken:
        weights = np.bincount(draw, minlength=100)[codes]
        sample.append((weights * (accuracy["tfidf"].astype(float) - accuracy["length"])).sum() / weights.sum())
    bounds = expanded(sample, 100)
    assert [gains[f"difference/unsafe/accuracy_{end}"] for end in ("low", "high")] == pytest.approx(list(bounds))


def test_a_head_that_one_lacks_is_not_compared():
    train, labels = answers(50)
    found = answer_baselines(train, labels, train)["tfidf"]
    without = Verdicts(found.p_unsafe, None, None, found.unsafe, None, None)
    gains = compare_verdicts(labels, found, without, clusters=[row.id for row in train], draws=20)
    assert {name.split("/")[1] for name in gains} == {"unsafe"}
