"""A nested configuration as MLflow params: flat names, values as text, within the limits MLflow sets.

A value over the limit is cut in the param and ends with a mark; the whole configuration is kept as the artefact
`config.yaml`. A param cannot be changed once logged, so on resume only new names are logged; a changed value becomes a
tag.
"""

from __future__ import annotations

import dataclasses
import json
import re
from argparse import Namespace
from collections.abc import Mapping
from typing import Any

VALUE_LENGTH = 6000
TAG_LENGTH = 5000
KEY_LENGTH = 250
CUT = "… [cut; whole in config.yaml]"


def as_mapping(params: Any) -> dict[str, Any]:
    """A mapping, OmegaConf node, dataclass or namespace as plain dictionaries and lists."""
    from omegaconf import OmegaConf

    if OmegaConf.is_config(params):
        params = OmegaConf.to_container(params, resolve=True)
    elif isinstance(params, Namespace):
        params = vars(params)
    elif dataclasses.is_dataclass(params) and not isinstance(params, type):
        params = dataclasses.asdict(params)
    return _plain(dict(params or {}))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"a": {"b": [1, 2]}}` -> `{"a.b": "[1, 2]"}`; None is `null`, as in YAML."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{name}."))
        else:
            flat[safe_name(name)] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def safe_name(name: str) -> str:
    """A name MLflow takes: letters, digits, `_ - . : /` and space; others become `_`."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:KEY_LENGTH]


def cut(value: str, length: int = VALUE_LENGTH) -> str:
    """The value, or its beginning and the mark."""
    return value if len(value) <= length else value[: length - len(CUT)] + CUT


def new_and_changed(flat: Mapping[str, str], known: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Split params into those to be logged and, as tags, those whose logged value differs."""
    values = {key: cut(value) for key, value in flat.items()}
    new = {key: value for key, value in values.items() if key not in known}
    changed = {
        f"changed.{key}"[:KEY_LENGTH]: value[:TAG_LENGTH]
        for key, value in values.items()
        if key in known and known[key] != value
    }
    return new, changed
