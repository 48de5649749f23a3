"""LoRA adapters: what is trained, and switching that leaves gradients' flags alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES, backbone, lora_config, padded, rows, score_model, stir

from saferlhf.errors import UserError
from saferlhf.models.adapters import (
    adapter_disabled,
    add_lora,
    count_parameters,
    load_trainable_state_dict,
    trainable_parameters,
    trainable_state_dict,
    using_adapter,
)
from saferlhf.models.score_model import ScoreModel

IDS, MASK = padded(rows(3), "right")


def hidden(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=IDS, attention_mask=MASK.long()).last_hidden_state


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_fresh_adapter_changes_nothing_and_trains_nothing_but_itself(family: str) -> None:
    trunk = backbone(family).eval()
    with torch.no_grad():
        before = hidden(trunk)
        model = add_lora(trunk, lora_config())
        torch.testing.assert_close(hidden(model), before)
    assert not model.training, "the mode stays as it was"
    assert all(".lora_" in name for name in trainable_parameters(model))
    trained, frozen = count_parameters(model)
    assert 0 < trained < frozen


def test_counts_by_hand() -> None:
    trunk = backbone("llama")
    # embedding 64 x 64; per layer q and o 64 x 64, k and v 32 x 64, three MLP maps 64 x 128, two norms; one last norm
    weights = 64 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64) + 64
    assert count_parameters(trunk) == (weights, 0)
    # rank 4: r (in + out) per map
    lora = 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
    assert count_parameters(add_lora(trunk, lora_config())) == (lora, weights)


def test_all_linear_leaves_heads_and_language_model_head_alone() -> None:
    model = add_lora(backbone("llama", lm_head=True), lora_config())
    assert not any("lm_head" in name for name in trainable_parameters(model))
    scores = ScoreModel(add_lora(backbone("llama"), lora_config()), {"cost": 1})
    assert {name for name in trainable_parameters(scores) if ".lora_" not in name} == {
        "heads.cost.weight",
        "heads.cost.bias",
    }


def test_chosen_modules_seed_and_dropout() -> None:
    first = add_lora(backbone(), lora_config(target_modules=["q_proj", "v_proj"], dropout=0.5), seed=3)
    names = trainable_parameters(first)
    assert len(names) == 2 * 2 * 2
    torch.manual_seed(99)
    again = add_lora(backbone(), lora_config(target_modules=["q_proj", "v_proj"], dropout=0.5), seed=3)
    assert all(torch.equal(names[name], parameter) for name, parameter in trainable_parameters(again).items())
    stir(first)
    first.train()
    assert not torch.equal(hidden(first), hidden(first)), "dropout is on"
    with pytest.raises(UserError, match=r"adapter\.target_modules"):
        add_lora(backbone(), lora_config(target_modules=["nowhere"]))


def test_adapter_weights_are_float32_on_a_bfloat16_base() -> None:
    model = add_lora(backbone(dtype="bfloat16"), lora_config())
    assert {p.dtype for p in trainable_parameters(model).values()} == {torch.float32}


def two_adapters() -> torch.nn.Module:
    """An actor that is trained and a reference that is frozen, on one base."""
    model = add_lora(backbone().eval(), lora_config(), name="actor", seed=1)
    stir(model, seed=1)
    model = add_lora(model, lora_config(), name="reference", seed=2)
    for name, parameter in model.named_parameters():
        if ".reference." in name:
            with torch.no_grad():
                parameter.add_(0.05)
        parameter.requires_grad_(".actor." in name)
    return model.eval()


def test_switching_uses_the_named_adapter_and_restores_flags() -> None:
    model = two_adapters()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(flags.values())
    with torch.no_grad():
        actor = hidden(model)
        with using_adapter(model, "reference"):
            assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
            reference = hidden(model)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        with adapter_disabled(model):
            assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
            base = hidden(model)
            with using_adapter(model, "reference"):
                torch.testing.assert_close(hidden(model), reference)
            torch.testing.assert_close(hidden(model), base)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        torch.testing.assert_close(hidden(model), actor)
        torch.testing.assert_close(base, hidden(backbone().eval()))
    for left, right in ((actor, reference), (actor, base), (reference, base)):
        assert not torch.allclose(left, right, atol=1e-3)


def test_the_library_s_own_switch_does_change_flags() -> None:
    """Why `using_adapter` exists: were this to fail one day, it could become simpler."""
    model = two_adapters()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    model.set_adapter("reference")
    assert {name: p.requires_grad for name, p in model.named_parameters()} != flags


def test_flags_and_adapter_come_back_after_an_exception() -> None:
    model = two_adapters()
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    before = hidden(model).detach()
    with pytest.raises(ZeroDivisionError), using_adapter(model, "reference"):
        raise ZeroDivisionError
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    torch.testing.assert_close(hidden(model).detach(), before)


def test_gradients_flow_to_the_active_adapter_only() -> None:
    model = two_adapters()
    with torch.no_grad(), using_adapter(model, "reference"):
        hidden(model)
    hidden(model).square().mean().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None}
    assert touched == set(trainable_parameters(model))


def test_switching_off_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="no adapter to switch"), adapter_disabled(backbone()):
        pass
    with pytest.raises(ValueError, match="no adapter named 'critic'"), using_adapter(two_adapters(), "critic"):
        pass


@pytest.mark.parametrize("lora", [False, True])
def test_trained_weights_alone_bring_a_model_back(lora: bool) -> None:
    trained = score_model(lora=lora)
    fresh = ScoreModel(
        add_lora(backbone(), lora_config(), seed=5) if lora else backbone(seed=5), {"cost": 1, "moderation": 3}
    )
    state = copy.deepcopy(trainable_state_dict(trained))
    assert set(state) == set(trainable_parameters(fresh))
    load_trainable_state_dict(fresh, state)
    with torch.no_grad():
        torch.testing.assert_close(fresh.eval()(IDS, MASK), trained(IDS, MASK))
    with pytest.raises(KeyError, match="missing"):
        load_trainable_state_dict(fresh, {k: v for k, v in state.items() if k != "heads.cost.bias"})
    with pytest.raises(ValueError, match="shape"):
        load_trainable_state_dict(fresh, {**state, "heads.cost.bias": torch.zeros(2)})


def adapted_blocks(model: Any) -> set[int]:
    return {int(name.split(".layers.")[1].split(".")[0]) for name in trainable_parameters(model)}


def test_adapters_in_some_blocks_only() -> None:
    four = {"architecture": {**ARCHITECTURES["llama"], "num_hidden_layers": 4}}
    assert adapted_blocks(add_lora(backbone(**four), lora_config(blocks=[1, 3]))) == {1, 3}
    # nothing above the highest state that is read, which is the input of block 2
    assert adapted_blocks(add_lora(backbone(**four), lora_config(), read=2)) == {0, 1}
    names = trainable_parameters(add_lora(backbone(**four), lora_config(blocks=[2], target_modules=["q_proj"])))
    assert len(names) == 2 and all("layers.2.self_attn.q_proj" in name for name in names)


@pytest.mark.parametrize(
    ("changes", "read", "message"),
    [
        ({"blocks": [1, 2]}, 2, "block 2 is not read"),
        ({"blocks": [4]}, None, "block 4 is not read"),
        ({"blocks": [1], "target_modules": ".*q_proj"}, None, "by a pattern"),
        ({"blocks": [1], "target_modules": ["nowhere"]}, None, "fits no layer"),
    ],
)
def test_blocks_that_cannot_be_adapted(changes: Any, read: int | None, message: str) -> None:
    four = backbone(architecture={**ARCHITECTURES["llama"], "num_hidden_layers": 4})
    with pytest.raises(UserError, match=message):
        add_lora(four, lora_config(**changes), read=read)
