"""The linear score that training begins with: scikit-learn's optimum for a loss that it has, and penalties by folds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from saferlhf.ops.linear_probe import Basis
from saferlhf.ops.losses import reward_loss
from saferlhf.ops.score_probe import Rows, fit_score, fit_score_probe

N, WIDTH = 120, 8


@pytest.fixture
def features() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2 * N, WIDTH)).astype(np.float32) * np.arange(1, WIDTH + 1) + 2


def test_labels_of_rows_give_scikit_learns_logistic_regression(features: np.ndarray) -> None:
    """A loss that is a sum over rows: C of scikit-learn is 1 / (rows l2)."""
    rng = np.random.default_rng(1)
    labels = (features[:, 0] + rng.normal(size=2 * N) > 2).astype(np.float64)
    target = torch.from_numpy(labels)
    basis = Basis.of(features)

    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, target[torch.from_numpy(rows)])

    weight, bias = fit_score(basis.project(features), basis.energy, loss, np.arange(2 * N), l2=0.05)
    found = basis.unfold({"score": (weight[None], np.array([bias]))})["score"]
    standard = (features - features.mean(axis=0)) / features.std(axis=0)
    theirs = LogisticRegression(C=1 / (2 * N * 0.05), tol=1e-8).fit(standard, labels)
    expected = theirs.decision_function(standard)
    assert features @ found[0][0] + found[1][0] == pytest.approx(expected, abs=1e-3)


def test_pairs_give_scikit_learns_fit_of_differences(features: np.ndarray) -> None:
    """Bradley-Terry without a regulariser is logistic regression on differences of features, without intercept."""
    rng = np.random.default_rng(2)
    difference = features[:N] - features[N:]
    better = torch.from_numpy((difference[:, 1] + 4 * rng.normal(size=N) < 0).astype(np.int64))
    basis = Basis.of(features)

    def loss(scores: Tensor, rows: Rows) -> Tensor:
        at = torch.from_numpy(rows[: len(rows) // 2])
        return reward_loss(scores.view(2, -1).T, better[at], regularization=0.0, margin=0.0, centering=0.0).mean()

    weight, _ = fit_score(basis.project(features), basis.energy, loss, np.arange(2 * N), l2=0.1)
    found = basis.unfold({"score": (weight[None], np.zeros(1))})["score"][0][0]
    standard = difference / features.std(axis=0)
    theirs = LogisticRegression(C=1 / (N * 0.1), fit_intercept=False, tol=1e-8).fit(standard, 1 - better.numpy())
    assert found * features.std(axis=0) == pytest.approx(theirs.coef_[0], abs=1e-3)


def test_the_penalty_is_the_one_that_helps_unseen_rows(features: np.ndarray) -> None:
    rng = np.random.default_rng(3)
    target = torch.from_numpy(rng.integers(0, 2, size=2 * N).astype(np.float64))  # nothing can be learned

    def loss(scores: Tensor, rows: Rows) -> Tensor:
        return F.binary_cross_entropy_with_logits(scores, target[torch.from_numpy(rows)])

    basis, folds = Basis.of(features), np.arange(2 * N) % 4
    z = basis.project(features)
    noise = fit_score_probe(z, basis.energy, loss, folds, (0.001, 1.0, 100.0))
    assert noise.l2 == 100.0 and set(noise.path) == {100.0, 1.0}  # the loss rose: smaller ones were not tried
    target = torch.from_numpy((features[:, 2] > features[:, 2].mean()).astype(np.float64))
    clear = fit_score_probe(z, basis.energy, loss, folds, (0.001, 1.0, 100.0))
    assert clear.l2 == 0.001 and len(clear.path) == 3
    assert ((clear.out_of_fold > 0) == (target.numpy() == 1)).mean() > 0.9
