"""Exact fits: scikit-learn's where it has the model, a general optimiser's where it has not; folds see nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression, Ridge

from saferlhf.ops.folds import grouped_folds
from saferlhf.ops.linear_probe import (
    Basis,
    Targets,
    apply_heads,
    cross_validate,
    fit_heads,
    head_losses,
)
from saferlhf.ops.moderation import ModerationLabels
from saferlhf.ops.moderation_losses import LossWeights
from saferlhf.ops.ridge import order_by_average, relative_errors, ridge_out_of_fold, ridge_targets

SIZES = {"unsafe": 1, "category": 3, "severity": 3}
NAMES = ("a", "b", "c")


def problem(n: int = 240, width: int = 12, seed: int = 0) -> tuple[np.ndarray, ModerationLabels]:
    """Correlated features of very different sizes, and labels that they tell with some noise."""
    draw = np.random.default_rng(seed)
    hidden = draw.standard_normal((n, 4))
    x = hidden @ draw.standard_normal((4, width)) + 0.3 * draw.standard_normal((n, width))
    x = x * 10.0 ** draw.uniform(-2, 2, width) + draw.standard_normal(width) * 50
    strength = hidden[:, 0] + 0.7 * hidden[:, 1] + draw.standard_normal(n)
    unsafe = (strength > 0).astype(np.int64)
    severity = np.where(unsafe, 1 + (strength > 0.6) + (strength > 1.5), 0).astype(np.int64)
    category = ((hidden[:, 1:4] + draw.standard_normal((n, 3))) > 0.5).astype(np.int64) * unsafe[:, None]
    return x.astype(np.float32), ModerationLabels(unsafe, severity, category, NAMES)


def fitted(x: np.ndarray, labels: ModerationLabels, l2: float = 0.03, **more: Any) -> tuple[Basis, Any, Targets]:
    basis, targets = Basis.of(x), Targets.of(labels, **more)
    sizes = SIZES if labels.category.shape[1] else {"unsafe": 1, "severity": 3}
    return basis, fit_heads(basis.project(x), basis.energy, targets, sizes, dict.fromkeys(sizes, l2)), targets


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(axis=0, dtype=np.float64)) / x.std(axis=0, dtype=np.float64)


# ------------------------------------------------------------------------------------------------ one fit
@pytest.mark.parametrize("l2", [1.0, 0.03, 0.001])
@pytest.mark.parametrize("width", [12, 400])  # more features than rows: the axes come from the other side
def test_unsafe_and_category_heads_are_logistic_regressions(l2: float, width: int) -> None:
    x, labels = problem(width=width)
    basis, heads, _ = fitted(x, labels, l2)
    plain, rows = basis.unfold(heads), standardised(x)
    for name, truth in (("unsafe", labels.unsafe[:, None]), ("category", labels.category)):
        weight, bias = plain[name]
        for output in range(truth.shape[1]):
            model = LogisticRegression(C=1 / (len(x) * l2), tol=1e-9, max_iter=10_000).fit(rows, truth[:, output])
            expected = model.decision_function(rows)
            got = x.astype(np.float64) @ weight[output] + bias[output]
            np.testing.assert_allclose(got, expected, atol=4e-3 * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("tied", [False, True])
def test_the_severity_head_is_at_the_minimum_that_a_general_optimiser_finds(tied: bool) -> None:
    x, labels = problem(n=120, width=5)
    rows = torch.from_numpy(standardised(x))
    targets = Targets.of(labels)

    def loss(flat: np.ndarray) -> float:
        weight, bias = torch.from_numpy(flat[:15].reshape(3, 5)), torch.from_numpy(flat[15:])
        weight = weight * torch.tensor([[1.0], [0.0], [0.0]]) if tied else weight
        terms = targets.terms({"severity": rows @ weight.T + bias})["severity"]
        return float(terms.mean() + 0.05 / 2 * weight.square().sum())

    expected = minimize(loss, np.zeros(18), method="BFGS", options={"gtol": 1e-7})
    basis, targets_used = Basis.of(x), Targets.of(labels, tied=tied)
    heads = fit_heads(basis.project(x), basis.energy, targets_used, {"severity": 3}, {"severity": 0.05})
    weight, bias = basis.unfold(heads)["severity"]
    on_standard = weight * basis.scale
    found = loss(np.concatenate([on_standard.ravel(), bias + weight @ basis.mean]))
    assert found == pytest.approx(expected.fun, abs=1e-6)
    assert (not weight[1:].any()) == tied


def test_folded_heads_give_the_same_outputs_on_raw_features() -> None:
    x, labels = problem()
    x[:, 3] = 7.0  # constant: tells nothing, and must not be divided by zero
    basis, heads, _ = fitted(x, labels)
    inside = apply_heads(heads, basis.project(x))
    for name, (weight, bias) in basis.unfold(heads).items():
        outside = x @ weight.astype(np.float32).T + bias.astype(np.float32)  # as an exported head computes
        np.testing.assert_allclose(outside, inside[name].numpy(), atol=5e-3)
        assert np.abs(weight[:, 3]).max() < 1e-4


def test_a_missing_label_switches_off_its_own_term_only() -> None:
    x, labels = problem()
    half = np.arange(len(x)) % 2 == 0
    severity = np.where(half, labels.severity, -1)
    _, full, _ = fitted(x, labels)
    basis, part, _ = fitted(x, ModerationLabels(labels.unsafe, severity, labels.category, NAMES))
    for name in ("unsafe", "category"):
        np.testing.assert_allclose(part[name][0], full[name][0], atol=2e-3)
    # severity: as if only those rows were there, the penalty being beside the mean over all rows
    alone = Targets.of(ModerationLabels(labels.unsafe[half], severity[half], labels.category[half], NAMES))
    z = basis.project(x)[torch.from_numpy(half)]
    expected = fit_heads(z, basis.energy, alone, {"severity": 3}, {"severity": 0.03 * len(x) / half.sum()})
    np.testing.assert_allclose(part["severity"][0], expected["severity"][0], atol=2e-3)


def test_heads_do_not_know_of_each_other() -> None:
    x, labels = problem()
    basis, together, targets = fitted(x, labels)
    z = basis.project(x)
    alone = fit_heads(z, basis.energy, targets, {"unsafe": 1}, {"unsafe": 0.03})
    np.testing.assert_allclose(together["unsafe"][0], alone["unsafe"][0], atol=1e-3)
    other = fit_heads(z, basis.energy, targets, SIZES, {"unsafe": 0.03, "category": 3.0, "severity": 0.03})
    np.testing.assert_allclose(other["unsafe"][0], alone["unsafe"][0], atol=1e-3)
    assert np.abs(other["category"][0]).sum() < 0.5 * np.abs(together["category"][0]).sum()


def test_weights_of_heads_and_classes_count() -> None:
    x, labels = problem()
    basis, plain, _ = fitted(x, labels)
    z = basis.project(x)
    _, doubled, _ = fitted(x, labels, l2=0.06, weights=LossWeights(unsafe=2.0, category=2.0, severity=2.0))
    np.testing.assert_allclose(doubled["unsafe"][0], plain["unsafe"][0], atol=1e-3)
    _, tilted, _ = fitted(x, labels, weights=LossWeights(unsafe_class=5.0))
    assert apply_heads(tilted, z)["unsafe"].mean() > apply_heads(plain, z)["unsafe"].mean() + 0.5


def test_the_start_does_not_matter() -> None:
    x, labels = problem()
    basis, heads, targets = fitted(x, labels)
    far = {name: (weight + 1.0, bias - 2.0) for name, (weight, bias) in heads.items()}
    again = fit_heads(basis.project(x), basis.energy, targets, SIZES, dict.fromkeys(SIZES, 0.03), far)
    for name in SIZES:
        np.testing.assert_allclose(again[name][0], heads[name][0], atol=2e-3)


# ------------------------------------------------------------------------------------------------ folds
def test_folds_keep_groups_together_and_are_about_equal() -> None:
    groups = [f"prompt {number // 3}" for number in range(301)]
    folds = grouped_folds(groups, 5, seed=0)
    assert all(len(set(folds[start : start + 3])) == 1 for start in range(0, 300, 3))
    counts = np.bincount(folds)
    assert len(counts) == 5 and counts.max() - counts.min() <= 3
    assert not np.array_equal(folds, grouped_folds(groups, 5, seed=1))
    # a prompt's fold does not depend on the order of the rows
    shuffled = np.random.default_rng(0).permutation(len(groups))
    assert np.array_equal(grouped_folds([groups[i] for i in shuffled], 5, seed=0), folds[shuffled])
    with pytest.raises(ValueError, match="2 groups"):
        grouped_folds(["a", "b", "b"], 3, seed=0)


def test_a_row_is_judged_by_heads_that_never_saw_it() -> None:
    x, labels = problem()
    basis = Basis.of(x)
    folds = np.arange(len(x)) % 4
    z = basis.project(x)

    def outputs(targets: Targets) -> torch.Tensor:
        return cross_validate(z, basis.energy, targets, {"unsafe": 1}, folds, [0.03]).scores["unsafe"][:, 0]

    before = outputs(Targets.of(labels))
    turned = labels.unsafe.copy()
    turned[folds == 1] = 1 - turned[folds == 1]
    after = outputs(Targets.of(ModerationLabels(turned, labels.severity, labels.category, NAMES)))
    own = torch.from_numpy(folds == 1)
    torch.testing.assert_close(after[own], before[own])  # its own labels do not reach it
    assert not torch.allclose(after[~own], before[~own], atol=0.1)
    # and fold by fold it is the plain fit on the others
    inside = torch.from_numpy(np.flatnonzero(folds != 2))
    expected = fit_heads(z[inside], basis.energy, Targets.of(labels).rows(inside), {"unsafe": 1}, {"unsafe": 0.03})
    held_out = torch.from_numpy(np.flatnonzero(folds == 2))
    torch.testing.assert_close(
        before[held_out], apply_heads(expected, z[held_out])["unsafe"][:, 0], atol=0.02, rtol=0.01
    )


def test_each_head_gets_the_penalty_with_the_least_loss() -> None:
    x, labels = problem(n=200, width=150)
    basis, targets = Basis.of(x), Targets.of(labels)
    penalties = [10.0, 1.0, 0.1, 0.01, 0.001]
    folds = np.arange(len(x)) % 5
    found = cross_validate(basis.project(x), basis.energy, targets, SIZES, folds, penalties)
    for name in SIZES:
        losses = {l2: loss[name] for l2, loss in found.path.items()}
        assert found.l2[name] == min(losses, key=lambda l2: losses[l2]) and found.loss[name] == min(losses.values())
    assert head_losses(found.scores, targets) == pytest.approx(found.loss)
    assert 0.001 not in found.path, "it ends when nothing gains any more"


# ------------------------------------------------------------------------------------------------ ridge
def test_ridge_is_scikit_learns() -> None:
    x, labels = problem()
    z = Basis.of(x).project(x)
    y = ridge_targets(Targets.of(labels), list(SIZES))
    np.testing.assert_allclose(y["severity"].mean(dim=0), 0, atol=1e-6)
    folds = np.arange(len(x)) % 4
    got = ridge_out_of_fold(z, y, folds, [0.01])
    for name in SIZES:
        for fold in range(4):
            inside, outside = folds != fold, folds == fold
            model = Ridge(alpha=0.1 * inside.sum(), fit_intercept=False).fit(z[inside], y[name][inside])
            expected = model.predict(z[outside]).reshape(outside.sum(), -1)
            np.testing.assert_allclose(got[name][outside], expected, atol=1e-4)
    errors = relative_errors(got, y)
    assert 0 < errors["unsafe"] < 1
    better = ridge_out_of_fold(z, y, folds, [100.0, 0.01])
    assert all(relative_errors(better, y)[name] <= errors[name] + 1e-6 for name in SIZES)


def test_unlabelled_rows_do_not_count_in_ridge() -> None:
    x, labels = problem()
    unsafe = labels.unsafe.copy()
    unsafe[::3] = -1
    y = ridge_targets(Targets.of(ModerationLabels(unsafe, labels.severity, labels.category, NAMES)), ["unsafe"])
    assert y["unsafe"].isnan().sum() == len(unsafe[::3])
    predicted = {"unsafe": torch.zeros(len(x), 1)}
    assert relative_errors(predicted, y)["unsafe"] == pytest.approx(1.0)


def test_the_order_begins_with_the_best_and_goes_on_with_what_adds_most() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(500, 1, generator=draw)
    noise = [torch.randn(500, 1, generator=draw) for _ in range(2)]
    y = {"unsafe": truth - truth.mean()}
    predicted = {
        1: {"unsafe": truth + noise[0]},
        2: {"unsafe": truth + 1.01 * noise[0]},  # nearly as good as 1, and no help beside it
        3: {"unsafe": truth + 1.2 * noise[1]},  # worse alone, better beside 1
    }
    assert order_by_average(predicted, y, {"unsafe": 1.0}, 8)[:2] == [1, 3]
    assert order_by_average(predicted, y, {"unsafe": 1.0}, 1) == [1]
