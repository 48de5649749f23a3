"""Keys of a moderator: defaults, and combinations that are refused before anything loads."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict

import pytest
import yaml
from command_lines import composed
from omegaconf import DictConfig, OmegaConf

from saferlhf.config.checks import check_config
from saferlhf.config.defaults import fill_defaults
from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ModeratorConfig
from saferlhf.config.validate import train_config
from saferlhf.errors import UserError
from saferlhf.models.moderator import LINKS
from saferlhf.ops.calibration import CATEGORY_OBJECTIVES, SEVERITY_OBJECTIVES, UNSAFE_OBJECTIVES, Objectives
from saferlhf.ops.moderation_losses import WEIGHTINGS


@pytest.fixture(scope="module")
def tree() -> DictConfig:
    """What Hydra composes; once, since it takes its time."""
    return composed("task=moderator")


def moderator(tree: DictConfig, *overrides: str) -> TrainConfig:
    """The checked config with some keys changed, values as YAML."""
    mine = deepcopy(tree)
    for override in overrides:
        key, _, value = override.partition("=")
        OmegaConf.update(mine, key, yaml.safe_load(value), force_add=True)
    config = fill_defaults(train_config(mine))
    check_config(config)
    return config


def test_the_group_and_the_class_have_the_same_values(tree: DictConfig) -> None:
    task = moderator(tree).task
    assert task == ModeratorConfig(name="moderator", _target_="saferlhf.tasks.moderator.ModeratorTask")


GOOD = [
    *(f"task.objectives.unsafe={name}" for name in (*UNSAFE_OBJECTIVES, "fpr@0.005", "fpr@0")),
    *(f"task.objectives.category={name}" for name in CATEGORY_OBJECTIVES),
    *(f"task.objectives.severity={name}" for name in SEVERITY_OBJECTIVES),
    *(f"task.category_weighting={name}" for name in WEIGHTINGS),
    *(f"task.severity_link={name}" for name in LINKS),
    "task.severity_weighting=balanced",
    "task.severity_weighting=[0,1,1,2.5]",
    "task.span=both",
    "task.layers=[0,1]",
    "task.input=prompt",
    "task.categories=[Drugs,Violence]",
]


@pytest.mark.parametrize("override", GOOD)
def test_what_the_maths_knows_is_allowed(override: str, tree: DictConfig) -> None:
    objectives = vars(moderator(tree, override).task.objectives)
    assert asdict(Objectives(**objectives)) == objectives


BAD: list[tuple[list[str], str]] = [
    (["task.objectives.unsafe=auroc"], "task.objectives.unsafe"),
    (["task.objectives.unsafe=fpr@1"], "task.objectives.unsafe"),
    (["task.objectives.unsafe=fpr@half"], "task.objectives.unsafe"),
    (["task.objectives.category=kappa"], "task.objectives.category"),
    (["task.objectives.severity=f1"], "task.objectives.severity"),
    (["task.category_weighting=log"], "task.category_weighting"),
    (["task.severity_weighting=sqrt"], "task.severity_weighting"),
    (["task.severity_weighting=[1,2,3]"], "task.severity_weighting"),
    (["task.severity_weighting=[1,2,3,-1]"], "task.severity_weighting"),
    (["task.severity_weighting=[0,0,0,0]"], "task.severity_weighting"),
    (["task.severity_link=probit"], "task.severity_link"),
    (["task.head_weights.unsafe=-1"], "task.head_weights"),
    (["task.head_weights={unsafe: 0, category: 0, severity: 0}"], "task.head_weights"),
    (["task.unsafe_weight=0"], "task.unsafe_weight"),
    (["task.categories=[]"], "task.categories"),
    (["task.categories=[a,a]"], "task.categories"),
    (["task.pooling=max"], "task.pooling"),
    (["task.span=answer"], "task.span"),
    (["task.input=prompt", "task.span=both"], "task.span"),
    (["task.input=response"], "task.input"),
]


@pytest.mark.parametrize(("overrides", "where"), BAD, ids=lambda value: str(value))
def test_what_cannot_work_is_refused(overrides: list[str], where: str, tree: DictConfig) -> None:
    with pytest.raises(UserError) as caught:
        moderator(tree, *overrides)
    assert caught.value.where == where and caught.value.mend


def test_a_misspelt_key_is_found(tree: DictConfig) -> None:
    with pytest.raises(UserError, match="unknown key 'unsave'") as caught:
        moderator(tree, "task.head_weights.unsave=2")
    assert "unsafe" in caught.value.mend
