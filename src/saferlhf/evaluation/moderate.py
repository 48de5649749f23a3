"""Logits of a moderator for rows of answers, in the rows' order, each row exactly once."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from saferlhf.data.encode import EncodedAnswers
from saferlhf.evaluation.score import head_outputs
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
    found: dict[str, Tensor] = {}
    done = 0
    for rows, scores in head_outputs(model, data, batch_size=batch_size, autocast=autocast):
        for head, values in scores.items():
            whole = found.setdefault(head, torch.full((len(data), values.shape[1]), torch.nan))
            whole[torch.from_numpy(rows)] = values
        done += len(rows)
        if progress is not None:
            progress(done)
    return logits_of(found)
