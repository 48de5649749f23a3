"""Models without weights: numbers of LLaMA, bytes of nf4 against bitsandbytes, caches against real ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from saferlhf.config.schema import AdapterConfig, BackboneConfig, QuantizationConfig
from saferlhf.errors import UserError
from saferlhf.models.shapes import (
    count_weights,
    fake_backbone,
    faking,
    kv_nbytes,
    packed_nbytes,
    shape_config,
    weight_nbytes,
)

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
}
LLAMA = BackboneConfig("llama_7b", model="huggyllama/llama-7b", dtype="bfloat16")
NONE, NF4 = QuantizationConfig("none"), QuantizationConfig("nf4", compute_dtype="bfloat16")


def test_llama_7b_has_6_74e9_weights() -> None:
    # embeddings and output layer, 32 blocks of 4 attention and 3 feed-forward matrices and 2 norms, the last norm
    by_hand = 2 * 32000 * 4096 + 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    assert by_hand == 6_738_415_616
    with faking():
        model = fake_backbone(shape_config(LLAMA), LLAMA, NONE, None, lm_head=True)
    assert count_weights(model.parameters()) == by_hand
    assert weight_nbytes(model.parameters()) == 2 * by_hand


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(64, 128), (192, 64), (256, 512)])
def test_packed_bytes_are_those_of_bitsandbytes(shape: tuple[int, int], double: bool) -> None:
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(shape[1], shape[0], bias=False, quant_type="nf4", compress_statistics=double)
    layer.load_state_dict({"weight": torch.randn(*shape)})
    weight = layer.to("cpu").weight
    state = weight.quant_state
    tensors = [weight.data, state.absmax, state.code]
    if double:
        tensors += [state.state2.absmax, state.state2.code, state.offset]
    real = sum(t.numel() * t.element_size() for t in tensors)
    assert packed_nbytes(shape[0] * shape[1], double) == real


def test_bits_per_weight() -> None:
    assert 8 * packed_nbytes(2**26, True) / 2**26 == pytest.approx(4.127, abs=1e-3)
    assert 8 * packed_nbytes(2**26, False) / 2**26 == pytest.approx(4.5, abs=1e-3)


def test_llama_7b_in_4_bits() -> None:
    with faking():
        model = fake_backbone(shape_config(LLAMA), LLAMA, NF4, None, lm_head=True)
    packed = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    loose = 2 * (2 * 32000 * 4096 + (32 * 2 + 1) * 4096)
    # of the blocks 4.127 bits a weight; embeddings, output layer and norms in bfloat16
    assert weight_nbytes(model.parameters()) == pytest.approx(packed * 4.127 / 8 + loose, rel=1e-3)
    assert count_weights(model.parameters()) == 6_738_415_616
    assert not any(p.requires_grad for p in model.parameters())


def test_adapters_of_rank_16_on_all_linear_layers() -> None:
    with faking():
        model = fake_backbone(shape_config(LLAMA), LLAMA, NF4, AdapterConfig("lora"), lm_head=True)
    trained = [p for p in model.parameters() if p.requires_grad]
    # rank (in + out) of each matrix
    by_hand = 32 * 16 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert count_weights(trained) == by_hand == 39_976_960
    assert weight_nbytes(trained) == 4 * by_hand, "adapters are float32"


def test_shapes_come_from_wherever_they_are(tmp_path: Path) -> None:
    own = BackboneConfig("own", architecture={k: v for k, v in TINY.items() if k != "vocab_size"})
    assert shape_config(own, vocabulary_size=33).vocab_size == 33
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    assert shape_config(LLAMA, folder=tmp_path).hidden_size == 64
    assert shape_config(replace(LLAMA, model="meta-llama/Llama-3.3-70B-Instruct")).num_hidden_layers == 80
    with pytest.raises(UserError, match="configuration cannot be read"):
        shape_config(replace(LLAMA, model=str(tmp_path / "nowhere")))


def test_tied_weights_stay_tied() -> None:
    tied = BackboneConfig("own", architecture={**TINY, "tie_word_embeddings": True})
    with faking():
        model = fake_backbone(shape_config(tied), tied, NONE, None, lm_head=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_bf16_true_turns_every_weight() -> None:
    own = BackboneConfig("own", architecture=TINY)
    with faking():
        model = fake_backbone(shape_config(own), own, NONE, AdapterConfig("lora"), lm_head=False, precision="bf16-true")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_the_cache_is_as_large_as_a_real_one() -> None:
    from transformers import AutoModelForCausalLM

    config = shape_config(BackboneConfig("own", architecture=TINY))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        cache = model(input_ids=torch.zeros(5, 7, dtype=torch.int64), use_cache=True).past_key_values
    real = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    # keys and values, 3 layers, 2 heads of 16, 5 rows of 7 tokens, float32
    assert kv_nbytes(config, 5, 7, 4) == real == 2 * 3 * 2 * 16 * 5 * 7 * 4


def test_a_packed_layer_computes_shapes_and_keeps_its_bias() -> None:
    from saferlhf.models.shapes import PackedLinear

    with faking():
        layer = PackedLinear(nn.Linear(64, 32), NF4)
        x = torch.zeros(3, 64, requires_grad=True)
        out = layer(x)
        out.sum().backward()
        assert out.shape == (3, 32)
        assert out.dtype == torch.float32
        assert x.grad is not None
        assert x.grad.shape == (3, 64)
        assert layer.bias is not None
