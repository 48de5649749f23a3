"""Collate: rows of token storage become padded tensors.

Padding is on the right. Masks are made from lengths, never by comparing ids with the padding id: where pad is eos,
the end of a response would otherwise vanish from the mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from saferlhf.data.batches import TokenBatch

Ints = NDArray[np.integer]


@dataclass(frozen=True)
class TokenStore:
    """N token sequences of prompt + response, end to end in one array.

    Attributes:
        flat: (sum of lengths,) int32 ids.
        offsets: (N + 1,) int64; sequence i is `flat[offsets[i]:offsets[i + 1]]`.
        prompt_lengths: (N,) int32; the response starts after so many tokens.
    """

    flat: Ints
    offsets: Ints
    prompt_lengths: Ints

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @cached_property
    def lengths(self) -> Ints:
        """(N,) tokens of each sequence."""
        return np.diff(self.offsets)

    def sequence(self, i: int) -> Ints:
        """Ids of one sequence."""
        return self.flat[self.offsets[i] : self.offsets[i + 1]]

    def select(self, keep: Ints) -> TokenStore:
        """The storage of some sequences, in the order given."""
        parts = [self.sequence(int(i)) for i in keep]
        return TokenStore(
            flat=np.concatenate(parts) if parts else self.flat[:0],
            offsets=np.concatenate([[0], np.cumsum(self.lengths[keep])]).astype(np.int64),
            prompt_lengths=self.prompt_lengths[keep],
        )


def pad_tokens(store: TokenStore, sequences: Ints, pad: int, row_ids: Sequence[str]) -> TokenBatch:
    """Some sequences of the storage as one batch, padded on the right to the longest of them.

    Args:
        sequences: (S,) indices into the storage.
        pad: the id at padded places.
        row_ids: S row ids.
    """
    lengths = store.lengths[sequences]
    columns = np.arange(lengths.max(initial=0))
    attention = columns[None, :] < lengths[:, None]  # (S, T)
    response = attention & (columns[None, :] >= store.prompt_lengths[sequences][:, None])  # (S, T)
    ids = np.full(attention.shape, pad, dtype=np.int64)  # (S, T)
    ids[attention] = np.concatenate([store.sequence(int(i)) for i in sequences])
    return TokenBatch(
        input_ids=torch.from_numpy(ids),
        attention_mask=torch.from_numpy(attention),
        response_mask=torch.from_numpy(response),
        row_ids=tuple(row_ids),
    )
