"""Roles that share one base say and learn the same as roles with models of their own, wherever they start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from role_models import (
    CRITICS,
    IDS,
    KINDS,
    MASK,
    PLAIN,
    POLICIES,
    RESPONSE,
    Models,
    ScoreRoleConfig,
    assert_same,
    build,
    critic,
    detached,
    export,
    on_one_base,
    on_sft,
    trained,
)
from tiny_models import ARCHITECTURES, lora_config

from saferlhf.models.loading import load_export
from saferlhf.models.roles import Roles


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return on_one_base(tmp_path_factory.mktemp("roles"))


def compare_training(one: Roles, other: Roles, atol: float = 1e-5) -> None:
    one.eval(), other.eval()  # GPT-2 drops out
    assert_same(detached(one), detached(other), atol)
    left, right = trained(one), trained(other)
    for name in left:
        assert len(left[name]) == len(right[name]) > 0
        for a, b in zip(left[name], right[name], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
        assert sum(float(g.abs().sum()) for g in left[name]) > 0
    after = detached(one)
    assert_same(after, detached(other), 1e-4)
    assert (after["actor"] - after["reference"]).abs().max() > 1e-3, "training changed the actor and not the reference"


def test_shared_and_separate_agree_in_numbers_gradients_and_training(models: Models) -> None:
    compare_training(build("separate", models), build("shared", models))


@pytest.mark.parametrize("lora", [True, False], ids=["sft-adapter", "sft-whole"])
def test_they_agree_on_a_base_that_is_the_sft_model(tmp_path: Path, lora: bool) -> None:
    models = on_sft(tmp_path, lora)
    shared = build("shared", models)
    assert [row["adapter"] for row in shared.describe()][:2] == ["actor", None]
    separate = build("separate", models)
    if lora:  # there the actor goes on with the SFT adapter: the same policy, but another way to change it
        assert_same(detached(separate), detached(shared), 2e-5)
        one, other = trained(separate, 1), trained(shared, 1)
        for name in CRITICS:
            torch.testing.assert_close(one[name], other[name], atol=1e-4, rtol=1e-3)
    else:
        compare_training(separate, shared, atol=2e-5)
        for roles in (separate, shared):  # the reference is the actor without its adapter: inside it, actors are whole
            with torch.no_grad():
                outside = roles.logits("actor", IDS, MASK)
                with roles.using("reference"):
                    assert torch.equal(roles.logits("actor", IDS, MASK), outside)
                    assert not torch.allclose(roles.logits("reference", IDS, MASK), outside, atol=1e-3)


@pytest.mark.parametrize(
    ("layers", "pooling"), [([1], "last"), ([0, 1], "mean"), pytest.param([2, 1], "last", marks=pytest.mark.slow)]
)
def test_they_agree_where_scores_are_read_from_chosen_layers(tmp_path: Path, layers: list[int], pooling: str) -> None:
    models = on_one_base(tmp_path, layers=layers, pooling=pooling)
    compare_training(build("separate", models), build("shared", models))


@pytest.mark.slow
def test_they_agree_on_another_architecture(tmp_path: Path) -> None:
    """GPT-2: transposed weights, learned positions, another name for the trunk; the base comes with the exports."""

    def export_of(kind: str, seed: int) -> str:
        folder = tmp_path / kind
        return export(folder, kind, base, seed=seed, adapter=lora_config(), architecture=None)

    base = export(tmp_path / "whole", "sft", None, lora=False, architecture=dict(ARCHITECTURES["gpt2"]))
    models = Models(base, export_of("sft", 1), export_of("reward", 2), export_of("cost", 3))
    separate, shared = (build(kind, models, adapter=lora_config()) for kind in KINDS)
    compare_training(separate, shared, atol=2e-5)


def test_fresh_critics_agree_where_scores_come_from_a_scorer(models: Models) -> None:
    """No reward or cost model: critics start from the actor's weights with fresh heads."""
    changes: dict[str, Any] = {"roles": {"reward": ScoreRoleConfig(), "cost": ScoreRoleConfig()}}
    separate, shared = build("separate", models, **changes), build("shared", models, **changes)
    assert shared.names == separate.names == (*POLICIES, *CRITICS)
    assert_same(detached(separate), detached(shared), 2e-5)
    assert (detached(shared)["reward_critic"] - detached(shared)["cost_critic"]).abs().max() > 1e-3


def test_all_weights_without_adapters(models: Models, tmp_path: Path) -> None:
    """roles=separate adapter=none: whole models, adapters merged."""
    roles = build("separate", models, adapter=PLAIN)
    assert_same(detached(roles), detached(build("separate", models)), 2e-5)
    found = detached(roles)
    assert torch.equal(found["actor"], found["reference"])
    trained(roles, steps=1)
    assert sum(p.numel() for p in roles.trainable("actor")) > 40_000
    assert not torch.equal(detached(roles)["actor"], found["actor"])
    assert torch.equal(detached(roles)["reference"], found["reference"])


# ------------------------------------------------------------------------------------------------ where roles start
def test_a_critic_may_start_elsewhere(models: Models) -> None:
    roles = build("shared", models, roles={"cost_critic": critic(models.reward, "reward")})
    found = detached(roles)
    assert torch.equal(found["cost_critic"], found["reward_critic"])
    roles = build("shared", models, roles={"cost_critic": critic(models.sft)})
    assert (detached(roles)["cost_critic"] - found["cost_critic"]).abs().max() > 1e-3


def test_a_scale_turns_score_and_critic(models: Models) -> None:
    for kind in KINDS:
        plain = detached(build(kind, models))
        turned = detached(build(kind, models, roles={"cost": ScoreRoleConfig(models.cost, scale=-2.0)}))
        torch.testing.assert_close(turned["cost"], -2 * plain["cost"])
        torch.testing.assert_close(turned["cost_critic"], -2 * plain["cost_critic"])
        torch.testing.assert_close(turned["reward_critic"], plain["reward_critic"])


def test_several_named_costs_and_a_moderator_as_one(models: Models, tmp_path: Path) -> None:
    heads = {"unsafe": 1, "category": 3}
    moderator = export(tmp_path / "moderator", "moderator", models.base, heads=heads, pooling="mean", seed=7)
    costs = {"violence": ScoreRoleConfig(models.cost), "privacy": ScoreRoleConfig(moderator)}
    found = {}
    for kind in KINDS:
        roles = build(
            kind, models, roles={"cost": ScoreRoleConfig(), "costs": costs}, signals=("reward", "violence", "privacy")
        )
        assert roles.names == (
            "actor", "reference", "reward", "violence", "privacy",
            "reward_critic", "violence_critic", "privacy_critic",
        )  # fmt: skip
        with torch.no_grad():
            found[kind] = {n: roles.scores(n, IDS, MASK, RESPONSE) for n in ("violence", "privacy")}
            found[kind]["end"] = roles.values_and_end("privacy_critic", IDS, MASK)[1]
    assert_same(found["shared"], found["separate"])
    with torch.no_grad():
        verdict = load_export(moderator).model(IDS, MASK)["unsafe"].squeeze(-1)
    torch.testing.assert_close(found["shared"]["privacy"], verdict, atol=1e-5, rtol=0)
    torch.testing.assert_close(found["shared"]["end"], verdict, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_without_critics(models: Models, kind: str) -> None:
    roles = build(kind, models, critics=False, signals=("reward",))
    assert roles.names == ("actor", "reference", "reward")
    assert [row["role"] for row in roles.describe() if row["trained"]] == ["actor"]
