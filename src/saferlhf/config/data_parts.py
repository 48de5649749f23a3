"""Parts of `data=mix`: each is a file of `conf/data/` with some keys changed, and how much of it is taken.

Parts are settled when the config is read, so that a typo fails at once and the stored config holds every key of theirs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, replace
from typing import Any, Optional

import yaml

from saferlhf.config.paths import conf_dir
from saferlhf.config.schema import DataConfig
from saferlhf.config.validate import suggestion, typed
from saferlhf.errors import UserError

OF_THE_MIX = (
    "parts",
    "seed",
    "policy",
    "train_rows",
    "val_rows",
    "test_rows",
    "val_fraction",
    "test_fraction",
    "shuffle_sides",
    "answers",
)
"""Keys that hold for the whole mixture and cannot differ between its parts."""


@dataclass
class DataPartConfig(DataConfig):
    """One part of a mixture."""

    rows: Optional[int] = None  # of its training rows, before validation and test rows are cut; null: all, or `share`
    share: Optional[float] = None  # of all training rows of the mixture


def settled(data: DataConfig) -> DataConfig:
    """The same data config, its parts with all their keys.

    Raises:
        UserError: unknown data set or key, or an impossible part.
    """
    if not data.parts:
        return data
    parts = {str(label): _settled_part(str(label), given, data) for label, given in data.parts.items()}
    licences = dict.fromkeys(str(part["licence"]) for part in parts.values() if part["licence"])
    return replace(data, parts=parts, licence=data.licence or " + ".join(licences) or None)


def part_configs(data: DataConfig) -> dict[str, DataPartConfig]:
    """The parts of a settled mixture, by label, ready to be read; seed, answers and policy are those of the mixture."""
    out = {}
    for label, node in (data.parts or {}).items():
        part = typed(DataPartConfig, node, f"data.parts.{label}")
        out[label] = replace(part, seed=data.seed, answers=data.answers, policy=data.policy)
    return out


def _settled_part(label: str, given: Any, data: DataConfig) -> dict[str, Any]:
    where = f"data.parts.{label}"
    if given is None:
        given = {}
    if not isinstance(given, dict):
        raise UserError("a part is a mapping of keys", where, "as {rows: 1000} or {share: 0.5, path: FILE}")
    for key in OF_THE_MIX:
        if given.get(key) is not None:
            raise UserError(f"'{key}' holds for the whole mixture", f"{where}.{key}", f"set data.{key} instead")
    base = _conf_of(str(given.get("name", label)), where)
    node = {key: value for key, value in {**base, **given}.items() if key not in OF_THE_MIX}
    if node.get("root") is None:
        node["root"] = data.root
    if node.get("path") == "???":
        raise UserError("a value is missing", f"{where}.path", f"give it as {where}.path=FILE_OR_FOLDER")
    part = typed(DataPartConfig, node, where)
    if part.source == "mix":
        raise UserError("a mixture in a mixture", where, "name its parts here")
    if part.rows is not None and part.share is not None:
        raise UserError("a part is taken by rows or by share", where, "give one of them")
    if part.rows is not None and part.rows < 1:
        raise UserError(f"{part.rows} is not a positive number", f"{where}.rows", "give a number above zero, or null")
    if part.share is not None and not 0 < part.share <= 1:
        raise UserError(f"{part.share} is not a share", f"{where}.share", "give a number above 0, at most 1")
    tree = dataclasses.asdict(part)
    return {key: value for key, value in tree.items() if key not in OF_THE_MIX}


def _conf_of(name: str, where: str) -> dict[str, Any]:
    """The keys of `conf/data/<name>.yaml`, those of the file it builds on included."""
    file = conf_dir() / "data" / f"{name}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in file.parent.glob("*.yaml"))
        raise UserError(f"there is no data set '{name}'", where, suggestion(name, known))
    content: dict[str, Any] = yaml.safe_load(file.read_text()) or {}
    keys: dict[str, Any] = {}
    for entry in content.pop("defaults", []):
        if isinstance(entry, str) and entry != "_self_":
            keys |= _conf_of(entry, where)
    return keys | content
