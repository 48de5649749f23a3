"""Hidden states by layer: transformers' own, none above the highest computed; heads on any of them, padding-proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_export import assert_same, save
from tiny_models import NF4, backbone, backbone_config, folder_of, lora_config, padded, rows, stir

from saferlhf.errors import UserError
from saferlhf.models.adapters import adapter_disabled, add_lora
from saferlhf.models.backbone import load_backbone
from saferlhf.models.layers import blocks_of, layer_count, visit_states
from saferlhf.models.loading import load_export
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.sequences import pool

FAMILIES = ("llama", "gpt2", "bert", "roberta")
HEADS = {"cost": 1, "moderation": 3}


def model_on(layers: Any, span: str = "all", family: str = "llama", pooling: str = "mean", **more: Any) -> ScoreModel:
    model = ScoreModel(backbone(family, **more), HEADS, pooling, layers=layers, span=span)
    stir(model)
    return model.eval()


def with_responses(sequences: list[torch.Tensor], side: str, pad: int = 0, extra: int = 0) -> tuple[torch.Tensor, ...]:
    """Ids, mask and response mask: the first two tokens of a row are its prompt."""
    ids, mask = padded(sequences, side, pad, extra)
    response = mask & (mask.cumsum(1) > 2)
    return ids, mask, response


# ------------------------------------------------------------------------------------------------ states
@pytest.mark.parametrize("family", FAMILIES)
def test_states_are_numbered_as_transformers_numbers_them(family: str) -> None:
    trunk, row = backbone(family).eval(), rows(1)[0][None]
    assert layer_count(trunk) == 2
    with torch.no_grad():
        own = trunk(input_ids=row, output_hidden_states=True).hidden_states
        for wanted in ([0], [1], [2], [0, 2], [2, 1, 0]):
            seen: dict[int, torch.Tensor] = {}
            ScoreModel(trunk, {}).visit(row, torch.ones_like(row), wanted, seen.__setitem__)
            assert set(seen) == set(wanted)
            for layer in wanted:
                torch.testing.assert_close(seen[layer], own[layer])


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_above_the_highest_layer_is_computed_and_no_hook_stays(family: str) -> None:
    trunk, row = backbone(family).eval(), rows(1)[0][None]
    calls = []
    for number, block in enumerate(blocks_of(trunk)):
        block.register_forward_hook(lambda *_, number=number: calls.append(number))
    model = ScoreModel(trunk, HEADS, layers=[1])
    with torch.no_grad():
        model(row, torch.ones_like(row))
        assert calls == [0]
        trunk(input_ids=row)
    assert calls == [0, 0, 1]
    assert not any(block._forward_pre_hooks for block in blocks_of(trunk))


def test_hooks_are_taken_away_when_the_model_fails() -> None:
    trunk = backbone()

    def fails() -> torch.Tensor:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        visit_states(trunk, fails, [1], lambda *_: None)
    assert not any(block._forward_pre_hooks for block in blocks_of(trunk))


@pytest.mark.parametrize("layers", [[3], [-1], [], [1, 1]])
def test_impossible_layers_are_refused(layers: list[int]) -> None:
    with pytest.raises(UserError, match="layer"):
        ScoreModel(backbone(), HEADS, layers=layers)


# ------------------------------------------------------------------------------------------------ scores
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_over_all_tokens_is_what_it_was(family: str, pooling: str) -> None:
    plain, layered = model_on(None, family=family, pooling=pooling), model_on([2], family=family, pooling=pooling)
    ids, mask = padded(rows(), "right")
    with torch.no_grad():
        for name, scores in plain(ids, mask).items():
            assert torch.equal(scores, layered(ids, mask)[name])
        old = plain.heads["cost"](pool(plain.hidden(ids, mask), mask, pooling))
        assert torch.equal(plain(ids, mask)["cost"], old)


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_same_scores_however_padded_alone_or_batched(family: str, pooling: str) -> None:
    model, sequences = model_on([0, 2, 1], "both", family, pooling), rows()
    with torch.no_grad():
        alone = [model(*with_responses([row], "right"))["moderation"] for row in sequences]
        expected = torch.cat(alone)
        assert expected.std() > 0.01
        for side in ("right", "left", "both"):
            for pad in (0, 2):  # 2 is the end-of-sequence token
                got = model(*with_responses(sequences, side, pad, extra=3))["moderation"]
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_spans_and_layers_stand_side_by_side() -> None:
    trunk = backbone().eval()
    batch = with_responses(rows(), "right")
    ids, mask, response = batch

    def pooled(layers: Any, span: str) -> torch.Tensor:
        return ScoreModel(trunk, HEADS, "mean", layers=layers, span=span).pooled(*batch)

    with torch.no_grad():
        states = trunk(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
        prompt = mask & ~response
        parts = [pool(states[layer], m, "mean") for layer in (2, 0) for m in (prompt, response)]
        torch.testing.assert_close(pooled([2, 0], "both"), torch.cat(parts, dim=1))
        torch.testing.assert_close(pooled([2], "prompt"), parts[0])
        torch.testing.assert_close(pooled([0], "response"), parts[3])
        torch.testing.assert_close(pooled(None, "both"), torch.cat(parts[:2], dim=1))
        n = mask.sum(1, keepdim=True)
        whole = (parts[0] * prompt.sum(1, keepdim=True) + parts[1] * response.sum(1, keepdim=True)) / n
        torch.testing.assert_close(pooled([2], "all"), whole)


@pytest.mark.parametrize("span", ["prompt", "response", "both"])
def test_an_empty_prompt_or_response_is_zeros_and_harms_nobody(span: str) -> None:
    model = model_on([1, 2], span).train()
    ids, mask, response = with_responses(rows(4), "right")
    response[1] = False
    response[2] = mask[2]
    mask[3] = False
    scores = model(ids, mask, response)["cost"]
    assert torch.isfinite(scores).all()
    torch.testing.assert_close(scores[3], model.heads["cost"].bias)
    scores.sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    pooled = model.pooled(ids, mask, response)
    if span == "prompt":
        assert not pooled[2].any() and pooled[1].any()
    if span == "response":
        assert not pooled[1].any() and pooled[2].any()


def test_parts_cannot_be_told_apart_without_their_mask() -> None:
    ids, mask = padded(rows(), "right")
    with pytest.raises(ValueError, match="response mask"):
        model_on([1], "response")(ids, mask)
    with pytest.raises(ValueError, match="unknown span"):
        model_on([1], "answer")


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_are_those_of_output_hidden_states(checkpointing: bool) -> None:
    ids, mask = padded(rows(), "right")

    def gradients(own: bool) -> dict[str, torch.Tensor]:
        model = model_on([1, 2], gradient_checkpointing=checkpointing and not own).train()
        if own:
            states = model.trunk(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
            pooled = torch.cat([pool(states[layer], mask, "mean") for layer in (1, 2)], dim=1)
            model.heads["cost"](pooled).square().sum().backward()
        else:
            model(ids, mask)["cost"].square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    expected, got = gradients(own=True), gradients(own=False)
    assert expected.keys() == got.keys() and len(got) > 10
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], atol=1e-5, rtol=1e-4)


def test_with_an_adapter_and_on_four_bits(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "base", lm_head=False)
    ids, mask = padded(rows(), "right")
    for quantization in (None, NF4):
        cfg = backbone_config(architecture=None, model=folder)
        trunk = add_lora(load_backbone(cfg, quantization=quantization, device="cpu"), lora_config())
        model = ScoreModel(trunk, HEADS, "mean", layers=[1, 2])
        stir(model)
        model.eval()
        with torch.no_grad():
            states = trunk(input_ids=ids, attention_mask=mask.long(), output_hidden_states=True).hidden_states
            pooled = torch.cat([pool(states[layer], mask, "mean") for layer in (1, 2)], dim=1)
            torch.testing.assert_close(model.pooled(ids, mask), pooled, atol=1e-5, rtol=1e-4)
            with adapter_disabled(trunk):
                assert not torch.allclose(model.pooled(ids, mask), pooled, atol=1e-3)


# ------------------------------------------------------------------------------------------------ export
def moderated(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model.eval()(*with_responses(rows(6), "right"))


@pytest.mark.parametrize("span", ["all", "both"])
def test_layers_and_span_are_exported(tmp_path: Path, span: str) -> None:
    model = model_on([2, 1], span)
    written = save(model, tmp_path / "export")
    assert (written.layers, written.span) == ([2, 1], span)
    loaded = load_export(str(tmp_path / "export"))
    assert (loaded.model.layers, loaded.model.span) == ((2, 1), span)
    assert_same(moderated(model), moderated(loaded.model))


def test_other_layers_are_another_model(tmp_path: Path) -> None:
    identities = {save(model_on(layers), tmp_path / "export").identity() for layers in (None, [2], [1], [1, 2])}
    assert len(identities) == 4
    spans = {save(model_on([1], span), tmp_path / "export").identity() for span in ("all", "prompt", "response")}
    assert len(spans) == 3


@pytest.mark.parametrize("quantization", [None, NF4])
def test_heads_on_an_unchanged_base_are_all_that_is_written(tmp_path: Path, quantization: Any) -> None:
    cfg = backbone_config(architecture=None, model=folder_of(tmp_path / "base", lm_head=False))
    trunk = load_backbone(cfg, quantization=quantization, device="cpu").requires_grad_(False)
    model = ScoreModel(trunk, HEADS, layers=[1], span="both")
    stir(model)
    written = save(model, tmp_path / "export", base_unchanged=True)
    assert written.weights == "base"
    assert [file.name for file in (tmp_path / "export").glob("*.safetensors")] == ["heads.safetensors"]
    loaded = load_export(str(tmp_path / "export"), device="cpu")
    assert_same(moderated(model), moderated(loaded.model))
    # a base that is another one, or gone
    weights = tmp_path / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-4] + b"\x00\x00\x00\x3f")
    with pytest.raises(UserError, match=r"the heads were trained on base \w{16}, but \w{16} was found"):
        load_export(str(tmp_path / "export"), device="cpu")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"base is gone.*train the heads again"):
        load_export(str(tmp_path / "export"), device="cpu")


def test_a_base_from_scratch_comes_along(tmp_path: Path) -> None:
    model = model_on([1, 2], "both")
    model.trunk.requires_grad_(False)
    save(model, tmp_path / "export", base_unchanged=True)
    loaded = load_export(str(tmp_path / "export"))
    assert_same(moderated(model), moderated(loaded.model))
    # its backbone can be trained on from there
    start = load_backbone(backbone_config(), init=str(tmp_path / "export"))
    for name, value in model.trunk.state_dict().items():
        torch.testing.assert_close(start.state_dict()[name], value)


def test_an_unchanged_base_was_frozen_and_has_heads(tmp_path: Path) -> None:
    for model in (backbone().requires_grad_(False), model_on([1])):
        with pytest.raises(ValueError, match="unchanged base"):
            save(model, tmp_path / "export", base_unchanged=True)
