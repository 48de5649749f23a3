"""A linear score on fixed features that minimises any smooth loss of the scores, with an L2 penalty: where the training
of a reward or a cost model begins.

With standardised features x_i (mean 0, variance 1 over the rows) and scores s_i = w x_i + b

    J(w, b) = L(s) + l2 / 2 |w|^2

for a loss L of all scores, such as the mean Bradley-Terry loss of the pairs they belong to. As in `ops/linear_probe.py`
the rows are turned to the principal axes of the features and each axis is scaled by about the inverse root of J's
curvature along it; L-BFGS then needs some ten steps. The penalty is the one with the least loss on rows that a fit has
not seen.

Beginning to fine-tune from such a head instead of a random one keeps what the backbone knows: a random head's first
gradients distort it (Kumar et al. 2022, "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

from saferlhf.ops.linear_probe import CURVATURE, GRADIENT_TOLERANCE, LEAST_GAIN, MAX_STEPS, Floats

Rows = NDArray[np.int64]
Loss = Callable[[Tensor, Rows], Tensor]
"""From the float64 scores of some rows, and the numbers of these rows, to their mean loss."""


@dataclass(frozen=True)
class ScoreProbe:
    """A fitted score.

    Attributes:
        weight: (R,) on rows along the axes.
        bias: b.
        l2: the penalty with the least out-of-fold loss.
        path: penalty -> mean out-of-fold loss, for all that were tried.
        out_of_fold: (N,) scores of rows by fits that have not seen them, at `l2`.
    """

    weight: Floats
    bias: float
    l2: float
    path: dict[float, float]
    out_of_fold: Floats


def fit_score(
    z: Tensor, energy: Floats, loss: Loss, rows: Rows, l2: float, start: tuple[Floats, float] | None = None
) -> tuple[Floats, float]:
    """Weight (R,) and bias that minimise J over some rows.

    Args:
        z: (N, R) float32 rows along the axes of a `Basis`.
        energy: (R,) of that basis; only the speed depends on it.
        loss: L.
        rows: numbers of the rows to fit on.
        l2: weight of the penalty, above zero.
        start: weight and bias to begin with; None: zero.
    """
    inside = z[torch.from_numpy(rows)]
    scale = 1.0 / np.sqrt(CURVATURE * energy + l2)  # (R,)

    def objective(flat: Floats) -> tuple[float, Floats]:
        weight = flat[:-1] * scale
        scores = (inside @ torch.from_numpy(weight).to(inside.dtype)).double() + flat[-1]
        scores.requires_grad_()
        value = loss(scores, rows)
        (slope,) = torch.autograd.grad(value, scores)
        on_weight = (slope.to(inside.dtype) @ inside).double().numpy() + l2 * weight
        gradient = np.append(on_weight * scale, float(slope.sum()))
        return float(value.detach()) + l2 / 2 * float(weight @ weight), gradient

    begin = np.zeros(len(scale) + 1) if start is None else np.append(start[0] / scale, start[1])
    options = {"maxiter": MAX_STEPS, "maxcor": 20, "gtol": GRADIENT_TOLERANCE, "ftol": LEAST_GAIN, "maxls": 40}
    found = minimize(objective, begin, jac=True, method="L-BFGS-B", options=options).x
    return found[:-1] * scale, float(found[-1])


def fit_score_probe(z: Tensor, energy: Floats, loss: Loss, folds: Rows, penalties: Sequence[float]) -> ScoreProbe:
    """Choose the penalty by cross-validation, from the largest down until the loss rises, then fit on all rows.

    Args:
        z, energy, loss: as `fit_score` takes them.
        folds: (N,) fold of each row; rows that the loss compares with each other are in one fold.
        penalties: to be tried.
    """
    parts = [(np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)) for fold in np.unique(folds)]
    starts: list[tuple[Floats, float] | None] = [None] * len(parts)
    path: dict[float, float] = {}
    best, chosen = max(penalties), np.zeros(len(z))
    for l2 in sorted(penalties, reverse=True):
        scores = np.zeros(len(z))
        for index, (inside, outside) in enumerate(parts):
            weight, bias = fit_score(z, energy, loss, inside, l2, starts[index])
            starts[index] = (weight, bias)
            scores[outside] = z[torch.from_numpy(outside)].double().numpy() @ weight + bias
        everything = np.arange(len(z))
        path[l2] = float(loss(torch.from_numpy(scores), everything))
        if path[l2] > path[best]:
            break
        best, chosen = l2, scores
    weight, bias = fit_score(z, energy, loss, np.arange(len(z)), best)
    return ScoreProbe(weight, bias, best, path, chosen)
