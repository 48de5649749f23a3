"""Ridge regression on the labels themselves: a rough measure of features that takes a second where the exact fit of
`ops/linear_probe.py` takes half a minute. For ranking, never for verdicts.

Targets are numbers: unsafe 0 or 1, each category 0 or 1, severity >= 1, >= 2, >= 3. With centred targets Y, rows Z
outside a fold and penalty c,

    B = (Z'Z / n + c I)^-1 Z'Y / n

so a fold costs one Cholesky factor per penalty, and Z'Z of the other rows is that of all rows less the fold's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saferlhf.ops.linear_probe import CURVATURE, Targets
from saferlhf.ops.threads import side_by_side

Ints = NDArray[np.int64]


def ridge_targets(targets: Targets, names: Sequence[str]) -> dict[str, Tensor]:
    """Head name -> (N, n) float32 targets, centred; NaN where a row is not labelled."""
    levels = torch.arange(1, 4)
    plain = {
        "unsafe": (targets.unsafe[:, None].float(), targets.unsafe[:, None] >= 0),
        "severity": ((targets.severity[:, None] >= levels).float(), targets.severity[:, None] >= 0),
        "category": (targets.category.float(), targets.category >= 0),
    }
    found = {}
    for name in names:
        values, known = plain[name]
        values = torch.where(known, values, torch.nan)
        found[name] = values - values.nanmean(dim=0)
    return found


def ridge_out_of_fold(z: Tensor, y: Mapping[str, Tensor], folds: Ints, l2: Sequence[float]) -> dict[str, Tensor]:
    """Out-of-fold predictions at each head's best penalty.

    Args:
        z: (N, R) centred rows.
        y: head name -> (N, n) as of `ridge_targets`.
        folds: (N,).
        l2: penalties of the exact fit; here they are divided by its typical curvature.

    Returns:
        head name -> (N, n) float32.
    """
    joined = torch.cat([values.nan_to_num(0.0) for values in y.values()], dim=1)  # no label: no pull
    parts = [torch.from_numpy(np.flatnonzero(folds == fold)) for fold in np.unique(folds)]
    grams = side_by_side(lambda at: z[at].T @ z[at], parts)
    products = [z[at].T @ joined[at] for at in parts]
    gram, product = torch.stack(grams).sum(dim=0), torch.stack(products).sum(dim=0)
    predicted = [torch.zeros_like(joined) for _ in l2]

    def solve(fold: int) -> None:
        at = parts[fold]
        n = len(z) - len(at)
        others, right = (gram - grams[fold]) / n, (product - products[fold]) / n
        for index, penalty in enumerate(l2):
            ridge = others.clone()
            ridge.diagonal().add_(penalty / CURVATURE)
            predicted[index][at] = z[at] @ torch.cholesky_solve(right, torch.linalg.cholesky(ridge))

    side_by_side(solve, range(len(parts)))
    return best_by_error(predicted, y)


def best_by_error(predicted: Sequence[Tensor], y: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of several predictions (N, all heads' columns) for each head those with the least error: name -> (N, n)."""
    widths = [values.shape[1] for values in y.values()]
    by_penalty = [dict(zip(y, p.split(widths, dim=1), strict=True)) for p in predicted]
    errors = [relative_errors(scores, y) for scores in by_penalty]
    best = {name: min(range(len(errors)), key=lambda i: errors[i][name]) for name in y}
    return {name: by_penalty[best[name]][name] for name in y}


def relative_errors(predicted: Mapping[str, Tensor], y: Mapping[str, Tensor]) -> dict[str, float]:
    """Head name -> squared error relative to that of the means, over labelled rows; 1 = nothing learned."""
    found = {}
    for name, values in y.items():
        known = ~values.isnan()
        error = (predicted[name] - values)[known].square().sum()
        found[name] = float(error / values[known].square().sum().clamp_min(1e-12))
    return found


def order_by_average(
    predicted: Mapping[int, Mapping[str, Tensor]],
    y: Mapping[str, Tensor],
    weights: Mapping[str, float],
    limit: int,
) -> list[int]:
    """Feature sets in the order in which each lowers the error of the average most (Caruana et al. 2004).

    Args:
        predicted: set -> head name -> (N, n) out-of-fold predictions.
        y: as of `ridge_targets`.
        weights: head name -> its share in the error.
        limit: most sets to name.
    """

    def error(sets: Sequence[int]) -> float:
        mean = {name: sum(predicted[s][name] for s in sets) / len(sets) for name in y}
        errors = relative_errors(mean, y)  # type: ignore[arg-type]
        return sum(weights[name] * errors[name] for name in y)

    left: list[int] = list(predicted)
    chosen: list[int] = []
    while left and len(chosen) < limit:
        best = min(left, key=lambda s: error([*chosen, s]))
        left.remove(best)
        chosen.append(best)
    return chosen
