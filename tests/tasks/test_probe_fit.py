"""Which layers a probe chooses, and that its folded heads are the fit that cross-validation judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from saferlhf.config.task_schema import KernelConfig, ProbeConfig
from saferlhf.evaluation.features import RowFeatures
from saferlhf.models.feature_store import FeatureStore, row_key
from saferlhf.models.kernel_map import KernelMap
from saferlhf.ops.folds import grouped_folds
from saferlhf.ops.linear_probe import Targets, head_losses
from saferlhf.ops.moderation import ModerationLabels
from saferlhf.tasks.probe import check_candidates, score_heads
from saferlhf.tasks.probe_fit import fit_probe

N, WIDTH = 240, 4
SIZES = {"unsafe": 1, "category": 2, "severity": 3}
LAYERS = [0, 1, 2, 3, 4]
TASK = ProbeConfig(name="probe", _target_="saferlhf.tasks.probe.ProbeTask", span="both", l2=[0.3, 0.03], folds=3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[RowFeatures, Targets]:
    """Layers 0..4 of noise; 2 tells one half of the truth, 4 the other, 3 is 2 blurred."""
    draw = np.random.default_rng(0)
    truth = draw.standard_normal((N, 2))
    parts = draw.standard_normal((N, 5, 2, WIDTH)) * 3 + 20
    parts[:, 2, 1, 0] += 12 * truth[:, 0]
    parts[:, 3] = parts[:, 2] + 3 * draw.standard_normal((N, 2, WIDTH))
    parts[:, 4, 0, 3] += 9 * truth[:, 1]
    strength = truth.sum(axis=1) + 0.3 * draw.standard_normal(N)
    unsafe = (strength > 0).astype(np.int64)
    severity = np.where(unsafe, 1 + (strength > 0.7) + (strength > 1.5), 0).astype(np.int64)
    category = np.stack([unsafe & (truth[:, 0] > 0), unsafe & (truth[:, 1] > 0)], axis=1).astype(np.int64)
    store = FeatureStore(
        {"planted": True, "layers": LAYERS}, (5, 2, WIDTH), "float32", tmp_path_factory.mktemp("cache")
    )
    keys = [row_key(np.array([i]), 0) for i in range(N)]
    with store.writing() as add:
        add(keys, parts)
    counts = np.ones((N, 2), np.int64)
    features = RowFeatures(store, keys, counts, (0, 1, 2, 3, 4), "mean")
    return features, Targets.of(ModerationLabels(unsafe, severity, category, ("a", "b")))


def folds() -> np.ndarray:
    return grouped_folds([str(i // 2) for i in range(N)], TASK.folds, seed=0)


def fit(planted: Any, **changes: Any) -> Any:
    features, targets = planted
    return fit_probe(features, targets, SIZES, replace(TASK, **changes), folds())


@pytest.fixture(scope="module")
def automatic(planted: Any) -> Any:
    return fit(planted, layers="auto")


def test_layers_that_tell_something_are_found(automatic: Any) -> None:
    assert set(automatic.layers) >= {2, 4}
    assert {(0,), (1,), (2,), (3,), (4,), automatic.layers} <= set(automatic.rough)
    alone = [automatic.rough[(layer,)]["unsafe"] for layer in (2, 4)]
    assert automatic.rough[automatic.layers]["unsafe"] < min(alone) < 1.0
    assert automatic.tried == (automatic.chosen,) and automatic.chosen.relative < 0.8


def test_a_kernel_is_taken_where_it_sees_more(planted: Any) -> None:
    """Unsafe at both ends of one feature: nothing that is linear in it."""
    whole, _ = planted
    features = replace(whole, layers=(2,))
    told = features.matrix((2,), "both")[:, WIDTH]
    unsafe = (np.abs(told - np.median(told)) > np.median(np.abs(told - np.median(told)))).astype(np.int64)
    nothing = np.full(N, -1)
    targets = Targets.of(ModerationLabels(unsafe, nothing, np.full((N, 2), -1), ("a", "b")))
    sizes = {"unsafe": 1}
    kernel = KernelConfig(name="gaussian", gamma=2.0, l2=[1e-2, 1e-3])
    fitted = fit_probe(features, targets, sizes, replace(TASK, layers=[2], kernel=kernel), folds())
    linear, through = fitted.tried
    assert linear.relative > 0.95 > 0.85 > through.relative
    assert fitted.chosen is through and fitted.kernel is not None
    states = torch.from_numpy(features.matrix(fitted.layers, "both"))
    scores = score_heads(fitted.heads)["unsafe"](KernelMap.of(fitted.kernel)(states))
    assert ((scores[:, 0] > 0).numpy() == unsafe).mean() > 0.9
    assert fitted.linear is not None and fitted.linear.scores is linear.scores
    plain = score_heads(fitted.linear.heads)["unsafe"](states)
    assert ((plain[:, 0] > 0).numpy() == unsafe).mean() < 0.75
    # and where it sees no more, the linear heads stay
    smooth = fit_probe(*planted, SIZES, replace(TASK, layers=[2], kernel=replace(kernel, l2=[100.0])), folds())
    assert smooth.kernel is None and not smooth.chosen.kernel and smooth.linear is None


def test_layers_for_a_kernel_are_the_most_that_are_as_good_as_the_best(planted: Any) -> None:
    features, targets = planted
    kernel = KernelConfig(name="gaussian", l2=[1e-2, 1e-3], landmarks=N // 2)
    task = replace(TASK, layers="auto", kernel=kernel)
    found = fit_probe(features, targets, SIZES, task, folds())
    assert {2, 4} <= set(found.layers)
    errors = {layers: np.mean([error[name] for name in SIZES]) for layers, error in found.rough_kernel.items()}
    assert [len(layers) for layers in errors] == [1, 2, 4] and found.layers in errors
    assert errors[found.layers] <= min(errors.values()) + 0.002
    larger = [layers for layers in errors if len(layers) > len(found.layers)]
    assert all(errors[layers] > min(errors.values()) + 0.002 for layers in larger)


def test_out_of_fold_outputs_are_honest(planted: Any, automatic: Any) -> None:
    _, targets = planted
    assert head_losses(automatic.scores, targets) == pytest.approx(automatic.chosen.loss)
    only_noise = fit_probe(*_noise(planted), SIZES, replace(TASK, layers="all", l2=[0.001]), folds())
    assert only_noise.layers == (0, 1, 2, 3, 4), "without auto all that was computed is used"
    assert only_noise.chosen.relative > 0.99, "nothing is learned from noise"


def _noise(planted: Any) -> tuple[Any, Any]:
    features, targets = planted
    draw = np.random.default_rng(1)
    store = FeatureStore(
        {"noise": True, "layers": LAYERS}, (5, 2, WIDTH), "float32", features.store.folder.parent.parent
    )
    with store.writing() as add:
        add(features.keys, draw.standard_normal((N, 5, 2, WIDTH)))
    return replace(features, store=store), targets


@pytest.mark.parametrize("combine", ["concatenate", "average"])
def test_exported_heads_are_the_fit(planted: Any, combine: str) -> None:
    """On raw features, in float32, as a `ScoreModel` applies them: as good as the out-of-fold outputs or better."""
    features, targets = planted
    found = fit(planted, layers="all", combine=combine)
    x = torch.from_numpy(features.matrix(found.layers, TASK.span))
    scores = {name: head(x).detach().double() for name, head in score_heads(found.heads).items()}
    seen, unseen = head_losses(scores, targets), found.chosen.loss
    assert all(seen[name] < unseen[name] for name in SIZES)
    correlation = np.corrcoef(scores["unsafe"][:, 0], found.scores["unsafe"][:, 0])[0, 1]
    assert correlation > 0.9


def test_an_average_is_the_mean_of_single_fits(planted: Any) -> None:
    features, _ = planted
    both = fit(planted, layers="all", combine="average")
    assert len(both.tried) == 6
    x = features.matrix(both.layers, TASK.span).astype(np.float64)
    mean = np.mean([_single(planted, layer) for layer in range(5)], axis=0)
    np.testing.assert_allclose(x @ both.heads["unsafe"][0][0] + both.heads["unsafe"][1][0], mean, atol=1e-3)


def _single(planted: Any, layer: int) -> np.ndarray:
    features, targets = planted
    one = replace(features, layers=features.layers)
    parts = one.matrix([layer], TASK.span)
    rows = (parts - parts.mean(0)) / parts.std(0)
    losses = {}
    for l2 in TASK.l2:
        out = np.zeros(N)
        for fold in range(TASK.folds):
            inside = folds() != fold
            model = LogisticRegression(C=1 / (inside.sum() * l2), tol=1e-8, max_iter=5000)
            out[~inside] = model.fit(rows[inside], targets.unsafe[inside]).decision_function(rows[~inside])
        losses[l2] = head_losses({"unsafe": torch.from_numpy(out)[:, None]}, targets)["unsafe"]
    best = min(losses, key=lambda l2: losses[l2])
    model = LogisticRegression(C=1 / (N * best), tol=1e-8, max_iter=5000).fit(rows, targets.unsafe)
    return model.decision_function(rows)


def test_not_worse_than_scikit_learn_on_the_same_features(planted: Any) -> None:
    """The same folds and penalties, each head's best: the out-of-fold loss of `unsafe` is scikit-learn's."""
    features, targets = planted
    found = fit(planted, layers="all")
    x = features.matrix(features.layers, TASK.span)
    rows = (x - x.mean(0)) / x.std(0)
    losses = []
    for l2 in TASK.l2:
        out = np.zeros(N)
        for fold in range(TASK.folds):
            inside = folds() != fold
            model = LogisticRegression(C=1 / (inside.sum() * l2), tol=1e-8, max_iter=5000)
            out[~inside] = model.fit(rows[inside], targets.unsafe[inside]).decision_function(rows[~inside])
        losses.append(head_losses({"unsafe": torch.from_numpy(out)[:, None]}, targets)["unsafe"])
    assert found.chosen.loss["unsafe"] == pytest.approx(min(losses), abs=1e-3)


def test_which_layers_are_computed(tmp_path: Path) -> None:
    from types import SimpleNamespace

    blocks = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(3))
    trunk = torch.nn.Module()
    trunk.blocks = blocks
    trunk.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(num_hidden_layers=3))
    assert check_candidates("auto", trunk) == check_candidates("all", trunk) == (0, 1, 2, 3)
    assert check_candidates([3, 1], trunk) == (3, 1)
    for wrong in ("some", [4]):
        with pytest.raises(Exception, match="layer"):
            check_candidates(wrong, trunk)
