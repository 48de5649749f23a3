"""What an online task needs of the other groups: who scores, and from where it starts."""

from __future__ import annotations

import functools
from copy import deepcopy
from typing import Any

import pytest
from command_lines import composed

from saferlhf.config.checks_online import check_online_run, signals_of
from saferlhf.config.identity import identity_tree
from saferlhf.config.rollout_schema import FunctionJudgeConfig, ModelJudgeConfig, scorers_config
from saferlhf.config.schema import TrainConfig
from saferlhf.config.validate import train_config
from saferlhf.errors import UserError

FUNCTION = {"kind": "function", "function": "mine:f"}


@functools.cache
def _base() -> TrainConfig:
    words = ["task=ppo_lag", "init=SFT", "roles.reward.model=R", "roles.cost.model=C", "rollout.max_new_tokens=32"]
    return train_config(composed(*words))


def changed(**keys: Any) -> TrainConfig:
    """The base with some keys changed; `__` for a dot."""
    config = deepcopy(_base())
    for name, value in keys.items():
        *parents, leaf = name.split("__")
        node: Any = config
        for parent in parents:
            node = getattr(node, parent)
        setattr(node, leaf, value)
    return config


def test_the_base_is_fine() -> None:
    check_online_run(_base())
    assert signals_of(_base()) == ("reward", "cost")


def test_costs_of_roles_and_of_scorers() -> None:
    config = changed(scorers=scorers_config({"privacy": FUNCTION}))
    check_online_run(config)
    assert signals_of(config) == ("reward", "cost", "privacy")


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        ({"roles__reward__model": None}, "nobody gives rewards"),
        ({"roles__cost__model": None}, "has no cost to constrain"),
        ({"init": None}, "random weights"),
        ({"rollout": None}, "needs it"),
        ({"scorers": {"reward": FUNCTION}}, "both a role and a scorer"),
        ({"scorers": {"actor": FUNCTION}}, "cannot be named 'actor'"),
        ({"scorers": {"privacy": {**FUNCTION, "scale": 0}}}, "times zero"),
        ({"scorers": {"truth": {"kind": "truth"}}, "data__source": "file"}, "toy world only"),
        ({"rollout__max_new_tokens": 128}, "do not fit"),
        ({"rollout__top_k": 50}, "cut-off distribution"),
        ({"task__epochs": 0}, "0 is too small"),
    ],
)
def test_what_cannot_work(keys: dict[str, Any], what: str) -> None:
    if isinstance(keys.get("scorers"), dict):
        keys = {**keys, "scorers": scorers_config(keys["scorers"])}
    with pytest.raises(UserError, match=what):
        check_online_run(changed(**keys))


def test_scorers_are_keys_of_judges_and_two_more() -> None:
    keys = {"reward": {**FUNCTION, "take": "good", "scale": -1}, "cost": {"kind": "model", "model": "M"}}
    found = scorers_config(keys)
    assert isinstance(found["reward"].judge, FunctionJudgeConfig) and isinstance(found["cost"].judge, ModelJudgeConfig)
    assert (found["reward"].take, found["reward"].scale, found["cost"].scale) == ("good", -1.0, 1.0)
    assert found["reward"].judge.name == "reward"
    for wrong in ("x", {"reward": "f"}, {"reward": {"kind": "nobody"}}, {"reward": {**FUNCTION, "scale": "x"}}):
        with pytest.raises(UserError):
            scorers_config(wrong)


def test_models_of_roles_and_scorers_enter_by_content_and_only_where_given() -> None:
    asked: dict[str, str] = {}
    config = changed(scorers=scorers_config({"privacy": {"kind": "model", "model": "M"}}))
    tree = identity_tree(config, lambda key, value: asked.setdefault(key, f"content of {value}"))
    assert asked["roles.reward.model"] == "content of R"
    assert tree["scorers"]["privacy"]["judge"]["model"] == asked["scorers.privacy.judge.model"] == "content of M"
    bare = identity_tree(changed(constraint=None, scorers=None), lambda key, value: value)
    assert "constraint" not in bare and "scorers" not in bare, "runs of other tasks keep their folders"
