"""Score models of others, written here in their layouts, give the scores that their own formulas give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from role_models import PolicyRoleConfig, ScoreRoleConfig, build, critic, export, response_mask
from safetensors.torch import load_file, save_file
from tiny_models import backbone_config, folder_of, padded, rows, tokenizer

from saferlhf.errors import UserError
from saferlhf.models.loading import load_export

IDS, MASK = padded(rows(4), "right")


def beaver(folder: Path, kind: str = "cost", *, bias: bool = True, normalize: bool = False, shards: int = 1) -> Path:
    """A random Llama trunk with `score_head` and normaliser buffers, in the layout of the released models."""
    folder_of(folder, lm_head=False)
    trunk = load_file(folder / "model.safetensors")
    stream = torch.Generator().manual_seed(7)
    state = {f"model.{name.removeprefix('model.')}": value for name, value in trunk.items()}
    state["score_head.weight"] = torch.randn(1, 64, generator=stream)
    if bias:
        state["score_head.bias"] = torch.tensor([0.4])
    if normalize:
        state |= {"normalizer.mean": torch.tensor([1.5]), "normalizer.var": torch.tensor([4.0]),
                  "normalizer.count": torch.tensor(100)}  # fmt: skip
    (folder / "model.safetensors").unlink()
    if shards == 1:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        names = sorted(state)
        files = {name: f"model-{i % shards + 1:05d}-of-{shards:05d}.safetensors" for i, name in enumerate(names)}
        for file in set(files.values()):
            part = {n: state[n] for n in names if files[n] == file}
            save_file(part, folder / file, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    keys = {"score_type": kind, "score_dim": 1, "bias": bias, "do_normalize": normalize}
    change(folder, architectures=["LlamaModelForScore"], **keys)
    return folder


def change(folder: Path, **keys: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(keys)
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def last_states(folder: Path) -> torch.Tensor:
    """(S, H) by transformers alone, row by row without padding."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(str(folder), dtype=torch.float32).eval()
    with torch.no_grad():
        alone = [model(input_ids=ids[mask][None]).last_hidden_state[0, -1] for ids, mask in zip(IDS, MASK, strict=True)]
    return torch.stack(alone)


def scores(folder: Path) -> dict[str, torch.Tensor]:
    loaded = load_export(str(folder), require_heads=True)
    with torch.no_grad():
        return {name: value.squeeze(-1) for name, value in loaded.model(IDS, MASK).items()}


# ------------------------------------------------------------------------------------------------ score_head
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("kind", "normalize"), [("cost", False), ("cost", True), ("reward", True)])
def test_score_head_with_bias_and_normaliser(tmp_path: Path, kind: str, normalize: bool, shards: int) -> None:
    folder = beaver(tmp_path / "beaver", kind, normalize=normalize, shards=shards)
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(7))
    raw = (last_states(folder) @ weight.T + 0.4).squeeze(-1)
    expected = raw
    if normalize:  # mean 1.5, standard deviation 2; a cost's zero stays where it is
        expected = (raw - 1.5) / 2 if kind == "reward" else raw / 2
    found = scores(folder)
    assert list(found) == [kind]
    torch.testing.assert_close(found[kind], expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1
    if kind == "cost":
        assert torch.equal(found[kind] > 0, raw > 0)
    metadata = load_export(str(folder)).metadata
    assert (metadata.kind, metadata.template, metadata.heads) == (kind, "paper", {kind: 1})


def test_without_a_bias_only_where_none_is_promised(tmp_path: Path) -> None:
    folder = beaver(tmp_path / "beaver", bias=False)
    assert list(scores(folder)) == ["cost"]
    for key in ("bias", "score_bias"):
        change(folder, bias=None, score_bias=None)
        change(folder, **{key: True})
        with pytest.raises(UserError, match=r"score_head\.bias is missing"):
            scores(folder)


def test_what_is_missing_or_not_a_score_model_is_said(tmp_path: Path) -> None:
    folder = beaver(tmp_path / "beaver", normalize=False)
    change(folder, do_normalize=True)
    with pytest.raises(UserError, match=r"normalizer\.mean is missing"):
        scores(folder)
    change(folder, do_normalize=False, score_type="critic")
    with pytest.raises(UserError, match="score_type 'critic' scores no responses"):
        scores(folder)
    change(folder, score_type="cost")
    state = load_file(folder / "model.safetensors")
    state.pop("score_head.weight")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"score_head\.weight is missing"):
        scores(folder)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    folder = beaver(tmp_path / "beaver")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="pickled files can run code"):
        scores(folder)


