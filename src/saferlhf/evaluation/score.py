"""Scores of rows by a trained model, in the rows' order, each row exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saferlhf.data.batches import tokens_of
from saferlhf.data.encode import EncodedAnswers, EncodedPairs
from saferlhf.data.loader import EvalLoader
from saferlhf.evaluation.processes import ALONE, Processes
from saferlhf.models.modes import eval_mode


def score_rows(
    model: nn.Module,
    data: EncodedPairs | EncodedAnswers,
    *,
    head: str = "score",
    batch_size: int = 64,
    autocast: bool = False,
    processes: Processes = ALONE,
) -> NDArray[np.float64]:
    """Scores of pairs, (n, 2) with column = response index, or of single answers, (n,).

    The model is put into eval mode for the pass and back afterwards.

    Args:
        model: a `ScoreModel`, on the device it is to run on.
        data: encoded rows.
        head: which score.
        batch_size: rows per forward pass.
        autocast: compute in bfloat16.
        processes: share the batches; each gets all scores.
    """
    pairs = isinstance(data, EncodedPairs)

    def mine() -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
        rows: list[NDArray[Any]] = [np.zeros(0, np.int64)]
        scores: list[NDArray[Any]] = [np.zeros((0, 2) if pairs else 0)]
        for part, found in head_outputs(model, data, batch_size=batch_size, autocast=autocast, processes=processes):
            flat = found[head].squeeze(-1).numpy()  # (S,)
            rows.append(part)
            scores.append(flat.reshape(2, -1).T if pairs else flat)
        return np.concatenate(rows), {head: np.concatenate(scores)}

    return np.asarray(processes.united(len(data), mine)[head], np.float64)


def head_outputs(
    model: nn.Module,
    data: EncodedPairs | EncodedAnswers,
    *,
    batch_size: int,
    autocast: bool,
    processes: Processes = ALONE,
) -> Iterator[tuple[NDArray[np.integer[Any]], dict[str, Tensor]]]:
    """One pass over this process's rows, batch by batch: row numbers (B,), and head name -> (S, n) float32 on the CPU.

    The model is in eval mode during the pass and put back afterwards. Arguments as in `score_rows`.
    """
    device = next(model.parameters()).device
    with evaluating(model, autocast=autocast):
        loader: EvalLoader[Any] = EvalLoader(data, batch_size=batch_size)
        for rows in processes.mine(loader.parts):
            tokens = tokens_of(data.collate(rows)).to(device)
            found = model(tokens.input_ids, tokens.attention_mask, tokens.response_mask)
            yield rows, {head: values.float().cpu() for head, values in found.items()}


@contextmanager
def evaluating(model: nn.Module, *, autocast: bool = False) -> Iterator[None]:
    """Eval mode without gradients; afterwards every module is in the mode it was in.

    Args:
        model: on the device it is to run on.
        autocast: compute in bfloat16.
    """
    device = next(model.parameters()).device
    with eval_mode(model), torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        yield
