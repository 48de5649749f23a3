"""Linear heads on fixed features: the moderation loss with an L2 penalty, minimised exactly, in seconds.

With standardised features x_i (mean 0, variance 1 over the training rows) and head h of weights W_h, bias b_h:

    J = 1/N sum_i sum_h L_h(W_h x_i + b_h, y_i) + sum_h l2_h / 2 |W_h|^2

L_h are the terms of `ops/moderation_losses.py`; biases are not penalised. J is convex in the unsafe and category heads,
which are logistic regressions (scikit-learn's C is 1 / (N l2)), and smooth in the severity head.

Features of neighbouring layers are nearly the same, and plain gradients crawl along such valleys. So the rows are
turned into the principal axes of the features, z = Q' x, and each axis j is scaled by about the inverse root of J's
curvature along it, d_j = (CURVATURE e_j + l2)^(-1/2), with e_j the mean square of z_j: L-BFGS then needs some ten steps
where it would need hundreds. Neither step changes the minimum: Q is orthonormal, and the penalty is taken on W itself.
Only axes with e_j below `floor` are dropped, along which the penalty holds the weights at zero anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from saferlhf.ops.moderation import ModerationLabels
from saferlhf.ops.moderation_losses import LossWeights, moderation_terms
from saferlhf.ops.threads import one_thread, side_by_side

Floats = NDArray[np.float64]

CURVATURE = 0.1
"""Typical p (1 - p) of a row; only the speed depends on it."""

MAX_STEPS = 500
GRADIENT_TOLERANCE = 1e-6
LEAST_GAIN, ROUGH_GAIN = 1e-10, 1e-5
"""Relative gain in J by which a step must improve it, else the fit is done; the second in cross-validation."""

NEGLIGIBLE = 0.02
"""In cross-validation an axis is left out while the penalty holds its weight below this share of what it would be."""

ORDINARY = LossWeights()

HeadWeights = dict[str, tuple[Floats, Floats]]
"""Head name -> weight (n, width) and bias (n,)."""


def moments(x: NDArray[np.float32]) -> tuple[Floats, Floats]:
    """(F,) mean and (F,) standard deviation of rows (N, F); a feature that is constant there has 1."""
    mean = x.mean(axis=0, dtype=np.float64)
    scale = x.std(axis=0, dtype=np.float64)
    scale[scale <= 1e-6 * np.maximum(1.0, np.abs(mean))] = 1.0
    return mean, scale


def standardised(x: NDArray[np.float32], mean: Floats, scale: Floats) -> Tensor:
    """(N, F) float32 rows of mean 0 and variance 1."""
    return torch.from_numpy((x - mean) / scale).float()


@dataclass(frozen=True)
class Basis:
    """Principal axes of standardised features.

    Attributes:
        mean, scale: (F,) of the training rows; a feature that is constant there has scale 1.
        axes: (F, R) float32, orthonormal columns.
        energy: (R,) mean square of the training rows along each axis, falling.
    """

    mean: Floats
    scale: Floats
    axes: Tensor
    energy: Floats

    @classmethod
    def of(cls, x: NDArray[np.float32], floor: float = 0.0) -> Basis:
        """Axes of these rows.

        Args:
            x: (N, F) training rows.
            floor: axes with less energy are left out; the mean energy of all F axes is 1.
        """
        mean, scale = moments(x)
        rows = standardised(x, mean, scale)  # (N, F)
        n, width = rows.shape
        least = max(floor, 1e-6)  # below that float32 tells no directions apart
        if width <= n:
            energy, axes = _eigh(rows.T @ rows / n)
            keep = energy > least
            return cls(mean, scale, axes[:, keep].flip(1).contiguous(), energy[keep].flip(0).double().numpy())
        energy, left = _eigh(rows @ rows.T / n)
        keep = energy > least
        axes = rows.T @ (left[:, keep] / (n * energy[keep]).sqrt())  # (F, R)
        return cls(mean, scale, axes.flip(1).contiguous(), energy[keep].flip(0).double().numpy())

    def leading(self, count: int) -> Basis:
        """The first axes only, those with most energy."""
        return Basis(self.mean, self.scale, self.axes[:, :count].contiguous(), self.energy[:count])

    def project(self, x: NDArray[np.float32]) -> Tensor:
        """(N, F) rows -> (N, R) float32 along the axes."""
        return standardised(x, self.mean, self.scale) @ self.axes

    def unfold(self, heads: HeadWeights) -> HeadWeights:
        """Heads on rows as they are, before standardising: equal outputs, F wide."""
        axes = self.axes.double().numpy()
        plain: HeadWeights = {}
        for name, (weight, bias) in heads.items():
            on_features = (weight @ axes.T) / self.scale  # (n, F)
            plain[name] = (on_features, bias - on_features @ self.mean)
        return plain


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    with one_thread():  # which gains next to nothing by a second one
        energy, axes = torch.linalg.eigh(matrix)
    return energy, axes


@dataclass(frozen=True)
class Targets:
    """Labels of N rows as tensors, and what they weigh.

    Attributes:
        unsafe, severity: (N,) int64; category: (N, C) int64; -1 = not labelled.
        weights: of heads, classes and levels.
        tied: the steps between severity levels do not depend on the row (proportional odds).
    """

    unsafe: Tensor
    severity: Tensor
    category: Tensor
    weights: LossWeights = ORDINARY
    tied: bool = False

    @classmethod
    def of(cls, labels: ModerationLabels, weights: LossWeights = ORDINARY, tied: bool = False) -> Targets:
        """From arrays."""
        unsafe, severity, category = map(torch.from_numpy, (labels.unsafe, labels.severity, labels.category))
        return cls(unsafe, severity, category, weights, tied)

    def __len__(self) -> int:
        return len(self.unsafe)

    def rows(self, at: Tensor) -> Targets:
        """Of some rows."""
        return Targets(self.unsafe[at], self.severity[at], self.category[at], self.weights, self.tied)

    def terms(self, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Head name -> (N,) loss of each row."""
        labels = {"unsafe": self.unsafe, "severity": self.severity, "category": self.category}
        return moderation_terms(scores, **labels, weights=self.weights)