# ------------------------------------------------------------------------------------------------ classifiers
def classifier(folder: Path, outputs: int, **keys: Any) -> Any:
    """A Llama classifier saved by transformers itself."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    folder_of(folder, lm_head=False)
    config = AutoConfig.from_pretrained(str(folder), num_labels=outputs, pad_token_id=0, **keys)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForSequenceClassification.from_config(config).eval()
        torch.nn.init.normal_(model.score.weight, std=0.5)
    (folder / "model.safetensors").unlink()
    model.save_pretrained(str(folder))
    return model


def outputs_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        alone = [model(input_ids=ids[mask][None]).logits[0] for ids, mask in zip(IDS, MASK, strict=True)]
    return torch.stack(alone)


def test_one_output_is_a_score(tmp_path: Path) -> None:
    model = classifier(tmp_path / "reward", 1)
    expected = outputs_of(model)[:, 0]
    assert expected.std() > 0.01
    torch.testing.assert_close(scores(tmp_path / "reward")["score"], expected, atol=1e-5, rtol=0)


def test_two_classes_score_by_their_log_odds(tmp_path: Path) -> None:
    model = classifier(tmp_path / "safety", 2, id2label={0: "safe", 1: "unsafe"}, label2id={"safe": 0, "unsafe": 1})
    probability = outputs_of(model).softmax(-1)[:, 1]
    found = scores(tmp_path / "safety")
    torch.testing.assert_close(found["unsafe"].sigmoid(), probability, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["safe"], -found["unsafe"])


def test_independent_labels_score_one_by_one_and_exclusive_classes_do_not(tmp_path: Path) -> None:
    model = classifier(tmp_path / "labels", 3, problem_type="multi_label_classification")
    found = scores(tmp_path / "labels")
    assert list(found) == ["LABEL_0", "LABEL_1", "LABEL_2"]
    torch.testing.assert_close(torch.stack(list(found.values()), 1), outputs_of(model), atol=1e-5, rtol=0)
    classifier(tmp_path / "classes", 3)
    with pytest.raises(UserError, match="log odds of one of 3 exclusive classes"):
        scores(tmp_path / "classes")


def test_heads_that_are_not_one_linear_map_are_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification, BertConfig

    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=64)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(str(tmp_path / "bert"))
    tokenizer().save_pretrained(str(tmp_path / "bert"))
    with pytest.raises(UserError, match="not one linear map on the last token"):
        scores(tmp_path / "bert")


# ------------------------------------------------------------------------------------------------ as roles
def test_beaver_models_play_reward_and_cost_and_start_critics(tmp_path: Path) -> None:
    sft = export(tmp_path / "sft", "sft", None, lora=False, template="paper")
    reward, cost = beaver(tmp_path / "r", "reward", normalize=True), beaver(tmp_path / "c", "cost", normalize=True)
    arguments: dict[str, Any] = {
        "actor": PolicyRoleConfig(sft),
        "reward": ScoreRoleConfig(str(reward)),
        "cost": ScoreRoleConfig(str(cost)),
    }
    roles = build("separate", roles=arguments, backbone=backbone_config(template="paper"))
    for name, folder in (("reward", reward), ("cost", cost)):
        found = roles.scores(name, IDS, MASK, response_mask(MASK))
        torch.testing.assert_close(found, scores(folder)[name], atol=1e-5, rtol=0)
        end = roles.values_and_end(f"{name}_critic", IDS, MASK)[1]
        torch.testing.assert_close(end.detach(), found, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="trained in the template 'paper'"):
        build("separate", roles=arguments)
    with pytest.raises(UserError, match="a whole model of its own"):
        build("shared", roles=arguments, backbone=backbone_config(template="paper"))
    with pytest.raises(UserError, match="a cost model in the place of a reward"):
        build("separate", roles={**arguments, "reward": ScoreRoleConfig(str(cost))})


def test_a_classifier_plays_the_cost_by_the_name_of_its_label(tmp_path: Path) -> None:
    sft = export(tmp_path / "sft", "sft", None, lora=False)
    classifier(tmp_path / "c", 2, id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1})
    arguments: dict[str, Any] = {"actor": PolicyRoleConfig(sft), "cost": ScoreRoleConfig(str(tmp_path / "c"))}
    with pytest.raises(UserError, match=r"several scores: good, bad .*roles\.cost\.head=good\|bad"):
        build("separate", roles=arguments, signals=("cost",))
    arguments["cost"] = ScoreRoleConfig(str(tmp_path / "c"), head="bad")
    roles = build("separate", roles={**arguments, "cost_critic": critic(sft)}, signals=("cost",))
    found = roles.scores("cost", IDS, MASK, response_mask(MASK))
    torch.testing.assert_close(found, scores(tmp_path / "c")["bad"], atol=1e-5, rtol=0)
