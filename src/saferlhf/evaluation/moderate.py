"""Logits of a moderator for rows of answers, in the rows' order, each row exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saferlhf.data.batches import tokens_of
from saferlhf.data.encode import EncodedAnswers
from saferlhf.data.loader import EvalLoader
from saferlhf.evaluation.score import evaluating
from saferlhf.models.moderator import logits_of
from saferlhf.ops.moderation import ModerationLogits


def moderate_rows(
    model: nn.Module,
    data: EncodedAnswers,
    *,
    batch_size: int = 64,
    autocast: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ModerationLogits:
    """What the model's heads say of each row.

    The model is put into eval mode for the pass and back afterwards.

    Args:
        model: a `ScoreModel` with the heads of a moderator, on the device it is to run on.
        data: N encoded rows; labels, where it has any, are not looked at.
        batch_size: rows per forward pass.
        autocast: compute in bfloat16.
        progress: called after each batch with the number of rows done so far.

    Returns:
        logits of N rows.

    Raises:
        UserError: no rows.
    """
    device = next(model.parameters()).device
    found: dict[str, Tensor] = {}
    done = 0
    with evaluating(model, autocast=autocast):
        loader: EvalLoader[Any] = EvalLoader(data, batch_size=batch_size)
        for item in loader:
            tokens = tokens_of(item.batch).to(device)
            scores = model(tokens.input_ids, tokens.attention_mask, tokens.response_mask)  # head -> (b, n)
            for head, values in scores.items():
                rows = found.setdefault(head, torch.full((len(data), values.shape[1]), torch.nan))
                rows[torch.from_numpy(item.indices)] = values.float().cpu()
            done += len(item.indices)
            if progress is not None:
                progress(done)
    return logits_of(found)
