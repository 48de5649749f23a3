"""Kernel ridge regression on the labels: a rough measure of sets of layers under the Gaussian kernel of
`ops/kernel.py`, seconds per set where the exact fit takes minutes. For choosing layers, never for verdicts.

Squared distances of standardised features add up over layers: with D_l(i, j) the mean squared difference of rows i and
j over layer l's features, layers side by side have the mean of their D_l, and the kernel is exp(-gamma / 2 mean_l D_l).
So each layer's distances are computed once, whatever sets are tried. With centred targets Y, the rows outside a fold
and penalty c, predictions in the fold are

    K_in,out (K_out,out + n c I)^-1 Y_out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saferlhf.ops.linear_probe import CURVATURE, moments, standardised
from saferlhf.ops.ridge import best_by_error
from saferlhf.ops.threads import side_by_side


def mean_squared_differences(x: NDArray[np.float32]) -> Tensor:
    """(N, N) float32: mean over the features of squared differences of standardised rows (N, F)."""
    rows = standardised(x, *moments(x))
    squares = rows.square().sum(dim=1)
    distances = squares[:, None] + squares[None] - 2.0 * rows @ rows.T
    return distances.clamp_min_(0.0).div_(rows.shape[1])


def kernel_ridge_out_of_fold(
    distances: Sequence[Tensor], gamma: float, y: Mapping[str, Tensor], folds: NDArray[np.int64], l2: Sequence[float]
) -> dict[str, Tensor]:
    """Out-of-fold predictions at each head's best penalty.

    Args:
        distances: (N, N) of each layer of the set.
        gamma: inverse width of the kernel.
        y: head name -> (N, n) as of `ridge_targets`.
        folds: (N,).
        l2: penalties of the exact fit; here they are divided by its typical curvature.

    Returns:
        head name -> (N, n) float32.
    """
    joined = torch.cat([values.nan_to_num(0.0) for values in y.values()], dim=1)  # no label: no pull
    mean = sum(distances[1:], start=distances[0].clone()) / len(distances)
    kernel = mean.mul_(-gamma / 2.0).exp_()
    predicted = [torch.zeros_like(joined) for _ in l2]

    def solve(fold: int) -> None:
        inside, outside = (torch.from_numpy(np.flatnonzero(which)) for which in (folds == fold, folds != fold))
        known, new = kernel[outside][:, outside], kernel[inside][:, outside]
        for index, penalty in enumerate(l2):
            ridge = known.clone()
            ridge.diagonal().add_(penalty / CURVATURE * len(outside))
            predicted[index][inside] = new @ torch.cholesky_solve(joined[outside], torch.linalg.cholesky(ridge))

    side_by_side(solve, np.unique(folds).tolist())
    return best_by_error(predicted, y)
