"""What cannot play a role is refused, with one clear line, before anything heavy loads."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from role_models import (
    PLAIN,
    Models,
    PolicyRoleConfig,
    ScoreRoleConfig,
    build,
    config,
    critic,
    export,
    on_one_base,
    plan,
)
from tiny_models import NF4, WORDS, backbone_config, folder_of
from tiny_models import tokenizer as make_tokenizer

from saferlhf.config.paths import conf_dir
from saferlhf.config.roles_schema import RolesConfig, check_roles
from saferlhf.config.schema import QuantizationConfig
from saferlhf.config.validate import typed
from saferlhf.errors import UserError
from saferlhf.models import role_sources, roles_separate, roles_shared
from saferlhf.models.roles_build import build_roles, check_plan
from saferlhf.models.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return on_one_base(tmp_path_factory.mktemp("sources"))


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """No backbone may be loaded."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a backbone was loaded")

    monkeypatch.setattr(roles_shared, "load_backbone", refuse)
    monkeypatch.setattr(roles_separate, "load_backbone", refuse)
    monkeypatch.setattr(roles_separate, "load_export", refuse)


def refused(name: str, models: Models, match: str, roles: dict[str, Any] | None = None, **changes: Any) -> None:
    with pytest.raises(UserError, match=match) as caught:
        check_plan(plan(config(name, models, **(roles or {})), **changes))
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ configuration
@pytest.mark.parametrize("name", ["separate", "shared"])
def test_the_yaml_groups_are_the_schema_s_defaults(name: str) -> None:
    text = (conf_dir() / "roles" / f"{name}.yaml").read_text()
    group = typed(RolesConfig, yaml.safe_load(text), "roles")
    assert group == RolesConfig(name)
    check_roles(group)
    for line, above in zip(text.splitlines()[1:], text.splitlines(), strict=False):
        if ": " in line and not line.strip().startswith("#") and not line.startswith("name"):
            assert above.strip().startswith("#"), f"no comment above {line!r}"


