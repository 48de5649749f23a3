"""Run identity: a hash over what a run *is*, not where or how it is computed.

The hash covers every key of the schema that is not marked `OUTSIDE_IDENTITY`. Keys marked `CONTENT` (paths, locators)
enter by the content they point to: the caller gives a function from the value to its content id. The same command
therefore finds the same folder on any machine, and moving a data file changes nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from typing import Any

HASH_LENGTH = 10

FORMAT = 1
"""Raised when a change to the code makes old runs incomparable although their config is equal."""

ContentOf = Callable[[str, str], str]
"""(dotted key, value) -> content id."""


def identity_tree(config: Any, content_of: ContentOf, prefix: str = "") -> dict[str, Any]:
    """The part of a config that enters the hash, as plain data."""
    tree: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        if field.metadata.get("identity", True) is False:
            continue
        key = f"{prefix}{field.name}"
        value = getattr(config, field.name)
        if value is None and field.metadata.get("if_given"):
            continue
        if dataclasses.is_dataclass(value):
            tree[field.name] = identity_tree(value, content_of, f"{key}.")
        elif isinstance(value, dict) and any(map(dataclasses.is_dataclass, value.values())):
            tree[field.name] = {n: identity_tree(part, content_of, f"{key}.{n}.") for n, part in value.items()}
        elif field.metadata.get("content") and value is not None:
            tree[field.name] = content_of(key, value)
        else:
            tree[field.name] = value
    return tree


def run_hash(tree: dict[str, Any]) -> str:
    """Ten hex digits of SHA-256 over the canonical JSON of an identity tree."""
    text = json.dumps({"format": FORMAT, **tree}, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]