def apply_heads(heads: HeadWeights, z: Tensor) -> dict[str, Tensor]:
    """Head name -> (N, n) float64 outputs for rows (N, R)."""
    return {
        name: (z @ torch.from_numpy(weight).to(z.dtype).T).double() + torch.from_numpy(bias)
        for name, (weight, bias) in heads.items()
    }


def fit_heads(
    z: Tensor,
    energy: Floats,
    targets: Targets,
    sizes: Mapping[str, int],
    l2: Mapping[str, float],
    start: HeadWeights | None = None,
    gain: float = LEAST_GAIN,
) -> HeadWeights:
    """Heads that minimise J, all at once.

    Args:
        z: (N, R) rows along the axes of a `Basis`.
        energy: (R,) of that basis; only the speed depends on it.
        targets: labels of the rows.
        sizes: head name -> outputs.
        l2: head name -> weight of its penalty, above zero.
        start: heads to begin with, as of a neighbouring penalty; None: zero.
        gain: the relative gain in J below which the fit is done.

    Returns:
        heads on z.
    """
    width, names = z.shape[1], list(sizes)
    counts = [sizes[name] for name in names]
    # one row of the joined matrix for each output
    scale = np.concatenate([_scale(name, sizes[name], energy, l2[name], targets.tied) for name in names])  # (n, R)
    penalty = np.repeat([l2[name] for name in names], counts)[:, None]  # (n, 1)
    shares = {name: getattr(targets.weights, name) / len(z) for name in names}
    columns = z.T.contiguous()  # a product of few rows with a wide matrix is twice as fast as the other way round

    def objective(flat: Floats) -> tuple[float, Floats]:
        scaled = flat.reshape(len(scale), width + 1)
        weight, bias = scaled[:, :-1] * scale, torch.from_numpy(scaled[:, -1])
        # the products in float32, what is summed over rows in float64
        scores = (torch.from_numpy(weight).to(z.dtype) @ columns).T.double() + bias  # (N, n)
        scores.requires_grad_()
        terms = targets.terms(dict(zip(names, scores.split(counts, dim=1), strict=True)))
        loss = sum(shares[name] * term.sum() for name, term in terms.items())
        assert isinstance(loss, Tensor)
        (slope,) = torch.autograd.grad(loss, scores)  # (N, n)
        on_weight = (slope.T.to(z.dtype) @ z).double().numpy() + penalty * weight
        value = float(loss.detach()) + float((penalty / 2 * weight**2).sum())
        gradient = np.concatenate([on_weight * scale, slope.sum(dim=0).numpy()[:, None]], axis=1)
        return value, gradient.ravel()

    begin = np.zeros((len(scale), width + 1))
    if start is not None:
        joined = np.concatenate([start[name][0] for name in names])
        np.divide(joined, scale, out=begin[:, :-1], where=scale > 0)
        begin[:, -1] = np.concatenate([start[name][1] for name in names])
    options = {"maxiter": MAX_STEPS, "maxcor": 20, "gtol": GRADIENT_TOLERANCE, "ftol": gain, "maxls": 40}
    found = minimize(objective, begin.ravel(), jac=True, method="L-BFGS-B", options=options).x.reshape(begin.shape)
    rows = np.split(np.arange(len(scale)), np.cumsum(counts)[:-1])
    return {name: (found[at, :-1] * scale[at], found[at, -1]) for name, at in zip(names, rows, strict=True)}


