"""Features equal what a score model would read, for every span, pooling and padding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from test_layers import with_responses
from tiny_models import backbone, backbone_config, lora_config, rows, stir

from saferlhf.models.adapters import add_lora
from saferlhf.models.backbone import load_backbone
from saferlhf.models.features import pooled_parts, span_matrix, trunk_id, whole_row
from saferlhf.models.score_model import ScoreModel

LAYERS = (2, 0, 1)


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_equal_to_what_a_score_model_reads(family: str, pooling: str) -> None:
    trunk = backbone(family).eval()
    ids, mask, response = with_responses(rows(6), "left")
    response[1] = False  # no response
    response[2] = mask[2]  # no prompt
    with torch.inference_mode():
        parts = pooled_parts(ScoreModel(trunk, {}), ids, mask, response, LAYERS, pooling)
        assert parts.shape == (6, 3, 2, 64) and parts.dtype == torch.float32
        counts = torch.stack([(mask & ~response).sum(1), response.sum(1)], dim=1).numpy()
        for span in ("all", "prompt", "response", "both"):
            model = ScoreModel(trunk, {}, pooling, layers=LAYERS, span=span)
            matrix = span_matrix(parts.numpy(), counts, pooling, span)
            np.testing.assert_allclose(matrix, model.pooled(ids, mask, response).numpy(), rtol=1e-5, atol=2e-6)


def test_nan_at_padding_does_no_harm() -> None:
    model = ScoreModel(backbone().eval(), {})
    ids, mask, response = with_responses(rows(3), "right")
    clean = pooled_parts(model, ids, mask, response, [1], "mean")
    visit = model.visit

    def spoilt(ids: torch.Tensor, mask: torch.Tensor, layers: object, take: object) -> None:
        visit(ids, mask, layers, lambda layer, s: take(layer, s.masked_fill(~mask.unsqueeze(-1), torch.nan)))

    model.visit = spoilt  # type: ignore[method-assign]
    torch.testing.assert_close(pooled_parts(model, ids, mask, response, [1], "mean"), clean)


def test_the_whole_row_by_hand() -> None:
    parts = np.array([[[[1.0], [4.0]]], [[[2.0], [0.0]]]])  # (2, 1, 2, 1)
    counts = np.array([[1, 2], [3, 0]])
    np.testing.assert_allclose(whole_row(parts, counts, "mean"), [[[3.0]], [[2.0]]])  # (1 + 2 x 4) / 3
    np.testing.assert_allclose(whole_row(parts, counts, "last"), [[[4.0]], [[2.0]]])


def test_a_backbone_is_known_by_its_content() -> None:
    one, again, other = backbone(seed=0), backbone(seed=0), backbone(seed=1)
    assert trunk_id(one) == trunk_id(again) != trunk_id(other)
    assert trunk_id(load_backbone(backbone_config(dtype="bfloat16"), vocabulary_size=64)) != trunk_id(one)
    adapted = add_lora(again, lora_config())
    before = trunk_id(adapted)
    stir(adapted)
    assert trunk_id(adapted) != before
