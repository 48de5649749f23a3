"""What a training step sees: small frozen dataclasses of tensors.

Shapes: `B` rows, `S` sequences (B, or 2B for pairs), `T` tokens. Masks: True = real token. Sequences are padded on the
right here; every model must give the same scores for any padding side (pooling and position ids come from the mask).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

Moved = TypeVar("Moved", bound="TokenBatch | PairBatch | AnswerBatch")


@dataclass(frozen=True)
class TokenBatch:
    """Token sequences of prompt + response.

    Attributes:
        input_ids: (S, T) int64.
        attention_mask: (S, T) bool, True at real tokens.
        response_mask: (S, T) bool, True at the response's tokens, its end-of-sequence token included.
        row_ids: S row ids, for error messages and for gathering results exactly once.
    """

    input_ids: Tensor
    attention_mask: Tensor
    response_mask: Tensor
    row_ids: tuple[str, ...]

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on another device."""
        return _to(self, device)


@dataclass(frozen=True)
class PairBatch:
    """B preference pairs as 2B sequences: `response_0` of all rows first, then `response_1` of all rows.

    Attributes:
        tokens: 2B sequences.
        better, safer, single: (B,) int64, 0 or 1 = index of the preferred response, -1 = not labelled.
        unsafe: (B, 2) int64, 1 unsafe, 0 safe, -1 not labelled; column = response index.
        severity: (B, 2) int64, 0..3, -1 not labelled.
    """

    tokens: TokenBatch
    better: Tensor
    safer: Tensor
    single: Tensor
    unsafe: Tensor
    severity: Tensor

    def __len__(self) -> int:
        return self.better.shape[0]

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on another device."""
        return _to(self, device)


@dataclass(frozen=True)
class AnswerBatch:
    """B single answers with their labels, -1 = not labelled.

    Attributes:
        tokens: B sequences.
        unsafe: (B,) int64, 1 unsafe, 0 safe.
        severity: (B,) int64, 0..3.
        category: (B, C) int64, 1 has the harm category, 0 has not; C may be 0.
    """

    tokens: TokenBatch
    unsafe: Tensor
    severity: Tensor
    category: Tensor

    def __len__(self) -> int:
        return self.unsafe.shape[0]

    def to(self, device: torch.device) -> AnswerBatch:
        """The same batch on another device."""
        return _to(self, device)


def tokens_of(batch: TokenBatch | PairBatch | AnswerBatch) -> TokenBatch:
    """The token sequences of a batch of any kind."""
    return batch if isinstance(batch, TokenBatch) else batch.tokens


def _to(batch: Moved, device: torch.device) -> Moved:
    moved = {
        f.name: getattr(batch, f.name).to(device)
        for f in fields(batch)
        if isinstance(getattr(batch, f.name), Tensor | TokenBatch)
    }
    return replace(batch, **moved)
