"""Prompts as the stream that online training reads: a data set for `StepLoader`, whose step k is rollout k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from saferlhf.data.collate import Ints
from saferlhf.data.rows import PromptRow
from saferlhf.rollout.prompts import PromptTokens


class PromptBatch:
    """The prompts of one rollout; holds no tensors, so it is at home on every device."""

    def __init__(self, prompts: Sequence[PromptTokens]) -> None:
        self.prompts = tuple(prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device, **_: Any) -> PromptBatch:
        """The same prompts."""
        return self


@dataclass(frozen=True)
class EncodedPrompts:
    """Prompts and their tokens.

    Attributes:
        rows: the rows, in order.
        tokens: of each.
    """

    rows: Sequence[PromptRow]
    tokens: Sequence[PromptTokens]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Ints:
        """(N,) tokens of each prompt."""
        return np.array([len(prompt.token_ids) for prompt in self.tokens], dtype=np.int64)

    def collate(self, indices: Sequence[int] | Ints) -> PromptBatch:
        """These prompts; longest first changes nothing, since noise belongs to rows."""
        return PromptBatch([self.tokens[int(i)] for i in indices])
