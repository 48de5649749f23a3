"""Logits of a moderator for rows of answers, in the rows' order, each row exactly once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from saferlhf.data.encode import EncodedAnswers
from saferlhf.evaluation.processes import ALONE, Processes
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
    processes: Processes = ALONE,
) -> ModerationLogits:
    """What the model's heads say of each row.

    The model is put into eval mode for the pass and back afterwards.

    Args:
        model: a `ScoreModel` with the heads of a moderator, on the device it is to run on.
        data: N encoded rows; labels, where it has any, are not looked at.
        batch_size: rows per forward pass.
        autocast: compute in bfloat16.
        progress: called after each batch with the number of rows done so far, by this process.
        processes: share the batches; each gets all logits.

    Returns:
        logits of N rows.

    Raises:
        UserError: no rows.
    """

    def mine() -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        numbers: list[NDArray[Any]] = [np.zeros(0, np.int64)]
        parts: dict[str, list[NDArray[Any]]] = {}
        done = 0
        options: dict[str, Any] = {"batch_size": batch_size, "autocast": autocast, "processes": processes}
        for rows, scores in head_outputs(model, data, **options):
            numbers.append(rows)
            for head, values in scores.items():
                parts.setdefault(head, []).append(values.numpy())
            done += len(rows)
            if progress is not None:
                progress(done)
        return np.concatenate(numbers), {head: np.concatenate(values) for head, values in parts.items()}

    found = processes.united(len(data), mine)
    return logits_of({head: torch.from_numpy(values) for head, values in found.items()})
