"""The Gaussian kernel basis: equal to scikit-learn's kernel, and to a kernel machine solved in another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from sklearn.preprocessing import StandardScaler

from saferlhf.ops.kernel import KernelBasis, gaussian
from saferlhf.ops.linear_probe import Targets, apply_heads, fit_heads
from saferlhf.ops.moderation import ModerationLabels


def rows(n: int, width: int = 6, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32) * np.arange(1, width + 1) + 3


def unsafe_targets(labels: np.ndarray) -> Targets:
    n = len(labels)
    nothing = np.full(n, -1)
    return Targets.of(ModerationLabels(labels.astype(np.int64), nothing, np.full((n, 0), -1), ()))


def test_kernel_by_hand() -> None:
    # |x - l|^2 = 4 and 1, F = 2, gamma = 1: exp(-1) and exp(-1/4)
    found = gaussian(torch.tensor([[0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 1.0, 2)
    assert found.numpy() == pytest.approx(np.exp([[-1.0, -0.25]]), rel=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_products_of_coordinates_are_scikit_learns_kernel(gamma: float) -> None:
    x, new = rows(60), rows(9, seed=1)
    basis = KernelBasis.of(x, gamma=gamma, axes=6)
    scaler = StandardScaler().fit(x)
    expected = rbf_kernel(scaler.transform(x), scaler.transform(x), gamma=gamma / (2 * 6))
    z = basis.project(x)
    assert (z @ z.T).numpy() == pytest.approx(expected, abs=2e-4)
    assert basis.energy == pytest.approx(z.square().mean(dim=0).numpy(), rel=1e-4)
    outside = rbf_kernel(scaler.transform(new), scaler.transform(x), gamma=gamma / (2 * 6))
    assert (basis.project(new) @ z.T).numpy() == pytest.approx(outside, abs=2e-4)


def test_heads_on_kernel_values_say_the_same() -> None:
    x, new = rows(50), rows(7, seed=2)
    basis = KernelBasis.of(x, gamma=1.0, axes=6)
    heads = {"unsafe": (np.random.default_rng(3).normal(size=(1, basis.root.shape[1])), np.array([0.5]))}
    weight, bias = basis.unfold(heads)["unsafe"]
    values = gaussian(basis.linear.project(new), basis.landmarks, 1.0, 6).double().numpy()
    direct = apply_heads(heads, basis.project(new))["unsafe"].numpy()
    assert values @ weight.T + bias == pytest.approx(direct, abs=1e-3)


def test_the_fit_is_kernel_logistic_regression() -> None:
    """The optimum of kernel logistic regression: a_i = (y_i - p_i) / (N l2), whatever led there."""
    x = rows(80, seed=4)
    labels = (np.linalg.norm(StandardScaler().fit_transform(x)[:, :3], axis=1) > 1.6).astype(int)
    basis, l2 = KernelBasis.of(x, gamma=1.0, axes=6), 1e-3
    z = basis.project(x)
    heads = fit_heads(z, basis.energy, unsafe_targets(labels), {"unsafe": 1}, {"unsafe": l2})
    score = apply_heads(heads, z)["unsafe"].numpy()[:, 0]
    residual = (labels - 1 / (1 + np.exp(-score))) / (len(x) * l2)
    kernel = (z @ z.T).double().numpy()
    assert score == pytest.approx(kernel @ residual + heads["unsafe"][1][0], abs=5e-3)
    assert ((score > 0) == labels).mean() > 0.95  # a sphere: no linear map of the rows tells it


def test_few_landmarks_are_drawn_and_still_near() -> None:
    x = rows(400, width=3, seed=5)
    whole, few = (KernelBasis.of(x, gamma=0.3, axes=3, most=most) for most in (400, 150))
    assert len(few.landmarks) == 150
    exact, near = (basis.project(x) @ basis.project(x).T for basis in (whole, few))
    assert float((exact - near).abs().max()) < 0.02
