"""Positions and pooling of padded sequences, from the attention mask alone.

Where a score is read and which position a token has must not depend on padding side, batch or pad token: token ids are
never looked at, so a pad token that is also the end-of-sequence token does no harm.

Legend: `S` sequences, `T` tokens, `H` hidden size. Masks: True (or 1) = real token.
"""

from __future__ import annotations

import torch
from torch import Tensor

POOLINGS = ("last", "mean")
SPANS = {"all": 1, "prompt": 1, "response": 1, "both": 2, "all_and_response": 2}
"""Which tokens are pooled -> how many pooled states that gives; `both` is prompt and response, one after the other."""


def position_ids(attention_mask: Tensor) -> Tensor:
    """Position of each token among its row's real tokens: the first real token has 0, wherever it stands.

    Args:
        attention_mask: (S, T) bool or int, True = real token.

    Returns:
        (S, T) int64. Padding before the first token has 0, padding after a token has that token's position; both are
        masked out of attention, and every value is a valid index.
    """
    counted = attention_mask.long().cumsum(dim=-1)  # (S, T)
    return (counted - 1).clamp_min(0)


def last_index(mask: Tensor) -> Tensor:
    """Index of each row's last real token; 0 for a row without one (check `mask.any(-1)`).

    Args:
        mask: (S, T) bool or int, True = real token.

    Returns:
        (S,) int64.
    """
    columns = torch.arange(mask.shape[-1], device=mask.device)
    return torch.where(mask.bool(), columns, 0).amax(dim=-1)  # (S,)


def pool(hidden: Tensor, mask: Tensor, how: str = "last") -> Tensor:
    """One vector per row: the state of the last real token, or the mean over real tokens.

    A row without a real token pools to zeros and takes no gradient, even where its hidden states are NaN.

    Args:
        hidden: (S, T, H).
        mask: (S, T) bool or int, True = token that counts. Any padding side, holes too.
        how: "last" or "mean".

    Returns:
        (S, H), in the dtype of `hidden` for "last" and in float32 (or wider) for "mean".
    """
    if hidden.shape[:2] != mask.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} and mask {tuple(mask.shape)} differ in (S, T)")
    mask = mask.bool()
    if how == "last":
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        picked = hidden[rows, last_index(mask)]  # (S, H)
        # masked_fill, not a product: NaN times zero is NaN
        return picked.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    if how == "mean":
        # sums over many tokens lose digits in half precision
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        total = wide.masked_fill(~mask.unsqueeze(-1), 0.0).sum(dim=1)  # (S, H)
        return total / mask.sum(dim=-1, keepdim=True).clamp_min(1)
    raise ValueError(f"unknown pooling {how!r}; one of {', '.join(POOLINGS)}")


def span_masks(attention_mask: Tensor, response_mask: Tensor | None, span: str) -> list[Tensor]:
    """The masks to pool over: one, or for `both` the prompt's and the response's.

    Args:
        attention_mask: (S, T) bool or int, True = real token.
        response_mask: (S, T) bool or int, True at the response's tokens; may be None for `all`.
        span: one of `SPANS`.

    Returns:
        One or two (S, T) bool masks, True = token that counts.
    """
    real = attention_mask.bool()
    if span not in SPANS:
        raise ValueError(f"unknown span {span!r}; one of {', '.join(SPANS)}")
    if span == "all":
        return [real]
    if response_mask is None:
        raise ValueError(f"span {span!r} needs the response mask")
    response = real & response_mask.bool()
    prompt = real & ~response_mask.bool()
    masks = {"prompt": [prompt], "response": [response], "both": [prompt, response]}
    return masks.get(span, [real, response])
