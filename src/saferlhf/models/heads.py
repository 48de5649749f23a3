"""Score heads: linear maps with a bias from a pooled state to named scores, always computed in float32.

The bias is part of the model: a cost's zero separates safe from unsafe, so a head without its bias is a different
model. Heads are plain modules beside the backbone, never inside a Hugging Face class, whose weight initialisation would
run over them, and whose saving would lose them with an adapter.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def head_widths(heads: nn.ModuleDict) -> dict[str, int]:
    """Name -> number of scores."""
    return {name: cast(ScoreHead, head).out_features for name, head in heads.items()}