def _scale(name: str, size: int, energy: Floats, l2: float, tied: bool) -> Floats:
    """(n, R) what each weight is multiplied by; zero where an output is its bias alone."""
    scale = np.tile(1.0 / np.sqrt(CURVATURE * energy + l2), (size, 1))
    if name == "severity" and tied:
        scale[1:] = 0.0
    return scale


# ------------------------------------------------------------------------------------------------ cross-validation
@dataclass(frozen=True)
class CrossValidation:
    """What K-fold cross-validation says of a set of features.

    Attributes:
        l2: head name -> the penalty with the least out-of-fold loss.
        loss: head name -> that loss, the mean over labelled rows.
        path: penalty -> head name -> loss, for every penalty that was tried.
        scores: head name -> (N, n) out-of-fold outputs at the chosen penalties.
    """

    l2: dict[str, float]
    loss: dict[str, float]
    path: dict[float, dict[str, float]]
    scores: dict[str, Tensor]


def cross_validate(
    z: Tensor,
    energy: Floats,
    targets: Targets,
    sizes: Mapping[str, int],
    folds: NDArray[np.int64],
    penalties: Sequence[float],
) -> CrossValidation:
    """Out-of-fold outputs of every row, and the best penalty of each head.

    From the largest penalty down, each fit starting from the one before; ends when no head gains any more.

    Args:
        z, energy, targets, sizes: as `fit_heads` takes them. The axes may be those of all rows: they know no labels.
        folds: (N,) fold of each row.
        penalties: to be tried.
    """
    parts = []
    for fold in np.unique(folds):
        inside, outside = (torch.from_numpy(np.flatnonzero(which)) for which in (folds != fold, folds == fold))
        parts.append((z[inside], targets.rows(inside), outside, z[outside]))
    starts: list[HeadWeights | None] = [None] * len(parts)
    path: dict[float, dict[str, float]] = {}
    best: dict[str, float] = {}
    chosen: dict[str, Tensor] = {}
    for l2 in sorted(penalties, reverse=True):
        scores = {name: torch.zeros(len(z), size, dtype=torch.float64) for name, size in sizes.items()}
        axes = max(1, int((energy > NEGLIGIBLE * l2 / CURVATURE).sum()))

        penalty = dict.fromkeys(sizes, l2)

        def fitted(
            fold: tuple[Tensor, Targets, HeadWeights | None], axes: int = axes, penalty: dict[str, float] = penalty
        ) -> HeadWeights:
            rows, labels, start = fold
            rows = rows[:, :axes].contiguous()
            return fit_heads(rows, energy[:axes], labels, sizes, penalty, _widened(start, axes), ROUGH_GAIN)

        folded = [(rows, labels, start) for (rows, labels, _, _), start in zip(parts, starts, strict=True)]
        fits = side_by_side(fitted, folded)
        starts = list(fits)
        for heads, (_, _, outside, held_out) in zip(fits, parts, strict=True):
            for name, values in apply_heads(heads, held_out[:, :axes]).items():
                scores[name][outside] = values
        losses = head_losses(scores, targets)
        path[l2] = losses
        gained = [name for name in sizes if name not in best or losses[name] < path[best[name]][name]]
        for name in gained:
            best[name], chosen[name] = l2, scores[name]
        if not gained:
            break
    return CrossValidation(best, {name: path[best[name]][name] for name in sizes}, path, chosen)


def _widened(heads: HeadWeights | None, width: int) -> HeadWeights | None:
    """The same heads on more axes."""
    if heads is None:
        return None
    return {name: (np.pad(w, ((0, 0), (0, width - w.shape[1]))), bias) for name, (w, bias) in heads.items()}


def head_losses(scores: Mapping[str, Tensor], targets: Targets) -> dict[str, float]:
    """Head name -> mean loss over the rows that have its label."""
    known = {
        "unsafe": targets.unsafe >= 0,
        "severity": targets.severity >= 0,
        "category": (targets.category >= 0).any(dim=1),
    }
    return {n: float(term.sum() / known[n].sum().clamp_min(1)) for n, term in targets.terms(scores).items()}
