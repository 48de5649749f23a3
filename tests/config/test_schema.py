"""The YAML files and the dataclasses hold the same keys, both ways."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any

import pytest
import yaml

from saferlhf.config import evaluate_schema, schema
from saferlhf.config.paths import conf_dir
from saferlhf.config.rollout_schema import JUDGES
from saferlhf.config.sweep_schema import SweepConfig
from saferlhf.config.task_schema import TASKS
from saferlhf.config.validate import DIFF_GROUPS, PLUGS, RUNNER_KEYS

CONF = conf_dir()
GROUPS = sorted({file.parent for file in CONF.rglob("*.yaml") if file.parent != CONF})
IN_SCHEMAS = {**vars(schema), **vars(evaluate_schema)}.values()
CLASSES = [c for c in IN_SCHEMAS if isinstance(c, type) and dataclasses.is_dataclass(c)]


def group_fields(cls: type) -> dict[str, type]:
    """Fields of a config that are config groups, with their dataclasses."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) in (list, dict):
            continue
        for kind in (hint, *typing.get_args(hint)):  # a group may be left out
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                found[name] = kind
    return found


def schema_of(group: str, option: str) -> type:
    """The dataclass of a group's option."""
    if group in PLUGS:
        return PLUGS[group][option]
    if group == "judge":
        return JUDGES[option]
    if group == "pipeline":
        return schema.PipelineConfig
    if group == "sweep":
        return SweepConfig
    level: dict[str, type] = {**group_fields(evaluate_schema.EvaluateConfig), **group_fields(schema.TrainConfig)}
    cls: type | None = None
    for part in group.split("/"):
        cls = level[part]
        level = group_fields(cls)
    assert cls is not None
    return cls


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text()) or {}


def in_defaults(content: dict[str, Any]) -> list[str]:
    """Fields that a file's defaults list fills: the group, or where it is put, as in `/data@baseline_data`."""
    entries = [entry for entry in content.get("defaults", []) if isinstance(entry, dict)]
    keys = [str(key) for entry in entries for key in entry if not str(key).startswith("override ")]
    return [key.rpartition("@")[2].lstrip("/").partition(".")[0] for key in keys]


def keys_of(group: str, option: str) -> set[str]:
    """Keys and groups of an option, those of the options that it builds on included."""
    content = read(CONF / group / f"{option}.yaml")
    bases = [entry for entry in content.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]
    own = {*content, *in_defaults(content)} - {"defaults"}
    return own.union(*(keys_of(group, base) for base in bases))


ONE_SCHEMA = ("optimizer", "strategy", "sweep")
"""Groups whose choices share a dataclass and show the keys that mean something for them; together they show all."""

OPTIONS = [
    (str(group.relative_to(CONF)), file.stem)
    for group in GROUPS
    for file in sorted(group.glob("*.yaml"))
    if group.relative_to(CONF).parts[0] not in DIFF_GROUPS
]


def test_there_are_groups() -> None:
    assert len(OPTIONS) > 20
    assert {group for group, _ in OPTIONS} >= {"task", "data", "data/policy", "backbone", "pipeline", "suite"}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_an_option_has_the_keys_of_its_schema(group: str, option: str) -> None:
    keys, fields = keys_of(group, option), {f.name for f in dataclasses.fields(schema_of(group, option))}
    if group in ONE_SCHEMA:
        fields &= keys | (fields - set().union(*(keys_of(group, name) for g, name in OPTIONS if g == group)))
    assert keys == fields


def test_choices_of_one_schema_differ_in_their_keys() -> None:
    """Else they need no exception."""
    for group in ONE_SCHEMA:
        assert len({frozenset(keys_of(group, name)) for g, name in OPTIONS if g == group}) > 1, group


NAMED = [(g, o) for g, o in OPTIONS if "name" in {f.name for f in dataclasses.fields(schema_of(g, o))}]


@pytest.mark.parametrize(("group", "option"), NAMED)
def test_an_option_is_named_as_its_file(group: str, option: str) -> None:
    # YAML reads a bare `on` as true
    assert read(CONF / group / f"{option}.yaml")["name"] == option


@pytest.mark.parametrize(
    ("command", "cls", "more"),
    [
        ("train", schema.TrainConfig, {*RUNNER_KEYS, *DIFF_GROUPS}),
        ("evaluate", evaluate_schema.EvaluateConfig, set()),
    ],
)
def test_a_command_has_the_keys_of_its_schema(command: str, cls: type, more: set[str]) -> None:
    content = read(CONF / f"{command}.yaml")
    chosen, own = set(in_defaults(content)), set(content) - {"defaults", "hydra"}
    assert chosen | own == {f.name for f in dataclasses.fields(cls)} | more
    assert chosen - more - {*PLUGS, "judge"} == set(group_fields(cls)) - set(PLUGS)
    assert not chosen & own


def test_every_folder_is_a_group_of_some_command() -> None:
    entries = [e for name in ("train", "evaluate") for e in read(CONF / f"{name}.yaml")["defaults"] if e != "_self_"]
    chosen = {str(key).partition("@")[0] for entry in entries for key in entry if not key.startswith("override ")}
    top = {str(group.relative_to(CONF)).partition("/")[0] for group in GROUPS}
    assert top <= chosen
    # `experiment` and `debug` may be without a file
    assert chosen - top <= set(DIFF_GROUPS)


def test_tasks_are_those_of_conf() -> None:
    assert set(TASKS) == {file.stem for file in (CONF / "task").glob("*.yaml")}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_metadata_is_one_of_the_marks(cls: type) -> None:
    assert cls.__doc__
    for field in dataclasses.fields(cls):
        known = ({}, schema.OUTSIDE_IDENTITY, schema.CONTENT, schema.IF_GIVEN)
        assert dict(field.metadata) in known, f"{cls.__name__}.{field.name}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
def test_defaults_are_not_shared(cls: type) -> None:
    """Two configs made from defaults do not share a list or mapping."""
    for field in dataclasses.fields(cls):
        if field.default_factory is not dataclasses.MISSING:
            assert field.default_factory() is not field.default_factory()
        assert not isinstance(field.default, list | dict)


def test_values_of_conf_are_those_of_the_dataclasses() -> None:
    """A config built in code means the same as one composed, where the option is the group's plain one."""
    plain = ["optimizer/adamw", "schedule/cosine", "adapter/lora", "data/policy/default", "tracking/mlflow"]
    plain += [
        "evaluation/default",
        "checkpoint/default",
        "trainer/default",
        "task/sft",
        "task/reward",
        "task/cost",
        "task/moderator",
        "task/ppo",
    ]
    for group, _, option in (name.rpartition("/") for name in plain):
        cls = schema_of(group, option)
        content = read(CONF / group / f"{option}.yaml")
        required = {name: content[name] for name in ("name", "_target_") if name in content}
        content.pop("defaults", None)
        assert dataclasses.asdict(cls(**required)) == content, group
