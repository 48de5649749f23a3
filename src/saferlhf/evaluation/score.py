"""Scores of rows by a trained model, in the rows' order, each row exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from saferlhf.data.batches import tokens_of
from saferlhf.data.encode import EncodedAnswers, EncodedPairs
from saferlhf.data.loader import EvalLoader


def score_rows(
    model: nn.Module,
    data: EncodedPairs | EncodedAnswers,
    *,
    head: str = "score",
    batch_size: int = 64,
    autocast: bool = False,
) -> NDArray[np.float64]:
    """Scores of pairs, (n, 2) with column = response index, or of single answers, (n,).

    The model is put into eval mode for the pass and back afterwards.

    Args:
        model: maps `input_ids` and `attention_mask` to a dict of (S, 1) scores, on the device it is to run on.
        data: encoded rows.
        head: which score.
        batch_size: rows per forward pass.
        autocast: compute in bfloat16.
    """
    device = next(model.parameters()).device
    pairs = isinstance(data, EncodedPairs)
    scores = np.full((len(data), 2) if pairs else len(data), np.nan)
    with evaluating(model, autocast=autocast):
        loader: EvalLoader[Any] = EvalLoader(data, batch_size=batch_size)
        for item in loader:
            batch = item.batch.to(device)
            tokens = tokens_of(batch)
            flat = model(tokens.input_ids, tokens.attention_mask)[head].squeeze(-1).float().cpu().numpy()  # (S,)
            scores[item.indices] = flat.reshape(2, -1).T if pairs else flat
    return scores


@contextmanager
def evaluating(model: nn.Module, *, autocast: bool = False) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in.

    Args:
        model: on the device it is to run on.
        autocast: compute in bfloat16.
    """
    modes = [(module, module.training) for module in model.modules()]
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            yield
    finally:
        for module, training in modes:
            module.training = training
