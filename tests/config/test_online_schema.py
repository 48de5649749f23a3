"""Groups that run online: files and classes agree, keys of another choice and impossible values are refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from saferlhf.config.online_checks import check_advantage, check_constraint, check_online, check_ppo
from saferlhf.config.online_schema import ADVANTAGES, CONSTRAINTS, CriticConfig, KlConfig, PpoConfig
from saferlhf.config.paths import conf_dir
from saferlhf.config.validate import typed
from saferlhf.errors import UserError
from saferlhf.ops import advantages, shaping
from saferlhf.ops.constraint import build_constraint

GROUPS: dict[str, dict[str, Any]] = {"constraint": CONSTRAINTS, "advantage": ADVANTAGES}
CHECKS: dict[str, Any] = {"constraint": check_constraint, "advantage": check_advantage}
CHOICES = [(group, name) for group, choices in GROUPS.items() for name in choices]


def file_of(group: str, name: str) -> Path:
    return conf_dir() / group / f"{name}.yaml"


def group(kind: str, name: str, *overrides: str) -> Any:
    """The typed and checked group, with some keys changed as on a command line."""
    node = OmegaConf.merge(OmegaConf.load(file_of(kind, name)), OmegaConf.from_dotlist(list(overrides)))
    config = typed(GROUPS[kind][name], node, kind)
    CHECKS[kind](config)
    return config


def ppo(**keys: Any) -> PpoConfig:
    return PpoConfig(name="ppo", _target_="saferlhf.tasks.actor_critic.ActorCriticTask", **keys)


# ------------------------------------------------------------------------------------------------ files
@pytest.mark.parametrize("kind", GROUPS)
def test_every_choice_has_a_file_and_every_file_a_choice(kind: str) -> None:
    assert {file.stem for file in (conf_dir() / kind).glob("*.yaml")} == set(GROUPS[kind])


@pytest.mark.parametrize(("kind", "name"), CHOICES)
def test_file_and_class_have_the_same_values(kind: str, name: str) -> None:
    cls = GROUPS[kind][name]
    assert group(kind, name) == cls(name=name)
    # all keys are in the file: it is the table of contents of the choice
    assert set(OmegaConf.load(file_of(kind, name))) == {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize(("kind", "name"), CHOICES)
def test_a_comment_stands_above_every_key(kind: str, name: str) -> None:
    lines = file_of(kind, name).read_text().splitlines()
    for number, line in enumerate(lines):
        if line and not line.startswith("#"):
            assert lines[number - 1].startswith("#"), line


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_every_constraint_is_built_from_its_file(name: str) -> None:
    constraint = build_constraint(group("constraint", name), ["cost"])
    assert constraint.kind == name
    assert constraint.names == ("cost",)


def test_choices_are_those_that_the_formulas_know() -> None:
    assert set(ADVANTAGES) == {"gae", *advantages.GROUP_KINDS}
    for how in shaping.TRUNCATIONS:
        check_ppo(ppo(truncation=how))
    for kind in shaping.KL_ESTIMATORS:
        check_ppo(ppo(kl=KlConfig(estimator=kind)))


# ------------------------------------------------------------------------------------------------ keys
def test_a_number_for_each_cost() -> None:
    config = group("constraint", "lagrangian", "threshold={violence: -1, privacy: 0.5}", "lambda_lr=0.05")
    constraint = build_constraint(config, ["violence", "privacy"])
    assert constraint.threshold == {"violence": -1.0, "privacy": 0.5}


@pytest.mark.parametrize(
    ("kind", "name", "override", "message"),
    [
        ("constraint", "none", "lambda_lr=0.1", "unknown key 'lambda_lr'"),
        ("constraint", "fixed", "wieght=2", "did you mean 'weight'"),
        ("constraint", "lagrangian", "slack=0.1", "unknown key 'slack'"),
        ("constraint", "pid", "window=often", "not a whole number"),
        ("advantage", "rloo", "lam=0.9", "unknown key 'lam'"),
    ],
)
def test_a_key_of_another_choice_is_refused(kind: str, name: str, override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        group(kind, name, override)


# ------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize(
    ("kind", "name", "override", "where"),
    [
        ("constraint", "none", "threshold=high", "constraint.threshold"),
        ("constraint", "none", "threshold=.nan", "constraint.threshold"),
        ("constraint", "none", "history=1", "constraint.history"),
        ("constraint", "fixed", "weight=-1", "constraint.weight"),
        ("constraint", "fixed", "weight={a: 1, b: -1}", "constraint.weight.b"),
        ("constraint", "lagrangian", "rule=adam", "constraint.rule"),
        ("constraint", "lagrangian", "lambda_lr=0", "constraint.lambda_lr"),
        ("constraint", "lagrangian", "lambda_min=0", "constraint.lambda_min"),
        ("constraint", "lagrangian", "lambda_max=.inf", "constraint.lambda_max"),
        ("constraint", "lagrangian", "delay=-1", "constraint.delay"),
        ("constraint", "lagrangian", "window=0", "constraint.window"),
        ("constraint", "lagrangian", "max_step=0", "constraint.max_step"),
        ("constraint", "rectified", "slack=-0.1", "constraint.slack"),
        ("constraint", "pid", "smoothing=1", "constraint.smoothing"),
        ("constraint", "pid", "proportional=-1", "constraint.proportional"),
        ("constraint", "upper_bound", "bound=normal", "constraint.bound"),
        ("constraint", "upper_bound", "bound=hoeffding", "constraint.cost_range"),
        ("constraint", "upper_bound", "cost_range=[1,0]", "constraint.cost_range"),
        ("constraint", "upper_bound", "cost_range=[1]", "constraint.cost_range"),
        ("constraint", "upper_bound", "confidence=1", "constraint.confidence"),
        ("constraint", "upper_bound", "test_prompts=1", "constraint.test_prompts"),
        ("constraint", "upper_bound", "inflation=0", "constraint.inflation"),
        ("advantage", "gae", "gamma=1.1", "advantage.gamma"),
        ("advantage", "gae", "lam=-0.1", "advantage.lam"),
        ("advantage", "grpo", "whiten=yes", "advantage.whiten"),
    ],
)
def test_an_impossible_value_names_its_key(kind: str, name: str, override: str, where: str) -> None:
    with pytest.raises(UserError) as error:
        group(kind, name, override)
    assert error.value.where == where
    assert error.value.mend


def test_pid_without_any_gain() -> None:
    with pytest.raises(UserError, match="lambda never moves"):
        group("constraint", "pid", "proportional=0", "integral=0", "derivative=0")


def test_bounded_costs() -> None:
    assert group("constraint", "upper_bound", "bound=bernstein", "cost_range=[0,1]").cost_range == [0.0, 1.0]


@pytest.mark.parametrize(
    ("keys", "where"),
    [
        ({"epochs": 0}, "task.epochs"),
        ({"mini_batches": 0}, "task.mini_batches"),
        ({"clip_ratio": 1.0}, "task.clip_ratio"),
        ({"clip_ratio_high": 0.0}, "task.clip_ratio_high"),
        ({"dual_clip": 1.0}, "task.dual_clip"),
        ({"clip_value": -5.0}, "task.clip_value"),
        ({"clip_score": float("nan")}, "task.clip_score"),
        ({"loss_mean": "batch"}, "task.loss_mean"),
        ({"entropy_coefficient": -0.1}, "task.entropy_coefficient"),
        ({"truncation": "ignore"}, "task.truncation"),
        ({"truncation_penalty": -1.0}, "task.truncation_penalty"),
        ({"stop_kl": 0.0}, "task.stop_kl"),
        ({"ptx_batch_size": 0}, "task.ptx_batch_size"),
        ({"kl": KlConfig(coefficient=-0.1)}, "task.kl.coefficient"),
        ({"kl": KlConfig(enters="both")}, "task.kl.enters"),
        ({"kl": KlConfig(enters="loss")}, "task.kl.estimator"),
        ({"kl": KlConfig(coefficient=0.0, target=6.0)}, "task.kl.coefficient"),
        ({"kl": KlConfig(target=0.0)}, "task.kl.target"),
        ({"critic": CriticConfig(lr=0.0)}, "task.critic.lr"),
        ({"critic": CriticConfig(schedule="step")}, "task.critic.schedule"),
        ({"critic": CriticConfig(warmup_rollouts=-1)}, "task.critic.warmup_rollouts"),
    ],
)
def test_an_impossible_step_names_its_key(keys: dict[str, Any], where: str) -> None:
    check_ppo(ppo())
    with pytest.raises(UserError) as error:
        check_ppo(ppo(**keys))
    assert error.value.where == where
    assert error.value.mend


def test_without_a_critic_nothing_can_be_bootstrapped_or_warmed_up() -> None:
    gae, rloo, none = group("advantage", "gae"), group("advantage", "rloo"), group("constraint", "none")
    check_online(ppo(truncation="bootstrap", critic=CriticConfig(warmup_rollouts=2)), gae, none, samples=1)
    check_online(ppo(), rloo, none, samples=4)
    with pytest.raises(UserError, match="no critic to bootstrap"):
        check_online(ppo(truncation="bootstrap"), rloo, none, samples=4)
    with pytest.raises(UserError, match="no critic to warm up"):
        check_online(ppo(critic=CriticConfig(warmup_rollouts=2)), rloo, none, samples=4)
    with pytest.raises(UserError, match="two or more"):
        check_online(ppo(), rloo, none, samples=1)


def test_the_step_of_ppo_merges_like_any_task() -> None:
    tree = {"name": "ppo", "_target_": "saferlhf.x", "clip_ratio": 0.1, "kl": {"target": 6}, "critic": {"lr": 1e-4}}
    config = typed(PpoConfig, tree, "task")
    assert (config.clip_ratio, config.kl.target, config.kl.coefficient, config.critic.lr) == (0.1, 6.0, 0.02, 1e-4)
    with pytest.raises(UserError, match="unknown key 'targett'"):
        typed(PpoConfig, {**tree, "kl": {"targett": 6}}, "task")
