"""Score heads: linear maps with a bias from a pooled state to named scores, always computed in float32.

The bias is part of the model: a cost's zero separates safe from unsafe, so a head without its bias is a different
model. Heads are plain modules beside the backbone, never inside a Hugging Face class, whose weight initialisation would
run over them, and whose saving would lose them with an adapter.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from saferlhf.errors import UserError
from saferlhf.models.metadata import HEADS_FILE
from saferlhf.ops.linear_probe import HeadWeights

INITIAL_SCORE_STD = 0.1
"""Standard deviation of a fresh head's scores for hidden states of unit mean square, whatever the hidden size."""


class ScoreHead(nn.Linear):
    """`scores = W x + b` in float32, under autocast and for half-precision input too."""

    def forward(self, pooled: Tensor) -> Tensor:
        """(S, H) any float dtype -> (S, n) float32."""
        with torch.autocast(device_type=pooled.device.type, enabled=False):
            return F.linear(pooled.float(), self.weight.float(), self.bias.float())


def build_heads(hidden_size: int, heads: Mapping[str, int], seed: int = 0) -> nn.ModuleDict:
    """Fresh heads: small normal weights, zero bias, equal for equal (hidden_size, name, width, seed).

    Each head draws from its own stream, so adding a head does not change the others.

    Args:
        hidden_size: H.
        heads: name -> number of scores.
        seed: of the weights.
    """
    built = nn.ModuleDict()
    for name, width in heads.items():
        if width < 1:
            raise ValueError(f"head {name!r} has {width} outputs; at least 1")
        head = ScoreHead(hidden_size, width, dtype=torch.float32)
        # torch's CPU generator looks at the low 32 bits of a seed only
        stream = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        with torch.no_grad():
            head.weight.copy_(torch.randn(width, hidden_size, generator=stream) * INITIAL_SCORE_STD / hidden_size**0.5)
            head.bias.zero_()
        built[name] = head
    return built


def install_heads(heads: nn.ModuleDict, weights: HeadWeights) -> None:
    """Give heads other weights, all of them: name -> weight (n, F) and bias (n,)."""
    if set(heads) != set(weights):
        raise ValueError(f"weights for {sorted(weights)}, heads {sorted(heads)}")
    for name, (weight, bias) in weights.items():
        state = {"weight": torch.from_numpy(weight).float(), "bias": torch.from_numpy(bias).float()}
        heads[name].load_state_dict(state)


def head_widths(heads: nn.ModuleDict) -> dict[str, int]:
    """Name -> number of scores."""
    return {name: cast(ScoreHead, head).out_features for name, head in heads.items()}


def read_heads(folder: Path, expected: Mapping[str, int], more: Sequence[str] = ()) -> dict[str, Tensor]:
    """`<head>.weight` and `<head>.bias` of every expected head, and the tensors `more`; UserError when one lacks."""
    if not expected:
        return {}
    mend = "export the model again; heads cannot be recovered from the backbone"
    try:
        tensors = load_file(str(folder / HEADS_FILE))
    except FileNotFoundError:
        raise UserError(f"{HEADS_FILE} is missing: {', '.join(expected)} would be random", str(folder), mend) from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{HEADS_FILE} is damaged: {error}", str(folder), mend) from error
    wanted = {f"{name}.{part}" for name in expected for part in ("weight", "bias")} | set(more)
    if tensors.keys() != wanted:
        missing, surplus = sorted(wanted - tensors.keys()), sorted(tensors.keys() - wanted)
        raise UserError(f"heads do not match: missing {missing}, surplus {surplus}", str(folder / HEADS_FILE), mend)
    return tensors


def build_loaded_heads(
    tensors: Mapping[str, Tensor], expected: Mapping[str, int], size: int, folder: Path
) -> nn.ModuleDict:
    """Heads with the given weights; a wrong shape or a NaN is a UserError."""
    heads = nn.ModuleDict()
    for name, width in expected.items():
        weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
        if tuple(weight.shape) != (width, size) or tuple(bias.shape) != (width,):
            shapes = f"{tuple(weight.shape)} and {tuple(bias.shape)}, not {(width, size)} and {(width,)}"
            raise UserError(f"head {name!r} has shapes {shapes}", str(folder / HEADS_FILE), "export the model again")
        if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
            raise UserError(f"head {name!r} holds NaN or infinity", str(folder / HEADS_FILE), "train the model again")
        head = ScoreHead(size, width, dtype=torch.float32)
        head.load_state_dict({"weight": weight, "bias": bias})
        heads[name] = head
    return heads
