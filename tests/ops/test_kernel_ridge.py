"""Kernel ridge regression by folds: scikit-learn's predictions, and distances that add up over layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.kernel_ridge import KernelRidge
from sklearn.preprocessing import StandardScaler

from saferlhf.ops.kernel_ridge import kernel_ridge_out_of_fold, mean_squared_differences
from saferlhf.ops.linear_probe import CURVATURE

N = 40


def layers() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.normal(size=(N, 5)).astype(np.float32) * 3 + 1, rng.normal(size=(N, 5)).astype(np.float32)]


def test_distances_by_hand() -> None:
    # columns have mean 1, deviation 1 and mean 0, deviation 2: rows become (-1, 1) and (1, -1); mean square 4
    found = mean_squared_differences(np.array([[0.0, 2.0], [2.0, -2.0]], dtype=np.float32))
    assert found.numpy() == pytest.approx(np.array([[0.0, 4.0], [4.0, 0.0]]))


def test_predictions_are_scikit_learns() -> None:
    x, folds, gamma, l2 = layers(), np.arange(N) % 4, 0.7, 0.01
    y = {"unsafe": torch.from_numpy((x[0][:, :1] > 1).astype(np.float32)) - 0.5, "severity": torch.randn(N, 3)}
    found = kernel_ridge_out_of_fold([mean_squared_differences(part) for part in x], gamma, y, folds, [l2])
    both = np.concatenate([StandardScaler().fit_transform(part) for part in x], axis=1)
    for name, values in y.items():
        for fold in range(4):
            inside, outside = folds == fold, folds != fold
            machine = KernelRidge(kernel="rbf", gamma=gamma / (2 * 10), alpha=l2 / CURVATURE * outside.sum())
            expected = machine.fit(both[outside], values[torch.from_numpy(outside)]).predict(both[inside])
            got = found[name][torch.from_numpy(inside)].numpy()
            assert got == pytest.approx(expected.reshape(got.shape), abs=1e-4)


def test_each_head_has_its_own_penalty() -> None:
    x, folds = layers(), np.arange(N) % 4
    torch.manual_seed(0)
    clear = torch.from_numpy(x[0][:, :1] - 1)
    y = {"unsafe": clear, "severity": torch.randn(N, 3)}
    distances = [mean_squared_differences(x[0])]
    found = kernel_ridge_out_of_fold(distances, 1.0, y, folds, [1e-4, 10.0])
    strong, weak = (kernel_ridge_out_of_fold(distances, 1.0, y, folds, [l2]) for l2 in (10.0, 1e-4))
    assert torch.equal(found["severity"], strong["severity"])  # noise wants to be shrunk
    assert torch.equal(found["unsafe"], weak["unsafe"])
