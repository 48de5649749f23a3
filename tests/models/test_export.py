"""Saved and loaded, a model gives the same scores; whatever is missing or changed is said, never replaced."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import backbone, backbone_config, folder_of, lora_config, metadata, padded, rows, score_model, stir
from tiny_models import tokenizer as make_tokenizer

from saferlhf.config.schema import QuantizationConfig
from saferlhf.errors import UserError
from saferlhf.models.adapters import add_lora, trainable_parameters
from saferlhf.models.backbone import load_backbone
from saferlhf.models.export import save_export
from saferlhf.models.heads import build_heads
from saferlhf.models.loading import load_export
from saferlhf.models.metadata import HEADS_FILE, METADATA_FILE, SIGN_CONVENTION
from saferlhf.models.score_model import ScoreModel

IDS, MASK = padded(rows(6), "right", pad=0)


def scores(model: Any) -> dict[str, torch.Tensor]:
    model.eval()
    with torch.no_grad():
        return model(IDS, MASK)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], atol: float = 1e-5) -> None:
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].std() > 0.01, "scores that are all alike would prove nothing"
        torch.testing.assert_close(left[name], right[name], atol=atol, rtol=0)


def save(model: Any, folder: Path, **kwargs: Any) -> Any:
    return save_export(
        folder, model=model, tokenizer=make_tokenizer(), metadata=kwargs.pop("metadata", metadata()), **kwargs
    )


def pretrained_lora(folder: str, quantization: QuantizationConfig | None = None, **lora: Any) -> ScoreModel:
    trunk = load_backbone(backbone_config(), init=folder, quantization=quantization, pad_token_id=0, eos_token_id=2)
    model = ScoreModel(add_lora(trunk, lora_config(**lora)), {"cost": 1, "moderation": 3})
    stir(model)
    return model


# ------------------------------------------------------------------------------------------------ equal scores
@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "roberta"])
def test_full_model(tmp_path: Path, family: str, pooling: str) -> None:
    model = score_model(family, pooling=pooling)
    save(model, tmp_path / "export")
    loaded = load_export(str(tmp_path / "export"), require_heads=True)
    assert_same(scores(model), scores(loaded.model))
    assert loaded.model.pooling == pooling
    assert loaded.heads == {"cost": 1, "moderation": 3}
    assert loaded.metadata.weights == "full"
    assert not any(p.requires_grad for p in loaded.model.parameters())
    assert not loaded.model.training


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_lora_on_a_base_from_scratch_brings_its_base_along(tmp_path: Path, family: str, merge: bool) -> None:
    model = score_model(family, lora=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    written = save(model, tmp_path / "export", merge=merge)
    assert written.weights == ("merged" if merge else "adapter")
    assert (tmp_path / "export" / "base").is_dir() is not merge
    assert_same(scores(model), scores(load_export(str(tmp_path / "export")).model))
    after = dict(model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before), "saving must not touch the model"
    assert {name: p.requires_grad for name, p in after.items()} == flags


@pytest.mark.parametrize("merge", [False, True])
def test_lora_on_a_folder(tmp_path: Path, merge: bool) -> None:
    model = pretrained_lora(folder_of(tmp_path / "base"))
    save(model, tmp_path / "export", merge=merge)
    assert (tmp_path / "export" / "adapter_model.safetensors").is_file() is not merge
    assert_same(scores(model), scores(load_export(str(tmp_path / "export")).model))


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_nf4_with_lora(tmp_path: Path, compute_dtype: str) -> None:
    quantization = QuantizationConfig(name="nf4", compute_dtype=compute_dtype)
    model = pretrained_lora(folder_of(tmp_path / "base"), quantization)
    save(model, tmp_path / "export")
    loaded = load_export(str(tmp_path / "export"), device="cpu")
    assert loaded.metadata.quantization == {"name": "nf4", "double_quant": True, "compute_dtype": compute_dtype}
    assert_same(scores(model), scores(loaded.model))


def test_nf4_merged_is_exact_when_it_multiplied_in_float32(tmp_path: Path) -> None:
    model = pretrained_lora(folder_of(tmp_path / "base"), QuantizationConfig(name="nf4", compute_dtype="float32"))
    written = save(model, tmp_path / "export", merge=True)
    assert written.merge_exact is True
    loaded = load_export(str(tmp_path / "export"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert_same(scores(model), scores(loaded.model))


def test_nf4_merged_says_when_it_is_not_exact(tmp_path: Path) -> None:
    model = pretrained_lora(folder_of(tmp_path / "base"), QuantizationConfig(name="nf4", compute_dtype="bfloat16"))
    written = save(model, tmp_path / "export", merge=True)
    assert written.merge_exact is False
    assert json.loads((tmp_path / "export" / METADATA_FILE).read_text())["merge_exact"] is False
    assert_same(scores(model), scores(load_export(str(tmp_path / "export")).model), atol=0.05)


def test_nf4_gpt2_whose_layers_are_transposed_when_packed(tmp_path: Path) -> None:
    start = backbone("gpt2", lm_head=True)
    start.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    model = pretrained_lora(str(tmp_path / "base"), QuantizationConfig(name="nf4", compute_dtype="float32"))
    expected = scores(model)
    for merge in (False, True):
        save(model, tmp_path / "export", merge=merge)
        assert_same(expected, scores(load_export(str(tmp_path / "export"), device="cpu").model))


def test_causal_model_keeps_its_logits_and_writes_text(tmp_path: Path) -> None:
    model = backbone("llama", lm_head=True).eval()
    save(model, tmp_path / "sft", metadata=metadata("sft"))
    loaded = load_export(str(tmp_path / "sft"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(IDS).logits, model(IDS).logits)
    assert loaded.heads == {}
    assert loaded.tokenizer.pad_token_id == loaded.model.config.pad_token_id == 0
    assert loaded.model.generation_config.eos_token_id == 2
    out = loaded.model.generate(IDS[:1], attention_mask=MASK[:1].long(), max_new_tokens=3, do_sample=False)
    assert out.shape[0] == 1
    with pytest.raises(UserError, match="a sft model has no score heads"):
        load_export(str(tmp_path / "sft"), require_heads=True)


@pytest.mark.parametrize("merge", [False, True])
def test_causal_model_whose_embeddings_share_their_weights(tmp_path: Path, merge: bool) -> None:
    shape = {**(backbone_config().architecture or {}), "tie_word_embeddings": True}
    model = add_lora(backbone(architecture=shape, lm_head=True), lora_config()).eval()
    stir(model)
    save(model, tmp_path / "sft", metadata=metadata("sft"), merge=merge)
    loaded = load_export(str(tmp_path / "sft")).model
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits)
    started = load_backbone(backbone_config(), init=str(tmp_path / "sft"), lm_head=True, cache_dir=tmp_path / "cache")
    assert started.get_output_embeddings().weight is started.get_input_embeddings().weight
    with torch.no_grad():
        torch.testing.assert_close(started.eval()(IDS).logits, model(IDS).logits)


def test_exported_configuration_is_fit_for_use_elsewhere(tmp_path: Path) -> None:
    save(backbone("llama", lm_head=True), tmp_path / "sft", metadata=metadata("sft"))
    config = json.loads((tmp_path / "sft" / "config.json").read_text())
    assert config["use_cache"] is True
    assert config["pad_token_id"] == 0
    assert not config.get("_name_or_path")
    assert "quantization_config" not in config
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float32)
    assert AutoTokenizer.from_pretrained(tmp_path / "sft").chat_template


def test_no_path_of_this_machine_in_a_self_contained_export(tmp_path: Path) -> None:
    for lora in (False, True):
        save(score_model(lora=lora), tmp_path / "export")
        for file in (tmp_path / "export").rglob("*.json"):
            assert str(tmp_path) not in file.read_text(), file.name


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    (tmp_path / "ordinary").write_text("")
    expected = (tmp_path / "ordinary").stat().st_mode
    save(score_model(), tmp_path / "export")
    assert {file.stat().st_mode for file in (tmp_path / "export").iterdir()} == {expected}


# ------------------------------------------------------------------------------------------------ heads
def test_the_bias_survives(tmp_path: Path) -> None:
    model = score_model()
    model.heads["cost"].bias.data.fill_(1.25)
    save(model, tmp_path / "export")
    assert load_file(tmp_path / "export" / HEADS_FILE)["cost.bias"].tolist() == [1.25]
    assert load_export(str(tmp_path / "export")).model.heads["cost"].bias.item() == 1.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("cost.bias"), r"missing \['cost.bias'\]"),
        (lambda t: (t.pop("moderation.bias"), t.pop("moderation.weight")), r"missing \['moderation.bias', 'moderation"),
        (lambda t: t.update({"extra.weight": torch.zeros(1)}), r"surplus \['extra.weight'\]"),
        (lambda t: t.update({"cost.weight": torch.zeros(2, 64)}), r"head 'cost' has shapes \(2, 64\)"),
        (lambda t: t.update({"cost.weight": torch.zeros(1, 32)}), r"head 'cost' has shapes \(1, 32\)"),
        (lambda t: t["cost.bias"].fill_(float("nan")), "head 'cost' holds NaN"),
    ],
)
def test_wrong_heads_fail_loudly(tmp_path: Path, change: Any, message: str) -> None:
    save(score_model(), tmp_path / "export")
    tensors = load_file(tmp_path / "export" / HEADS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / "export" / HEADS_FILE)
    with pytest.raises(UserError, match=message):
        load_export(str(tmp_path / "export"))


def test_missing_or_damaged_heads_file_fails_loudly(tmp_path: Path) -> None:
    save(score_model(), tmp_path / "export")
    (tmp_path / "export" / HEADS_FILE).write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="is damaged"):
        load_export(str(tmp_path / "export"))
    (tmp_path / "export" / HEADS_FILE).unlink()
    with pytest.raises(UserError, match=r"heads\.safetensors is missing: cost, moderation would be random"):
        load_export(str(tmp_path / "export"))


# ------------------------------------------------------------------------------------------------ metadata, atomicity
def test_metadata_says_what_the_files_do_not(tmp_path: Path) -> None:
    given = replace(
        metadata(), template="paper", lineage=[{"role": "init", "content_id": "x"}], thresholds={"cost": 0.5}
    )
    save(score_model(lora=True, pooling="mean"), tmp_path / "export", metadata=given, card="# Card\n")
    stored = json.loads((tmp_path / "export" / METADATA_FILE).read_text())
    assert (stored["kind"], stored["template"], stored["pooling"]) == ("cost", "paper", "mean")
    assert stored["heads"] == {"cost": 1, "moderation": 3}
    assert stored["sign_convention"] == SIGN_CONVENTION
    assert stored["adapter"]["rank"] == 4
    assert stored["quantization"] is None
    assert stored["base"]["kind"] == "embedded"
    assert stored["max_length"] == 512
    assert stored["lineage"] == given.lineage
    assert (tmp_path / "export" / "README.md").read_text() == "# Card\n"
    assert load_export(str(tmp_path / "export")).metadata.thresholds == {"cost": 0.5}


def test_a_card_can_be_made_from_the_completed_metadata(tmp_path: Path) -> None:
    save(score_model(), tmp_path / "export", card=lambda complete: f"heads: {sorted(complete.heads)}")
    assert (tmp_path / "export" / "README.md").read_text() == "heads: ['cost', 'moderation']"


def test_a_failed_export_leaves_the_old_one_and_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = score_model()
    save(old, tmp_path / "export")
    expected = scores(old)
    from saferlhf.models import export

    monkeypatch.setattr(export, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(score_model(seed=9), tmp_path / "export")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]
    assert_same(expected, scores(load_export(str(tmp_path / "export")).model))


def test_an_older_export_is_replaced(tmp_path: Path) -> None:
    save(score_model(lora=True), tmp_path / "export")
    new = score_model("gpt2", seed=9)
    save(new, tmp_path / "export")
    assert not (tmp_path / "export" / "base").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]
    assert_same(scores(new), scores(load_export(str(tmp_path / "export")).model))


def test_a_four_bit_base_without_adapter_is_refused(tmp_path: Path) -> None:
    trunk = load_backbone(backbone_config(), init=folder_of(tmp_path / "base"), quantization=QuantizationConfig("nf4"))
    with pytest.raises(UserError, match="nothing trained to export"):
        save(ScoreModel(trunk, {"cost": 1}), tmp_path / "export")


def test_a_foreign_model_is_not_exported_without_knowing_its_base(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not loaded by load_backbone"):
        save(torch.nn.Linear(2, 2), tmp_path / "export", heads=build_heads(2, {"cost": 1}))


# ------------------------------------------------------------------------------------------------ the adapter's base
def test_a_changed_base_is_noticed(tmp_path: Path) -> None:
    base = Path(folder_of(tmp_path / "base"))
    save(pretrained_lora(str(base)), tmp_path / "export")
    state = load_file(base / "model.safetensors")
    state["model.norm.weight"] += 0.01
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"the adapter was trained on base \w{16}, but \w{16} was found"):
        load_export(str(tmp_path / "export"))
    shutil.rmtree(base)
    with pytest.raises(UserError, match=r"base is gone.*merge_on_export"):
        load_export(str(tmp_path / "export"))


def test_base_and_adapter_may_move_together(tmp_path: Path) -> None:
    (tmp_path / "outputs").mkdir()
    model = pretrained_lora(folder_of(tmp_path / "outputs" / "base"))
    save(model, tmp_path / "outputs" / "export")
    (tmp_path / "outputs").rename(tmp_path / "elsewhere")
    assert_same(scores(model), scores(load_export(str(tmp_path / "elsewhere" / "export")).model))


# -------------------------------------------------------------------------------------------- starting from an export
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_init_from_an_sft_export_merges_first(tmp_path: Path, lora: bool, quantized: bool) -> None:
    """SFT, then a reward model on top of it: the trunk starts as the SFT model's, adapter included."""
    base = folder_of(tmp_path / "base")
    sft = load_backbone(backbone_config(), init=base, lm_head=True, pad_token_id=0, eos_token_id=2)
    if lora:
        sft = add_lora(sft, lora_config())
    stir(sft)
    save(sft, tmp_path / "sft", metadata=metadata("sft"))
    with torch.no_grad():
        inner = sft.get_base_model() if lora else sft
        expected = inner.eval().model(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state
    quantization = QuantizationConfig("nf4", compute_dtype="float32") if quantized else None
    trunk = load_backbone(
        backbone_config(), init=str(tmp_path / "sft"), quantization=quantization, cache_dir=tmp_path / "cache"
    )
    assert all(module.training for module in trunk.modules())
    with torch.no_grad():
        got = trunk.eval()(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state
    error = (got - expected)[MASK].square().mean().sqrt() / expected[MASK].std()
    assert error < (0.5 if quantized else 1e-5)
    left = list((tmp_path / "cache").glob("merged-*"))
    assert left == []
    if quantized:
        return
    # and on from there: a reward adapter whose base is that export
    reward = ScoreModel(add_lora(trunk, lora_config()), {"reward": 1})
    stir(reward)
    save(reward, tmp_path / "reward", metadata=metadata("reward"))
    assert_same(scores(reward), scores(load_export(str(tmp_path / "reward"), cache_dir=tmp_path / "cache").model))


def test_an_export_can_be_merged_later(tmp_path: Path) -> None:
    model = pretrained_lora(folder_of(tmp_path / "base"))
    save(model, tmp_path / "adapter")
    loaded = load_export(str(tmp_path / "adapter"))
    save(loaded.model, tmp_path / "merged", merge=True)
    shutil.rmtree(tmp_path / "base")
    assert_same(scores(model), scores(load_export(str(tmp_path / "merged")).model))


def test_a_reward_export_cannot_become_a_policy(tmp_path: Path) -> None:
    save(score_model(), tmp_path / "export")
    with pytest.raises(UserError, match="a cost export has no language-model head"):
        load_backbone(backbone_config(), init=str(tmp_path / "export"), lm_head=True)
    trunk = load_backbone(backbone_config(), init=str(tmp_path / "export"))
    assert len(trainable_parameters(trunk)) == len(list(trunk.parameters()))


def test_a_plain_folder_is_loaded_as_a_policy(tmp_path: Path) -> None:
    loaded = load_export(folder_of(tmp_path / "model"))
    assert loaded.metadata.kind == "plain"
    assert loaded.model(IDS).logits.shape == (*IDS.shape, 64)
    with pytest.raises(UserError, match="has no score heads"):
        load_export(str(tmp_path / "model"), require_heads=True)
