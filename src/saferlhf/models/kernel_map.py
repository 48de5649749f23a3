"""A Gaussian kernel between pooled hidden states and the heads: what a kernel probe exports.

    k_m(x) = exp(-gamma |A' (x - shift) / scale - l_m|^2 / (2 F)),   m = 1..M landmarks

Always float32, as the heads are. Maths and fit: `ops/kernel.py`. Its tensors lie beside the heads in
`heads.safetensors`, under `kernel.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from saferlhf.errors import UserError
from saferlhf.ops.kernel import KernelBasis, gaussian

PREFIX = "kernel."
PARTS = ("shift", "scale", "axes", "landmarks", "gamma")


class KernelMap(nn.Module):
    """Pooled states (S, F) -> kernel values (S, M), float32.

    Args:
        shift, scale: (F,) of the standardisation.
        axes: (F, R).
        landmarks: (M, R).
        gamma: () inverse width.
    """

    shift: Tensor
    scale: Tensor
    axes: Tensor
    landmarks: Tensor
    gamma: Tensor

    def __init__(self, shift: Tensor, scale: Tensor, axes: Tensor, landmarks: Tensor, gamma: Tensor) -> None:
        super().__init__()
        for name, value in zip(PARTS, (shift, scale, axes, landmarks, gamma), strict=True):
            self.register_buffer(name, value.float().contiguous())

    @classmethod
    def of(cls, basis: KernelBasis) -> KernelMap:
        """Of a fitted basis; heads go on as `basis.unfold` gives them."""
        linear = basis.linear
        shift, scale = torch.from_numpy(linear.mean), torch.from_numpy(linear.scale)
        return cls(shift, scale, linear.axes, basis.landmarks, torch.tensor(basis.gamma))

    @classmethod
    def load(cls, tensors: Mapping[str, Tensor], width: int, folder: Path) -> KernelMap:
        """From the tensors of an export; UserError when they do not fit each other or the F = `width` states."""
        parts = {name: tensors[PREFIX + name] for name in PARTS}
        axes, landmarks = parts["axes"], parts["landmarks"]
        fits = axes.ndim == landmarks.ndim == 2 and parts["gamma"].ndim == 0
        fits = fits and axes.shape[1] == landmarks.shape[1]
        fits = fits and tuple(parts["shift"].shape) == tuple(parts["scale"].shape) == (axes.shape[0],) == (width,)
        if not fits or not all(bool(torch.isfinite(value).all()) for value in parts.values()):
            raise UserError("the kernel of the heads is damaged", str(folder), "train the probe again")
        return cls(**parts)

    @property
    def width(self) -> int:
        """M."""
        return len(self.landmarks)

    def forward(self, pooled: Tensor) -> Tensor:
        """(S, F) any float dtype -> (S, M) float32."""
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            rows = (pooled.float() - self.shift) / self.scale @ self.axes  # (S, R)
            return gaussian(rows, self.landmarks, float(self.gamma), len(self.shift))


def kernel_names(kernel: str | None) -> tuple[str, ...]:
    """Names of the tensors that an export has beside its heads."""
    return () if kernel is None else tuple(PREFIX + name for name in PARTS)


def head_tensors(heads: nn.ModuleDict, kernel: KernelMap | None) -> dict[str, Tensor]:
    """What `heads.safetensors` holds: every head's weight and bias in float32, and the kernel they are linear in."""
    state = dict(heads.state_dict())
    if kernel is not None:
        state |= {PREFIX + name: value for name, value in kernel.state_dict().items()}
    return {name: value.detach().cpu().float().contiguous() for name, value in state.items()}
