"""From what Hydra composed to typed dataclasses, refusing what no schema knows.

Hydra's own struct check is by-passed by `+key=value`; here the composed tree is merged into the structured schemas of
`schema.py`, so that every unknown key, wrong type and unset value is one `UserError` with a suggestion.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import typing
from collections.abc import Iterator
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from saferlhf.config import evaluate_schema, schema
from saferlhf.config.online_schema import ADVANTAGES, CONSTRAINTS
from saferlhf.config.roles_schema import RolesConfig
from saferlhf.config.rollout_schema import RolloutConfig, scorers_config
from saferlhf.config.sweep_schema import SweepConfig, check_sweep
from saferlhf.config.task_schema import TASKS
from saferlhf.errors import UserError

Schema = TypeVar("Schema")

RUNNER_KEYS = ("pipeline", "sweep")
"""Top-level keys that steer the runner and belong to no single run."""

DIFF_GROUPS = ("experiment", "debug")
"""Groups of train.yaml that change other groups and leave no key of their own."""

PLUGS: dict[str, dict[str, type]] = {
    "task": dict(TASKS),
    "constraint": dict(CONSTRAINTS),
    "advantage": dict(ADVANTAGES),
    "roles": {"separate": RolesConfig, "shared": RolesConfig},
    "rollout": {"native": RolloutConfig, "vllm": RolloutConfig},
}
"""Groups of train.yaml that are null by default, or whose keys depend on the choice: group -> name -> dataclass."""

TROUBLE = (
    (r"Value '(.*)' of type '.*' could not be converted to Integer", "{0!r} is not a whole number"),
    (r"Value '(.*)' of type '.*' could not be converted to Float", "{0!r} is not a number"),
    (r"Value '(.*)' is not a valid bool.*", "{0!r} is neither true nor false"),
    (r"Incompatible value 'None' for field of type '.*'", "null is not possible"),
    (r"Cannot (?:convert|assign) .*(?:String|str\b.*string).*", "not a text"),
    (r"Invalid value assigned: .* is not a ListConfig, list or tuple.*", "not a list; write [a,b]"),
    (r"Cannot assign .* to Dict.*", "not a mapping; write {{key: value}}"),
    (r"Merge error: .* is not a subclass of .*\. value: (.*)", "{0!r} is not a mapping of keys"),
)
"""What OmegaConf says of a wrong type, and how we say it."""


def typed(cls: type[Schema], node: Any, where: str) -> Schema:
    """Check a config node against a dataclass and convert it.

    Args:
        cls: the schema.
        node: a DictConfig or dict.
        where: dotted path of the node, for messages.

    Raises:
        UserError: unknown key, wrong type, or a value that must be given.
    """
    try:
        # of the node too: merged into a schema, a `???` becomes the field's default
        missing = OmegaConf.missing_keys(node) if OmegaConf.is_config(node) else set(_holes(node))
        merged = OmegaConf.merge(OmegaConf.structured(cls), node)
        missing |= OmegaConf.missing_keys(merged)
        if missing:
            key = _join(where, sorted(missing)[0])
            raise UserError("a value is missing", key, f"give it on the command line: {key}=VALUE")
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except ConfigKeyError as error:
        raise _unknown_key(cls, where, error) from None
    except ValidationError as error:
        key = _join(where, error.full_key)
        raise UserError(in_plain_words(_first_line(error)), key, "see the comment above this key in conf/") from None
    except OmegaConfBaseException as error:
        raise UserError(_first_line(error), where) from None


def _holes(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted keys of the values that must be given in a plain tree."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _holes(value, _join(prefix, key))
    elif node == "???":
        yield prefix


def train_config(composed: DictConfig) -> schema.TrainConfig:
    """The typed configuration of one run.

    Raises:
        UserError: see `typed`; also when no task or an unknown one is named.
    """
    tree = OmegaConf.to_container(composed, resolve=True)
    assert isinstance(tree, dict)
    for key in RUNNER_KEYS:
        tree.pop(key, None)
    task = tree.pop("task", None)
    if not isinstance(task, dict) or "name" not in task:
        raise UserError("no task is named", "task", f"choose one: task={'|'.join(TASKS)}")
    chosen = {"task": task, **{group: tree.pop(group, None) for group in PLUGS if group != "task"}}
    scorers = tree.pop("scorers", None)
    plugs = {group: _chosen(group, node) for group, node in chosen.items() if node is not None}
    # validated one level down, so that messages carry the group's name
    groups = _groups_of(schema.TrainConfig)
    for name, node in [(str(key), value) for key, value in tree.items()]:
        cls = groups.get(name)
        if cls is not None:
            tree[name] = typed(cls, node if node is not None else {}, name)
    config = typed(schema.TrainConfig, {**tree, "task": None}, "")
    for group, plug in plugs.items():
        setattr(config, group, plug)
    config.scorers = None if not scorers else scorers_config(scorers)
    config.data = _settled(config.data)
    return config


def _chosen(group: str, node: Any) -> Any:
    """A group whose dataclass is chosen by its `name`."""
    choices = PLUGS[group]
    name = str(node.get("name")) if isinstance(node, dict) else str(node)
    if name not in choices:
        # a choice of that name would be in the place of its keys
        raise UserError(f"unknown {group} '{name}'", f"{group}.name", suggestion(name, choices))
    return typed(choices[name], node, group)


def evaluate_config(composed: DictConfig) -> evaluate_schema.EvaluateConfig:
    """The typed configuration of `evaluate.py`."""
    tree = OmegaConf.to_container(composed, resolve=True)
    config = typed(evaluate_schema.EvaluateConfig, tree, "")
    config.data = _settled(config.data)
    return config


def _settled(data: schema.DataConfig) -> schema.DataConfig:
    from saferlhf.config.data_parts import settled  # which itself needs `typed`

    return settled(data)


def pipeline_config(node: Any) -> schema.PipelineConfig:
    """The typed `pipeline` group."""
    return typed(schema.PipelineConfig, node, "pipeline")


def sweep_config(node: Any) -> SweepConfig:
    """The typed and checked `sweep` group."""
    config = typed(SweepConfig, node, "sweep")
    check_sweep(config)
    return config


def suggestion(word: str, known: Any) -> str:
    """`did you mean 'x'?` with the nearest known words, or the list of all when none is near."""
    names = [str(name) for name in known]
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.5)
    if near:
        # much nearer than the others: only that one
        best = difflib.SequenceMatcher(a=near[0], b=word).ratio()
        near = [name for name in near if difflib.SequenceMatcher(a=name, b=word).ratio() > best - 0.15]
        return "did you mean " + " or ".join(f"'{name}'" for name in near) + "?"
    return "known: " + ", ".join(names)


@functools.cache
def _groups_of(cls: type) -> dict[str, type | None]:
    """Field -> the dataclass it holds, None for a plain value; wherever these dataclasses are written."""
    kinds = {f.name: typing.get_type_hints(cls)[f.name] for f in dataclasses.fields(cls)}
    return {
        name: kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None
        for name, kind in kinds.items()
    }


def known_keys(dotted: str, root: type = schema.TrainConfig) -> list[str]:
    """The keys that stand beside the last part of a dotted key, by the schema; empty when its parents are unknown."""
    parents = dotted.split(".")[:-1]
    if parents[:-1] == ["pipeline", "definitions"]:
        return sorted(f.name for f in dataclasses.fields(schema.StageConfig))
    level: list[type] = [root]
    for part in parents:
        level = [cls for parent in level for cls in _schemas_of(parent, part)]
    names = {f.name for cls in level for f in dataclasses.fields(cls)}
    return sorted(names.union(RUNNER_KEYS, DIFF_GROUPS) if level == [schema.TrainConfig] else names)


def in_plain_words(text: str) -> str:
    """OmegaConf's complaint about a type in words of ours; unchanged if it is none of the known ones."""
    for pattern, words in TROUBLE:
        if match := re.match(pattern, text):
            return words.format(*match.groups())
    return text


def _schemas_of(parent: type, name: str) -> list[type]:
    if parent is schema.TrainConfig and name in PLUGS:
        return list(dict.fromkeys(PLUGS[name].values()))
    if parent is schema.TrainConfig and name == "pipeline":
        return [schema.PipelineConfig]
    if parent is schema.TrainConfig and name == "sweep":
        return [SweepConfig]
    found = _groups_of(parent).get(name)
    return [] if found is None else [found]


def _unknown_key(cls: type, where: str, error: ConfigKeyError) -> UserError:
    full_key = str(error.full_key or error.key)
    leaf = full_key.rsplit(".", 1)[-1]
    known = known_keys(full_key, cls) or known_keys(_join(where, full_key))
    return UserError(f"unknown key '{leaf}'", _join(where, full_key), key_mend(leaf, known) if known else "")


def key_mend(leaf: str, known: list[str]) -> str:
    """What to do about an unknown key; one that `known` has all the same belongs to another choice of its group."""
    return "another choice of this group has it, yours has not" if leaf in known else suggestion(leaf, known)


def _join(where: str, key: Any) -> str:
    return ".".join(part for part in (where, str(key or "")) if part)


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0]
