"""Passes on fake tensors: against the real losses on a real tiny model, and few blocks against all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from saferlhf.config.schema import AdapterConfig, BackboneConfig, QuantizationConfig
from saferlhf.models.adapters import add_lora
from saferlhf.models.backbone import load_backbone
from saferlhf.models.causal import hidden_states, output_layer, unwrapped
from saferlhf.models.live_bytes import Bytes, LiveBytes
from saferlhf.models.score_model import ScoreModel
from saferlhf.models.shapes import shape_config
from saferlhf.models.value_model import prefix_scores
from saferlhf.ops.losses import response_nll_from_hidden
from saferlhf.ops.policy_losses import token_entropy, token_logprobs
from saferlhf.run.memory import trace
from saferlhf.run.memory.trace import ModelShape, Pass, pass_bytes, sampling_bytes, weights_of

WORDS = 160
BACKBONE = BackboneConfig(
    "own",
    architecture={
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 9,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": WORDS,
    },
)
ROWS, TOKENS, RESPONSE = 6, 24, 10
LORA = AdapterConfig("lora", rank=4)


def shape(adapter: AdapterConfig | None = None, **more: Any) -> ModelShape:
    config = shape_config(BACKBONE)
    return ModelShape(config, BACKBONE, QuantizationConfig("none"), adapter, "32-true", **more)


def masks() -> tuple[Tensor, Tensor, Tensor]:
    """Rows with a little padding, as real batches have."""
    attention = torch.ones(ROWS, TOKENS, dtype=torch.bool)
    attention[0, :3] = False  # without padding no mask would be made
    response = torch.zeros_like(attention)
    response[:, -RESPONSE:] = True
    return torch.zeros(ROWS, TOKENS, dtype=torch.int64), attention, response


def real_loss(kind: str, model: Any) -> Tensor:
    """As the tasks compute it."""
    ids, attention, response = masks()
    if kind == "nll":
        hidden = hidden_states(model, ids, attention)
        return response_nll_from_hidden(hidden, output_layer(model), ids, response)[0].sum()
    if kind == "value":
        return prefix_scores(model, "score", ids, attention).sum()
    if kind == "score":
        return model(ids, attention, response)["score"].sum()
    logits = unwrapped(model)(input_ids=ids, attention_mask=attention.long(), use_cache=False).logits
    logprobs = token_logprobs(logits, ids, response, temperature=0.7)
    with torch.no_grad():
        token_entropy(logits, response, temperature=0.7)
    return logprobs.sum()


def real_highest(kind: str, adapter: AdapterConfig | None, batches: int) -> Bytes:
    causal = kind in ("nll", "policy")
    model = load_backbone(BACKBONE, lm_head=causal)
    if adapter is not None:
        model = add_lora(model, adapter)
    if not causal:
        model = ScoreModel(model, {"score": 1})
    live = LiveBytes(WORDS)
    live.ignore([*model.parameters(), *model.buffers()])
    live.watch_gradients(model.parameters())
    with live:
        for _ in range(batches):
            real_loss(kind, model).backward()
    return live.highest()


@pytest.mark.parametrize("adapter", [None, LORA], ids=["all", "lora"])
@pytest.mark.parametrize(("kind", "batches"), [("nll", 1), ("policy", 2), ("value", 1), ("score", 2)])
def test_a_pass_takes_what_the_real_one_takes(kind: str, batches: int, adapter: AdapterConfig | None) -> None:
    heads = () if kind in ("nll", "policy") else (("score", 1),)
    scored = RESPONSE if kind in ("nll", "policy") else 0
    planned = pass_bytes(
        shape(adapter, heads=heads), Pass(kind, ROWS, TOKENS, scored, batches, tempered=kind == "policy")
    )
    real = real_highest(kind, adapter, batches)
    # the loss's small change (targets, masks, sums) is not planned
    assert planned.total == pytest.approx(real.total, rel=0.03)
    assert planned.gradients == pytest.approx(real.gradients, rel=0.03, abs=100)


@pytest.mark.parametrize("adapter", [None, LORA], ids=["all", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("rows", [1, 40])
def test_few_blocks_tell_of_all(adapter: AdapterConfig | None, checkpointing: bool, rows: int) -> None:
    own = replace(shape(adapter), backbone=replace(BACKBONE, gradient_checkpointing=checkpointing))
    for work in (Pass("nll", rows, TOKENS, RESPONSE, 2), Pass("policy", rows, TOKENS, RESPONSE)):
        assert own.alike
        whole = trace._run(own, work)[2]
        assert pass_bytes(own, work) == whole, work


def test_recomputing_saves_activations() -> None:
    work = Pass("nll", 8, TOKENS, RESPONSE)
    kept = pass_bytes(shape(LORA), work)
    again = pass_bytes(replace(shape(LORA), backbone=replace(BACKBONE, gradient_checkpointing=True)), work)
    assert again.activations < kept.activations / 3


def test_eager_attention_keeps_every_pair_of_tokens() -> None:
    work = Pass("score", 4, 48)
    heads = (("score", 1),)
    fused = pass_bytes(shape(heads=heads), work)
    eager = pass_bytes(replace(shape(heads=heads), backbone=replace(BACKBONE, attention="eager")), work)
    # the softmax's output of 9 blocks, 4 heads, 4 rows, 48 x 48 pairs; the fused kernel keeps one mask for all heads
    assert eager.total - fused.total > 0.7 * 9 * (4 - 1) * 4 * 48 * 48 * 4


def test_weights_of_few_blocks_tell_of_all() -> None:
    found = weights_of(shape())
    by_hand = 2 * WORDS * 32 + 9 * (4 * 32 * 32 + 3 * 32 * 64 + 2 * 32) + 32
    assert (found.trained_count, found.frozen_count) == (by_hand, 0)
    assert found.trained == 4 * by_hand
    assert found.adamw == 8 * by_hand
    adapted = weights_of(shape(LORA))
    assert adapted.frozen_count == by_hand
    assert adapted.trained_count == 9 * 4 * (4 * 64 + 3 * 96)


def test_8_bit_states() -> None:
    # a matrix of 96 x 64: two bytes a weight and two float32 for 256; smaller tensors stay in float32
    assert trace._states_8bit(6144) == 2 * 6144 + 2 * 4 * 24
    assert trace._states_8bit(4095) == 8 * 4095


def test_sampling_holds_cache_and_draw() -> None:
    found = sampling_bytes(shape(), rows=8, prompts=4, tokens=12)
    # keys and values of 9 layers of width 32, float32
    assert found.cache == 2 * 9 * 32 * 4
    assert found.prompt.total >= found.cache * 4 * 12
    # noise, tempered logits, probabilities and their ratio, float64 each
    assert found.drawing.total >= 4 * 8 * WORDS * 8
