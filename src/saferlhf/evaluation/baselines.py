"""Baselines of every table: what no model is needed for, trained on the training rows and asked about the others.

Single answers, each head by itself (nothing makes the heads agree):

    constant   the most common answer of the training rows; its probabilities are their base rates
    length     logistic regression on the response's length in words and its logarithm
    tfidf      logistic regression on TF-IDF of words and word pairs of prompt and response

Pairs, as a score of each response, higher = preferred:

    constant   the side that wins most often: what position alone gives away
    longer     the response with more words
    tfidf      logistic regression without intercept on the difference of the two responses' TF-IDF vectors

TF-IDF: sublinear term counts, words and pairs of words that occur in two rows or more. C = 10: the best of 1, 3, 10,
30, 100 by log loss of severity, and near the best of unsafe, in three-fold cross-validation by prompt on the
PKU-SafeRLHF training rows; scikit-learn's 1 underfits a few thousand rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.data.rows import PreferencePair, QuestionAnswer, prompt_text
from saferlhf.evaluation.preference import preferred_labels
from saferlhf.ops.moderation import SEVERITIES, ModerationLabels, Verdicts

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

HEADS = ("unsafe", "severity", "category")

C = 10.0
MOST_ITERATIONS = 500


def answer_baselines(
    train: Sequence[QuestionAnswer],
    labels: ModerationLabels,
    rows: Sequence[QuestionAnswer],
    *,
    prompt_only: bool = False,
    heads: Sequence[str] = HEADS,
) -> dict[str, Verdicts]:
    """Verdicts of each baseline for `rows`.

    Args:
        train: N rows to learn from.
        labels: of `train`; a head without labels gives none, and its part of the verdicts is None.
        rows: n rows to be judged; their labels are not looked at.
        prompt_only: look at prompts alone, as a moderator of prompts does.
        heads: which of unsafe, severity and category are wanted beside unsafe.

    Returns:
        name -> verdicts of n rows, decisions at probability 1/2 and at the likeliest severity.
    """
    labels = _only(labels, heads)
    texts = [[_text(row, prompt_only) for row in part] for part in (train, rows)]
    lengths = [[prompt_text(row.prompt) if prompt_only else row.response for row in part] for part in (train, rows)]
    words = _tfidf(texts[0], texts[1])
    features = {"length": _lengths(lengths[0], lengths[1]), "tfidf": words}
    found = {"constant": _constant(labels, len(rows))}
    for name, (seen, asked) in features.items():
        found[name] = _regressions(seen, labels, asked)
    return found


def pair_baselines(
    train: Sequence[PreferencePair], rows: Sequence[PreferencePair], preference: str
) -> dict[str, Floats]:
    """Scores of each baseline for `rows`, (n, 2), higher = preferred.

    Args:
        train: pairs to learn from; those without the label are left out.
        rows: n pairs to be scored.
        preference: better | safer | single.
    """
    winners = preferred_labels(train, preference)  # (N,)
    kept = [row for row, winner in zip(train, winners, strict=True) if winner >= 0]
    winners = winners[winners >= 0]
    second = bool(len(winners)) and 2 * winners.sum() > len(winners)
    found = {"constant": np.tile([0.0, 1.0] if second else [1.0, 0.0], (len(rows), 1))}
    found["longer"] = np.array([(_words(row.response_0), _words(row.response_1)) for row in rows], np.float64)
    found["longer"] = found["longer"].reshape(-1, 2)
    if len(set(winners.tolist())) == 2:
        found["tfidf"] = _pair_regression(kept, winners, rows)
    return found


# ------------------------------------------------------------------------------------------------ single answers
def _only(labels: ModerationLabels, heads: Sequence[str]) -> ModerationLabels:
    n = len(labels)
    severity = labels.severity if "severity" in heads else np.full(n, -1, np.int64)
    if "category" in heads:
        return ModerationLabels(labels.unsafe, severity, labels.category, labels.categories)
    return ModerationLabels(labels.unsafe, severity, np.zeros((n, 0), np.int64), ())


def _constant(labels: ModerationLabels, n: int) -> Verdicts:
    unsafe, severity = labels.unsafe[labels.unsafe >= 0], labels.severity[labels.severity >= 0]
    category = labels.category[(labels.category >= 0).all(axis=1)] if labels.categories else labels.category[:0]
    rate = float(unsafe.mean()) if len(unsafe) else 0.5
    p_severity = level = p_category = said = None
    if len(severity):
        rates = np.bincount(severity, minlength=SEVERITIES) / len(severity)
        p_severity, level = np.tile(rates, (n, 1)), np.full(n, int(rates.argmax()))
    if len(category):
        sets, counts = np.unique(category, axis=0, return_counts=True)
        p_category = np.tile(category.mean(axis=0), (n, 1))
        said = np.tile(sets[counts.argmax()].astype(bool), (n, 1))
    return Verdicts(np.full(n, rate), p_severity, p_category, np.full(n, rate >= 0.5), level, said)


def _regressions(seen: Any, labels: ModerationLabels, asked: Any) -> Verdicts:
    """A regression for each head that has labels."""
    p_unsafe = _binary(seen, labels.unsafe, asked)
    p_severity = level = p_category = said = None
    if (labels.severity >= 0).any():
        p_severity = _levels(seen, labels.severity, asked)
        level = p_severity.argmax(axis=1).astype(np.int64)
    if labels.categories and (labels.category >= 0).any():
        p_category = np.stack([_binary(seen, column, asked) for column in labels.category.T], axis=1)
        said = p_category >= 0.5
    return Verdicts(p_unsafe, p_severity, p_category, p_unsafe >= 0.5, level, said)


def _binary(seen: Any, labels: Ints, asked: Any) -> Floats:
    """(n,) probability of label 1; the base rate where the training rows have one class only."""
    from sklearn.linear_model import LogisticRegression

    known = labels >= 0
    truth = labels[known]
    if len(truth) == 0 or truth.min() == truth.max():
        return np.full(asked.shape[0], (truth.sum() + 1) / (len(truth) + 2))
    model = LogisticRegression(C=C, solver="liblinear", random_state=0, max_iter=MOST_ITERATIONS)
    return np.asarray(model.fit(seen[known], truth).predict_proba(asked)[:, 1], np.float64)


def _levels(seen: Any, labels: Ints, asked: Any) -> Floats:
    """(n, 4) probability of each severity; levels that the training rows have not get 0."""
    from sklearn.linear_model import LogisticRegression

    known = labels >= 0
    levels = np.unique(labels[known])
    found = np.zeros((asked.shape[0], SEVERITIES))
    if len(levels) == 1:
        found[:, levels[0]] = 1.0
        return found
    model = LogisticRegression(C=C, max_iter=MOST_ITERATIONS)
    found[:, levels] = model.fit(seen[known], labels[known]).predict_proba(asked)
    return found


# ------------------------------------------------------------------------------------------------ pairs
def _pair_regression(train: Sequence[PreferencePair], winners: Ints, rows: Sequence[PreferencePair]) -> Floats:
    from sklearn.linear_model import LogisticRegression

    sides = [[row.response_0 for row in train], [row.response_1 for row in train]]
    asked = [[row.response_0 for row in rows], [row.response_1 for row in rows]]
    seen, told = _tfidf(sides[0] + sides[1], asked[0] + asked[1])
    first, second = seen[: len(train)], seen[len(train) :]
    model = LogisticRegression(C=C, solver="liblinear", fit_intercept=False, random_state=0, max_iter=MOST_ITERATIONS)
    model.fit(first - second, (winners == 0).astype(np.int64))
    return np.asarray(told @ model.coef_[0], np.float64).reshape(2, -1).T


# ------------------------------------------------------------------------------------------------ features
def _text(row: QuestionAnswer, prompt_only: bool) -> str:
    prompt = prompt_text(row.prompt)
    return prompt if prompt_only else f"{prompt}\n{row.response}"


def _words(text: str) -> int:
    return len(text.split())


def _lengths(seen: Sequence[str], asked: Sequence[str]) -> tuple[Floats, Floats]:
    """Words and log(1 + words) of both, standardised on the first; (N, 2) and (n, 2)."""
    tables = []
    for texts in (seen, asked):
        words = np.array([_words(text) for text in texts], np.float64)
        tables.append(np.stack([words, np.log1p(words)], axis=1))
    mean, spread = tables[0].mean(axis=0), tables[0].std(axis=0)
    spread[spread == 0] = 1.0
    return (tables[0] - mean) / spread, (tables[1] - mean) / spread


def _tfidf(seen: Sequence[str], asked: Sequence[str]) -> tuple[Any, Any]:
    """Sparse matrices of both, the vocabulary from the first."""
    from scipy.sparse import csr_matrix
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(sublinear_tf=True, ngram_range=(1, 2), min_df=2 if len(seen) > 50 else 1)
    try:
        known = vectorizer.fit_transform(seen)
    except ValueError:  # not one word in all rows: nothing to tell them apart by
        return csr_matrix((len(seen), 1)), csr_matrix((len(asked), 1))
    return known, vectorizer.transform(asked)
