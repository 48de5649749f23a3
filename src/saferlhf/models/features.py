"""Features: what a frozen backbone makes of a row, layer by layer, pooled over its prompt and over its response.

For layer l and part p (0 prompt, 1 response) of a row, with h_t the hidden state at token t (`models/layers.py`):

    mean:  x[l, p] = sum of h_t over the part's tokens / their number        last:  x[l, p] = h at the part's last token

A part without tokens is zeros. The features of the whole row follow from its parts, so they are never stored:

    mean:  (n_0 x[l, 0] + n_1 x[l, 1]) / (n_0 + n_1)                         last:  x[l, 1], or x[l, 0] without response

States are pooled as they arise, in float32: memory holds one layer's states at a time, however many are asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from saferlhf.models.adapters import has_active_adapter
from saferlhf.models.backbone import provenance_of
from saferlhf.models.quantization import is_quantized
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.sequences import pool, span_masks

PARTS = 2
"""Prompt and response."""


def pooled_parts(
    model: ScoreModel, input_ids: Tensor, attention_mask: Tensor, response_mask: Tensor, layers: Sequence[int], how: str
) -> Tensor:
    """Features of S rows: (S, layers, 2, H) float32.

    Args:
        model: its trunk is read; pooling, layers and heads of its own do not matter.
        input_ids, attention_mask, response_mask: (S, T), as `ScoreModel.forward` takes them.
        layers: numbers of hidden states, in the order wanted.
        how: mean | last.
    """
    masks = span_masks(attention_mask, response_mask, "both")
    place = {layer: index for index, layer in enumerate(layers)}
    found: list[Tensor | None] = [None] * len(layers)
    weights = torch.stack([mask.float() / mask.sum(-1, keepdim=True).clamp_min(1) for mask in masks], dim=1)

    def take(layer: int, states: Tensor) -> None:
        with torch.autocast(states.device.type, enabled=False):
            parts = torch.bmm(weights, states.float()) if how == "mean" else None  # (S, 2, H), one pass over the states
            if parts is None or not torch.isfinite(parts).all():  # NaN at padding: zero times NaN is NaN
                parts = torch.stack([pool(states, mask, how).float() for mask in masks], dim=1)
            found[place[layer]] = parts

    model.visit(input_ids, attention_mask, layers, take)
    return torch.stack([parts for parts in found if parts is not None], dim=1)


def whole_row(parts: NDArray[Any], counts: NDArray[Any], how: str) -> NDArray[Any]:
    """Features of whole rows from those of prompt and response.

    Args:
        parts: (N, layers, 2, H).
        counts: (N, 2) tokens of prompt and response.
        how: mean | last.

    Returns:
        (N, layers, H) in the dtype of `parts`.
    """
    if how == "last":
        return np.where((counts[:, 1] > 0)[:, None, None], parts[:, :, 1], parts[:, :, 0])
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)  # (N, 2)
    share = share.astype(parts.dtype)[:, None, :, None]
    return (parts * share).sum(axis=2)


def span_matrix(parts: NDArray[Any], counts: NDArray[Any], how: str, span: str) -> NDArray[Any]:
    """(N, F) what a `ScoreModel` of this span would hand to its heads, layer by layer.

    Args:
        parts: (N, layers, 2, H); the other arguments as in `whole_row`.
        span: one of `SPANS` (`ops/sequences.py`).
    """
    if span in ("all", "all_and_response"):
        chosen = whole_row(parts, counts, how)  # (N, layers, H)
        if span == "all_and_response":
            chosen = np.stack([chosen, parts[:, :, 1]], axis=2)
    else:
        chosen = {"prompt": parts[:, :, 0], "response": parts[:, :, 1], "both": parts}[span]
    return np.ascontiguousarray(chosen.reshape(len(parts), -1))


def trunk_id(trunk: nn.Module) -> str:
    """Identity of a backbone by content, for keys of what it computed.

    Loaded weights are known by where they come from (`Source.content_id`); weights that are in no file, as those of a
    model from scratch or of an adapter in training, are hashed themselves.
    """
    provenance = provenance_of(trunk)
    packed = asdict(provenance.quantization) if is_quantized(provenance.quantization) else None
    parts: list[Any] = [provenance.source.content_id, provenance.commit, packed, provenance.backbone.dtype]
    digest = hashlib.sha256(repr(parts).encode())
    loose, adapted = provenance.source.kind == "scratch", has_active_adapter(trunk)
    for name, value in trunk.state_dict().items():
        if ".lora_" in name and not adapted:
            continue
        if loose or ".lora_" in name:
            digest.update(name.encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]
