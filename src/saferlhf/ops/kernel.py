"""Gaussian kernel of pooled hidden states: heads that are linear in it see what no linear map of the states shows.

With standardised features x (F of them, mean 0 and variance 1 over the training rows) and landmarks l_m, which are
training rows,

    k(x, l) = exp(-gamma |x - l|^2 / (2 F)),   score = sum_m a_m k(x, l_m) + b

Fitted with the penalty l2 / 2 times the squared norm in the kernel's own space this is kernel logistic regression (Zhu
& Hastie 2005, "Kernel logistic regression and the import vector machine"); with fewer landmarks than rows it is its
Nystroem approximation (Williams & Seeger 2001). Distances are taken along the leading principal axes of the features,
which hold nearly all of them. The penalty is the plain one of `ops/linear_probe.py` in the coordinates

    z(x) = V' k(x, L) / sqrt(e),   K(L, L) = V diag(e) V'

so the same fit serves, and the fitted weights W on z become a = V W' / sqrt(e) on kernel values: one more linear head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from saferlhf.ops.linear_probe import Basis, HeadWeights

Floats = NDArray[np.float64]

LEAST_EIGENVALUE = 1e-6
"""Of the kernel matrix, relative to its largest: below it float32 tells no directions apart."""

CHUNK = 4096
"""Rows of which kernel values are held at a time."""


def gaussian(rows: Tensor, landmarks: Tensor, gamma: float, width: int) -> Tensor:
    """(N, M) kernel values.

    Args:
        rows: (N, R) standardised features along the axes.
        landmarks: (M, R) of the same.
        gamma: inverse width.
        width: F, numbers per row before they were turned to the axes.
    """
    squares = rows.square().sum(dim=-1, keepdim=True) + landmarks.square().sum(dim=-1)  # (N, M)
    distances = (squares - 2.0 * rows @ landmarks.T).clamp_min(0.0)
    return torch.exp(-gamma / (2.0 * width) * distances)


@dataclass(frozen=True)
class KernelBasis:
    """Coordinates in which the kernel is a plain product of training rows.

    Attributes:
        linear: standardisation and principal axes of the features.
        landmarks: (M, R) training rows along these axes.
        gamma: inverse width of the kernel.
        root: (M, D) from kernel values to coordinates: V / sqrt(e).
        energy: (D,) mean square of the training rows along each coordinate, falling.
    """

    linear: Basis
    landmarks: Tensor
    gamma: float
    root: Tensor
    energy: Floats

    @classmethod
    def of(
        cls, x: NDArray[np.float32], *, gamma: float, axes: int = 512, rank: int = 1500, most: int = 6000, seed: int = 0
    ) -> KernelBasis:
        """Basis of these rows.

        Args:
            x: (N, F) training rows.
            gamma: inverse width of the kernel; 1 compares with the mean squared distance of two rows, which is 2 F.
            axes: principal axes of the features at most.
            rank: coordinates at most.
            most: landmarks at most; with more rows, as many are drawn.
            seed: of that draw.
        """
        linear = Basis.of(x).leading(axes)
        rows = linear.project(x)  # (N, R)
        landmarks = rows
        if len(rows) > most:
            drawn = np.sort(np.random.default_rng(seed).choice(len(rows), most, replace=False))
            landmarks = rows[torch.from_numpy(drawn)]
        kernel = gaussian(landmarks, landmarks, gamma, x.shape[1])
        values, vectors = torch.linalg.eigh(kernel)
        kept = min(rank, int((values > LEAST_EIGENVALUE * values[-1]).sum()))
        values, vectors = values[-kept:].flip(0), vectors[:, -kept:].flip(1)
        root = (vectors / values.sqrt()).contiguous()
        energy = np.zeros(kept)
        for part in rows.split(CHUNK):
            z = gaussian(part, landmarks, gamma, x.shape[1]) @ root
            energy += z.double().square().sum(dim=0).numpy()
        return cls(linear, landmarks, gamma, root, energy / len(rows))

    @property
    def width(self) -> int:
        """F."""
        return len(self.linear.mean)

    def project(self, x: NDArray[np.float32]) -> Tensor:
        """(N, F) rows -> (N, D) float32 coordinates."""
        rows = self.linear.project(x)
        parts = [gaussian(part, self.landmarks, self.gamma, self.width) @ self.root for part in rows.split(CHUNK)]
        return torch.cat(parts)

    def unfold(self, heads: HeadWeights) -> HeadWeights:
        """Heads on kernel values instead of coordinates: equal outputs, M wide."""
        root = self.root.double().numpy()
        return {name: (weight @ root.T, bias) for name, (weight, bias) in heads.items()}
