"""Which words make one sweep the same as another: what is fixed and what is swept, not where or on what it runs.

The values of a grid do not enter, so that a grid that grows stays one sweep with one parent. Of an Optuna sweep they
do, with objective and direction: its study is about just these.
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from saferlhf.config.arguments import key_of
from saferlhf.config.identity import run_hash
from saferlhf.config.schema import TrainConfig
from saferlhf.config.sweep_schema import OPTUNA, SweepConfig
from saferlhf.sweep.space import Space


def sweep_hash(config: SweepConfig, space: Space) -> str:
    """Ten hex digits that tell this sweep from others."""
    tree: dict[str, Any] = {
        "sweep": config.name,
        "fixed": sorted(word for word in space.fixed if is_of_the_run(word)),
        "swept": sorted(dimension.name for dimension in space.dimensions),
    }
    if config.name == OPTUNA:
        tree["values"] = sorted(
            (d.name, d.values, dataclasses.astuple(d.interval or _NOTHING)) for d in space.dimensions
        )
        tree["objective"] = [config.objective, config.direction]
    return run_hash(tree)


_NOTHING = dataclasses.make_dataclass("_NOTHING", [])()


def is_of_the_run(word: str) -> bool:
    """Whether a word says what the runs are or where they are kept, and not how they are computed or tracked."""
    key = key_of(word).replace("/", ".").partition("@")[0]
    if key == "name":
        return True
    cls: Any = TrainConfig
    for part in key.split("."):
        if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
            return True
        fields = {field.name: field for field in dataclasses.fields(cls)}
        if part not in fields:
            return True
        if fields[part].metadata.get("identity", True) is False:
            return False
        cls = typing.get_type_hints(cls)[part]
    return True
