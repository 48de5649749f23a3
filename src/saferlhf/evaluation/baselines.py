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


class AnswerBaselines:
    """Baselines of single answers; what they learnt is kept, so that any number of test sets costs one training.

    Args:
        train: N rows to learn from.
        prompt_only: look at prompts alone, as a moderator of prompts does.
    """

    def __init__(self, train: Sequence[QuestionAnswer], *, prompt_only: bool = False) -> None:
        self.prompt_only = prompt_only
        lengths, words = _Lengths(self._measured(train)), _Tfidf(self._read(train))
        self._features: dict[str, _Lengths | _Tfidf] = {"length": lengths, "tfidf": words}
        self._models: dict[tuple[str, str, bytes], Any] = {}  # (features, solver, labels) -> fitted

    def verdicts(
        self, labels: ModerationLabels, rows: Sequence[QuestionAnswer], *, heads: Sequence[str] = HEADS
    ) -> dict[str, Verdicts]:
        """Verdicts of each baseline for `rows`.

        Args:
            labels: of the N training rows; a head without labels gives none, and its part of the verdicts is None.
            rows: n rows to be judged; their labels are not looked at.
            heads: which of unsafe, severity and category are wanted beside unsafe.

        Returns:
            name -> verdicts of n rows, decisions at probability 1/2 and at the likeliest severity.
        """
        labels = _only(labels, heads)
        found = {"constant": _constant(labels, len(rows))}
        for name, texts in (("length", self._measured(rows)), ("tfidf", self._read(rows))):
            found[name] = self._regressions(name, labels, self._features[name].of(texts))
        return found

    def _measured(self, rows: Sequence[QuestionAnswer]) -> list[str]:
        """The texts whose lengths count."""
        return [prompt_text(row.prompt) if self.prompt_only else row.response for row in rows]

    def _read(self, rows: Sequence[QuestionAnswer]) -> list[str]:
        return [_text(row, self.prompt_only) for row in rows]

    def _regressions(self, name: str, labels: ModerationLabels, asked: Any) -> Verdicts:
        """A regression for each head that has labels."""
        p_unsafe = self._binary(name, labels.unsafe, asked)
        p_severity = level = p_category = said = None
        if (labels.severity >= 0).any():
            p_severity = self._levels(name, labels.severity, asked)
            level = p_severity.argmax(axis=1).astype(np.int64)
        if labels.categories and (labels.category >= 0).any():
            p_category = np.stack([self._binary(name, column, asked) for column in labels.category.T], axis=1)
            said = p_category >= 0.5
        return Verdicts(p_unsafe, p_severity, p_category, p_unsafe >= 0.5, level, said)

    def _binary(self, name: str, labels: Ints, asked: Any) -> Floats:
        """(n,) probability of label 1; the base rate where the training rows have one class only."""
        truth = labels[labels >= 0]
        if len(truth) == 0 or truth.min() == truth.max():
            return np.full(asked.shape[0], (truth.sum() + 1) / (len(truth) + 2))
        model = self._fitted(name, labels, solver="liblinear", random_state=0)
        return np.asarray(model.predict_proba(asked)[:, 1], np.float64)

    def _levels(self, name: str, labels: Ints, asked: Any) -> Floats:
        """(n, 4) probability of each severity; levels that the training rows have not get 0."""
        levels = np.unique(labels[labels >= 0])
        found = np.zeros((asked.shape[0], SEVERITIES))
        if len(levels) == 1:
            found[:, levels[0]] = 1.0
        else:
            found[:, levels] = self._fitted(name, labels, solver="lbfgs").predict_proba(asked)
        return found

    def _fitted(self, name: str, labels: Ints, **options: Any) -> Any:
        from sklearn.linear_model import LogisticRegression

        key = (name, str(options["solver"]), np.ascontiguousarray(labels, np.int64).tobytes())
        if key not in self._models:
            known = labels >= 0
            model = LogisticRegression(C=C, max_iter=MOST_ITERATIONS, **options)
            self._models[key] = model.fit(self._features[name].seen[known], labels[known])
        return self._models[key]


def answer_baselines(
    train: Sequence[QuestionAnswer],
    labels: ModerationLabels,
    rows: Sequence[QuestionAnswer],
    *,
    prompt_only: bool = False,
    heads: Sequence[str] = HEADS,
) -> dict[str, Verdicts]:
    """Verdicts of each baseline for one set of rows; arguments as of `AnswerBaselines`."""
    return AnswerBaselines(train, prompt_only=prompt_only).verdicts(labels, rows, heads=heads)


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


# ------------------------------------------------------------------------------------------------ pairs
def _pair_regression(train: Sequence[PreferencePair], winners: Ints, rows: Sequence[PreferencePair]) -> Floats:
    from sklearn.linear_model import LogisticRegression

    sides = [[row.response_0 for row in train], [row.response_1 for row in train]]
    asked = [[row.response_0 for row in rows], [row.response_1 for row in rows]]
    words = _Tfidf(sides[0] + sides[1])
    seen, told = words.seen, words.of(asked[0] + asked[1])
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


class _Lengths:
    """Words and log(1 + words) of texts, standardised on the training texts: `seen` (N, 2)."""

    def __init__(self, texts: Sequence[str]) -> None:
        table = self._table(texts)
        self._mean, self._spread = table.mean(axis=0), table.std(axis=0)
        self._spread[self._spread == 0] = 1.0
        self.seen = self.of(texts)

    def of(self, texts: Sequence[str]) -> Floats:
        """(n, 2)."""
        return np.asarray((self._table(texts) - self._mean) / self._spread)

    @staticmethod
    def _table(texts: Sequence[str]) -> Floats:
        words = np.array([_words(text) for text in texts], np.float64)
        return np.stack([words, np.log1p(words)], axis=1)


class _Tfidf:
    """Sparse TF-IDF rows of texts, the vocabulary from the training texts: `seen` (N, words)."""

    def __init__(self, texts: Sequence[str]) -> None:
        from scipy.sparse import csr_matrix
        from sklearn.feature_extraction.text import TfidfVectorizer

        self._vectorizer: Any = TfidfVectorizer(
            sublinear_tf=True, ngram_range=(1, 2), min_df=2 if len(texts) > 50 else 1
        )
        try:
            self.seen = self._vectorizer.fit_transform(texts)
        except ValueError:  # not one word in all texts: nothing to tell them apart by
            self._vectorizer, self.seen = None, csr_matrix((len(texts), 1))

    def of(self, texts: Sequence[str]) -> Any:
        """(n, words)."""
        from scipy.sparse import csr_matrix

        return csr_matrix((len(texts), 1)) if self._vectorizer is None else self._vectorizer.transform(texts)