def test_named_costs_in_yaml() -> None:
    tree = {"name": "shared", "costs": {"violence": {"model": "a"}}, "cost_critics": {"violence": {"model": "b"}}}
    group = typed(RolesConfig, tree, "roles")
    assert group.cost_names() == ("violence",)
    assert group.score("violence").model == "a"
    assert group.critic("violence").model == "b"
    with pytest.raises(UserError, match="roles"):
        typed(RolesConfig, {"name": "shared", "costs": {"violence": {"modell": "a"}}}, "roles")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"name": "together"}, r"'together' is not possible.*separate \| shared"),
        ({"cost": ScoreRoleConfig("a"), "costs": {"x": ScoreRoleConfig("b")}}, "exclude each other"),
        ({"costs": {"reward": ScoreRoleConfig("b")}}, "cannot be named 'reward'"),
        ({"costs": {"a.b": ScoreRoleConfig("b")}}, "cannot be named"),
        ({"costs": {"x_critic": ScoreRoleConfig("b")}}, "cannot be named"),
        ({"costs": {"x": ScoreRoleConfig()}}, r"has no model \(in roles\.costs\.x\.model\)"),
        ({"reward": ScoreRoleConfig("a", scale=0.0)}, "times zero"),
    ],
)
def test_impossible_configurations(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        check_roles(RolesConfig(**{"name": "separate", **changes}))


# ------------------------------------------------------------------------------------------------ who plays what
@pytest.mark.usefixtures("no_loading")
def test_a_sign_that_is_the_other_way_round(models: Models) -> None:
    refused("separate", models, "a cost model in the place of a reward", {"reward": ScoreRoleConfig(models.cost)})
    refused("separate", models, "a reward model in the place of a cost", {"cost": ScoreRoleConfig(models.reward)})
    turned = {"reward": ScoreRoleConfig(models.cost, head="cost", scale=-1.0)}
    assert plan(config("separate", models, **turned)).heads["reward"] == "cost"


@pytest.mark.usefixtures("no_loading")
def test_scores_that_are_not_there(models: Models, tmp_path: Path) -> None:
    no_head = {"cost": ScoreRoleConfig(models.cost, head="harm")}
    refused("separate", models, r"no single score 'harm' \(in roles\.cost\.head\); choose one of: cost", no_head)
    refused("separate", models, "gives no scores", {"cost": ScoreRoleConfig(models.sft)})
    refused("separate", models, "writes no text", {"actor": PolicyRoleConfig(models.reward)})
    two = export(tmp_path / "two", "cost", models.base, heads={"a": 1, "b": 1})
    refused("separate", models, r"several scores: a, b .*roles\.cost\.head=a\|b", {"cost": ScoreRoleConfig(two)})
    moderator = export(tmp_path / "moderator", "moderator", models.base, heads={"unsafe": 1, "category": 3})
    refused("separate", models, "none of them is a reward", {"reward": ScoreRoleConfig(moderator)})
    assert plan(config("separate", models, cost=ScoreRoleConfig(moderator))).heads["cost"] == "unsafe"


@pytest.mark.usefixtures("no_loading")
def test_a_critic_that_cannot_be_read_token_by_token(models: Models, tmp_path: Path) -> None:
    split = export(tmp_path / "split", "cost", models.base, span="both")
    what = r"a critic cannot start from this model: it pools the both \(in roles\.cost\.model\)"
    refused("separate", models, what, {"cost": ScoreRoleConfig(split)})
    plan(config("separate", models, cost=ScoreRoleConfig(split), cost_critic=critic(models.sft)))
    plan(config("separate", models, cost=ScoreRoleConfig(split)), critics=False)


@pytest.mark.usefixtures("no_loading")
def test_costs_that_nobody_uses_and_two_actors(models: Models) -> None:
    costs = {"cost": ScoreRoleConfig(), "costs": {"privacy": ScoreRoleConfig(models.cost)}}
    refused("separate", models, "'privacy' is not in use", costs, signals=("reward",))
    refused("separate", models, "init and roles.actor.model differ", init=models.base)
    assert plan(config("separate", models), init=models.sft).actor is not None
    found = plan(config("separate", models, actor=PolicyRoleConfig()), init=models.sft).actor
    assert found is not None
    assert found.where == "init"


@pytest.mark.usefixtures("no_loading")
def test_another_tokenizer_or_chat_format(models: Models, tmp_path: Path) -> None:
    other = load_tokenizer(backbone_config(), vocabulary=[*WORDS[1:], "other"])
    refused("separate", models, "its tokenizer is not the actor's: .* other ids", tokenizer=other)
    ends = make_tokenizer()
    ends.eos_token = "<user>"
    refused("separate", models, "ends responses with '<eos>', not with '<user>'", tokenizer=ends)
    pads = make_tokenizer()
    pads.pad_token = pads.eos_token
    plan(config("separate", models), tokenizer=pads)
    paper = export(tmp_path / "paper", "cost", models.base, template="paper")
    refused("separate", models, "trained in the template 'paper', the actor writes 'native'",
            {"cost": ScoreRoleConfig(paper)})  # fmt: skip


# ------------------------------------------------------------------------------------------------ one base
@pytest.mark.usefixtures("no_loading")
def test_shared_roles_need_adapters_on_the_same_base(models: Models, tmp_path: Path) -> None:
    refused("shared", models, "adapter=none.*use adapter=lora", adapter=PLAIN)
    whole = export(tmp_path / "whole", "reward", models.base, lora=False)
    refused("shared", models, r"a whole model of its own.* \(in roles\.reward\.model\)",
            {"reward": ScoreRoleConfig(whole)})  # fmt: skip
    merged = export(tmp_path / "merged", "cost", models.base, merge=True)
    refused("shared", models, "a whole model of its own", {"cost": ScoreRoleConfig(merged)})
    elsewhere = folder_of(tmp_path / "elsewhere", intermediate_size=96)
    other = export(tmp_path / "other", "cost", elsewhere)
    refused("shared", models, r"trained on another base .*\(in roles\.cost\.model\)", {"cost": ScoreRoleConfig(other)})
    on_sft = export(tmp_path / "on_sft", "reward", models.sft)
    refused("shared", models, "trained on another base", {"reward": ScoreRoleConfig(on_sft)})
    # a base that lies elsewhere under the same content is the same base
    shutil.copytree(models.base, tmp_path / "moved")
    same = export(tmp_path / "same", "cost", str(tmp_path / "moved"))
    check_plan(plan(config("shared", models, cost=ScoreRoleConfig(same))))


@pytest.mark.usefixtures("no_loading")
def test_shared_roles_need_the_same_storage(models: Models, tmp_path: Path) -> None:
    refused("shared", models, r"stored as none, this run stores it as nf4 .*use quantization=none", quantization=NF4)
    packed = export(tmp_path / "packed", "cost", models.base, quantization=NF4)
    refused("shared", models, r"stored as nf4 \(double_quant=true\), this run stores it as none",
            {"cost": ScoreRoleConfig(packed)})  # fmt: skip


def test_storage_is_how_not_with_what_it_multiplies() -> None:
    same = role_sources.same_quantization
    nf4 = {"name": "nf4", "double_quant": True, "compute_dtype": "bfloat16"}
    assert same(NF4, nf4)
    assert not same(NF4, {**nf4, "double_quant": False})
    assert not same(NF4, None)
    assert same(QuantizationConfig(name="none"), None)


def test_bases_that_came_with_the_exports_are_compared_by_their_weights(tmp_path: Path) -> None:
    """Adapters on random bases: the same architecture is not the same base."""
    sft = export(tmp_path / "sft", "sft", None, seed=4)
    same = export(tmp_path / "same", "cost", None, seed=4)
    other = export(tmp_path / "other", "cost", None, seed=5)
    roles = {"actor": PolicyRoleConfig(sft), "reward": ScoreRoleConfig()}
    check_plan(plan(RolesConfig("shared", **roles, cost=ScoreRoleConfig(same))))
    with pytest.raises(UserError, match="trained on another base"):
        build_roles(plan(RolesConfig("shared", **roles, cost=ScoreRoleConfig(other))))


def test_a_damaged_adapter_is_refused(models: Models, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(models.cost, tmp_path / "broken"))
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="the adapter cannot be read"):
        build("shared", models, roles={"cost": ScoreRoleConfig(str(broken))})
