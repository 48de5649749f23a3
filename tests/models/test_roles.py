"""Roles: one interface over models of their own and adapters on one base; switching changes nothing else."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from role_models import (
    CRITICS,
    IDS,
    KINDS,
    MASK,
    POLICIES,
    RESPONSE,
    SCORES,
    Models,
    build,
    detached,
    export,
    flags,
    losses,
    on_one_base,
    outputs,
    response_mask,
    trained,
)
from tiny_models import backbone_config, lora_config, padded, rows, stir

from saferlhf.models.adapters import adapter_disabled
from saferlhf.models.loading import load_export
from saferlhf.models.roles import Roles


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return on_one_base(tmp_path_factory.mktemp("roles"))


@pytest.fixture(scope="module")
def built(models: Models) -> dict[str, Roles]:
    return {kind: build(kind, models) for kind in KINDS}


@pytest.fixture(params=KINDS)
def roles(request: pytest.FixtureRequest, built: dict[str, Roles]) -> Roles:
    """Fresh in each test."""
    return copy.deepcopy(built[request.param])


@pytest.fixture
def shared(built: dict[str, Roles]) -> Roles:
    return copy.deepcopy(built["shared"])


# ------------------------------------------------------------------------------------------------ what roles say
def test_names_shapes_and_dtypes(roles: Roles) -> None:
    assert roles.names == (*POLICIES, *SCORES, *CRITICS)
    found = outputs(roles)
    vocabulary = 64
    assert found["actor"].shape == found["reference"].shape == (*IDS.shape, vocabulary)
    assert found["actor"].requires_grad and not found["reference"].requires_grad
    for name in SCORES:
        assert found[name].shape == (len(IDS),)
        assert found[name].dtype == torch.float32
        assert not found[name].requires_grad
    for name in CRITICS:
        assert found[name].shape == IDS.shape
        assert found[name].dtype == torch.float32
        assert found[name].requires_grad
    with pytest.raises(KeyError, match="no role 'judge'"):
        roles.logits("judge", IDS, MASK)
    for name in ("actor", "cost_critic"):
        with pytest.raises(KeyError, match="gives no scores"):
            roles.scores(name, IDS, MASK, RESPONSE)
    for name in ("reference", "reward"):
        with pytest.raises(KeyError, match="is no critic"):
            roles.values(name, IDS, MASK)
    with pytest.raises(KeyError, match="no language model"):
        roles.logits("cost", IDS, MASK)


def test_roles_say_what_their_exports_say(roles: Roles, models: Models) -> None:
    """Against the models loaded one by one, as evaluation does."""
    found = detached(roles)
    with torch.no_grad():
        sft = load_export(models.sft).model(input_ids=IDS, attention_mask=MASK.long()).logits
        for name in POLICIES:
            torch.testing.assert_close(found[name][MASK], sft[MASK], atol=1e-5, rtol=0)
        for name, locator in (("reward", models.reward), ("cost", models.cost)):
            score = load_export(locator).model(IDS, MASK)[name].squeeze(-1)
            torch.testing.assert_close(found[name], score, atol=1e-5, rtol=0)
            end = roles.values_and_end(f"{name}_critic", IDS, MASK)[1]
            torch.testing.assert_close(end, score, atol=1e-5, rtol=0, msg="a critic starts from its score")
    assert (found["reward"] - found["cost"]).abs().max() > 0.05


def test_the_actor_is_the_reference_before_the_first_step(roles: Roles) -> None:
    found = detached(roles)
    assert torch.equal(found["actor"], found["reference"])


def test_padding_changes_nothing(roles: Roles) -> None:
    ids, mask = padded(rows(5), "left", extra=2)
    found = detached(roles)
    with torch.no_grad():
        torch.testing.assert_close(roles.logits("actor", ids, mask)[mask], found["actor"][MASK], atol=1e-5, rtol=0)
        torch.testing.assert_close(
            roles.scores("cost", ids, mask, response_mask(mask)), found["cost"], atol=1e-5, rtol=0
        )
        torch.testing.assert_close(
            roles.values("cost_critic", ids, mask)[mask], found["cost_critic"][MASK], atol=1e-5, rtol=0
        )
        empty = torch.zeros_like(MASK)
        empty[1:] = MASK[1:]
        assert torch.isfinite(roles.logits("actor", IDS, empty)).all()
        torch.testing.assert_close(roles.logits("actor", IDS, MASK, first=3), found["actor"][:, 3:], atol=1e-5, rtol=0)


@pytest.mark.parametrize("role", POLICIES)
def test_decoding_with_a_cache_gives_the_logits_of_the_whole_sequence(roles: Roles, role: str) -> None:
    stir(roles, scale=0.2)
    before, ids = flags(roles), IDS[:, :3]
    with roles.causal(role) as model:
        assert not any(module.training for module in model.modules())
        cache, steps = None, []
        for t in range(ids.shape[1]):
            output = model(input_ids=ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
        assert not output.logits.requires_grad
    assert flags(roles) == before
    whole = roles.logits(role, ids, torch.ones_like(ids, dtype=torch.bool))
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.detach(), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------------------ switching
@pytest.mark.parametrize("mode", [True, False])
def test_switching_leaves_gradients_and_modes_alone(roles: Roles, mode: bool) -> None:
    roles.train(mode)
    before = flags(roles)
    assert any(on for on, _ in before.values())
    for name in roles.names:
        with roles.using(name):
            assert {k: v[0] for k, v in flags(roles).items()} == {k: v[0] for k, v in before.items()}
            with roles.using("reference"), roles.using("actor"):
                pass
        assert flags(roles) == before
        with pytest.raises(ZeroDivisionError), roles.using(name):
            raise ZeroDivisionError
        assert flags(roles) == before
    outputs(roles)
    assert flags(roles) == before


def test_nested_use_comes_back_to_the_outer_role(shared: Roles) -> None:
    roles = shared
    stir(roles, 0.2)
    with torch.no_grad():
        actor, reference = roles.logits("actor", IDS, MASK), roles.logits("reference", IDS, MASK)
        assert not torch.allclose(actor, reference, atol=1e-3)
        with roles.using("actor"):
            assert torch.equal(roles.logits("reference", IDS, MASK), reference)
            inside = roles.role("actor").module(input_ids=IDS, attention_mask=MASK.long()).logits
            torch.testing.assert_close(inside[MASK], actor[MASK], atol=1e-5, rtol=0)


def test_each_role_learns_with_its_own_parameters_only(roles: Roles) -> None:
    learning = ("actor", *CRITICS)
    owned = {name: {id(p) for p in roles.trainable(name)} for name in roles.names}
    assert all(not owned[name] for name in roles.names if name not in learning)
    assert sum(len(owned[name]) for name in learning) == len(set().union(*owned.values()))
    assert set().union(*owned.values()) == {id(p) for p in roles.parameters() if p.requires_grad}
    for name in learning:
        roles.zero_grad()
        losses(roles)[name].backward()
        touched = {id(p) for p in roles.parameters() if p.grad is not None}
        assert touched == owned[name]
    assert [row["trained"] for row in roles.describe()] == [name in learning for name in roles.names]


def test_training_one_role_leaves_all_others_as_they_were(roles: Roles) -> None:
    before = detached(roles)
    optimizer = torch.optim.SGD(roles.trainable("cost_critic"), lr=0.1)
    losses(roles)["cost_critic"].backward()
    optimizer.step()
    after = detached(roles)
    for name in roles.names:
        assert torch.equal(after[name], before[name]) is (name != "cost_critic")


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_roles_never_drop_out(tmp_path: Path, kind: str) -> None:
    sft = export(tmp_path / "sft", "sft", None, lora=False)
    with_dropout = lora_config(dropout=0.5)
    score = [export(tmp_path / kind, kind, sft, adapter=with_dropout) for kind in SCORES]
    models = Models(sft, sft, *score)
    roles = build(kind, models, adapter=with_dropout)
    stir(roles, 0.3)
    assert not torch.equal(roles.logits("actor", IDS, MASK), roles.logits("actor", IDS, MASK)), "dropout is on"
    assert torch.equal(roles.logits("reference", IDS, MASK), roles.logits("reference", IDS, MASK))
    assert torch.equal(roles.scores("cost", IDS, MASK, RESPONSE), roles.scores("cost", IDS, MASK, RESPONSE))
    with roles.causal("actor") as model:
        again = [model(input_ids=IDS, attention_mask=MASK.long()).logits for _ in range(2)]
    assert torch.equal(*again)
    roles.eval()
    assert torch.equal(roles.logits("actor", IDS, MASK), roles.logits("actor", IDS, MASK))


def test_recomputed_activations_run_as_the_same_role(models: Models, shared: Roles) -> None:
    """Gradient checkpointing runs the forward again during backward: as another role it would be silently wrong."""
    plain = shared
    checkpointed = build("shared", models, backbone=backbone_config(gradient_checkpointing=True))
    expected = {}
    for name, loss in losses(plain).items():
        loss.backward()
        expected[name] = [p.grad.clone() for p in plain.trainable(name)]
    for name in ("actor", *CRITICS):
        loss = losses(checkpointed)[name]
        with pytest.raises(RuntimeError, match="call backward inside"):
            loss.backward()
        with pytest.raises(RuntimeError, match="call backward inside"), checkpointed.using("reference"):
            losses(checkpointed)[name].backward()
        checkpointed.zero_grad()
        with checkpointed.using(name):
            losses(checkpointed)[name].backward()
        for found, wanted in zip(checkpointed.trainable(name), expected[name], strict=True):
            torch.testing.assert_close(found.grad, wanted, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ state
def test_what_is_trained_brings_the_roles_back(roles: Roles) -> None:
    again = copy.deepcopy(roles)
    trained(roles)
    state = copy.deepcopy(roles.trained_state_dict())
    assert not torch.equal(detached(again)["actor"], detached(roles)["actor"])
    again.load_trained_state_dict(state)
    for name, value in detached(roles).items():
        assert torch.equal(detached(again)[name], value)
    assert any("reward_critic" in key for key in state)
    with pytest.raises(KeyError, match="missing"):
        again.load_trained_state_dict({k: v for k, v in state.items() if not k.endswith("bias")})
    full = roles.state_dict()
    assert len({v.data_ptr() for v in full.values() if v.numel()}) >= len(
        {k for k in full if "embed_tokens" not in k and "lm_head" not in k}
    ), "shared weights are saved once"


def test_one_base_is_held_once(built: dict[str, Roles]) -> None:
    shared, separate = built["shared"].weights(), built["separate"].weights()
    assert shared[0] == separate[0]
    assert shared[1] < 0.3 * separate[1]


def test_moving_the_roles_moves_the_views(shared: Roles) -> None:
    roles = shared.to(torch.float64)
    assert roles.role("cost").module.heads["cost"].weight.dtype == torch.float64
    assert roles.role("cost_critic").module.trunk.get_input_embeddings().weight.dtype == torch.float64


def test_the_sft_adapter_is_the_reference_not_the_bare_base(shared: Roles) -> None:
    roles = shared
    with torch.no_grad(), adapter_disabled(roles.role("actor").module):
        bare = roles.role("actor").module(input_ids=IDS, attention_mask=MASK.long()).logits
    assert (detached(roles)["reference"] - bare)[MASK].abs().max() > 1e-2
