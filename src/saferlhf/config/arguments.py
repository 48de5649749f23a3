"""The words of the command line: Hydra's flags in any order, overrides merged by key, no key given twice.

Hydra's parser wants all overrides in one row (`task=reward -m seed=0,1` is refused) and answers a misspelt flag with a
page of usage; here the flags are put first and a misspelt one is one line. Two values for one key are refused: Hydra
would silently take the last.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence

from saferlhf.config.validate import suggestion
from saferlhf.errors import UserError

SWITCHES = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m"),
    *("--shell-completion", "-sc"),
)
WITH_VALUE = (
    *("--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd"),
    "--experimental-rerun",
)
INFO, INFO_VALUES = ("--info", "-i"), ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")
FOLDERS = ("--config-dir", "-cd", "--config-path", "-cp")
"""Flags with a folder that the stages of a pipeline must see too."""
MAPPINGS = ("data.columns", "data.parts", "data.join", "data.subsets")
"""Keys that hold any names: Hydra would take a new one only with `+`, an old one only without."""


def ordered(arguments: Sequence[str]) -> list[str]:
    """The same arguments with the flags before the overrides.

    Raises:
        UserError: an unknown flag, or one without its value.
    """
    flags: list[str] = []
    overrides: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if word == "--":
            overrides += rest
            break
        if not word.startswith("-"):
            overrides.append(word)
            continue
        flag, equals, value = word.partition("=")
        flag = _full(flag)
        if flag in INFO:
            # its value may be left out, and must not swallow an override
            value = value or (rest.pop(0) if rest and rest[0] in INFO_VALUES else "all")
            flags.append(f"--info={value}")
        elif flag in WITH_VALUE and not equals:
            if not rest:
                raise UserError(f"{flag} needs a value", "the command line", f"{flag} VALUE")
            flags += [flag, rest.pop(0)]
        else:
            flags.append(f"{flag}{equals}{value}")
    return flags + [_addable(word) for word in overrides]


def _addable(override: str) -> str:
    """An override of a mapping of any names as Hydra takes it whether the name is there or not."""
    key = override.partition("=")[0].strip()
    return f"++{override}" if any(key == name or key.startswith(f"{name}.") for name in MAPPINGS) else override


def _full(flag: str) -> str:
    """A flag as Hydra knows it; a beginning that fits one long flag alone stands for it."""
    known = [*SWITCHES, *WITH_VALUE, *INFO]
    if flag in known:
        return flag
    begun = [name for name in known if flag.startswith("--") and len(flag) > 2 and name.startswith(flag)]
    if len(begun) == 1:
        return begun[0]
    raise UserError(f"unknown flag '{flag}'", "the command line", suggestion(flag, [k for k in known if k[1] == "-"]))


def folder_flags(arguments: Sequence[str]) -> list[str]:
    """Those of the (ordered) arguments that say where configs lie, with absolute paths."""
    kept: list[str] = []
    for position, word in enumerate(arguments):
        flag, equals, value = word.partition("=")
        if flag not in FOLDERS:
            continue
        kept += [flag, os.path.abspath(value if equals else arguments[position + 1])]
    return kept


def key_of(override: str) -> str:
    """The key or group that an override is about: `+trainer.max_steps=2` -> `trainer.max_steps`."""
    return override.lstrip("+~").partition("=")[0].strip()


def merged(*lists: Iterable[str]) -> list[str]:
    """Overrides of several lists in one, in which a later one replaces an earlier one of the same key."""
    by_key: dict[str, str] = {}
    for override in (override for overrides in lists for override in overrides):
        by_key.pop(key_of(override), None)  # a later one also takes its later place
        by_key[key_of(override)] = override
    return list(by_key.values())


def refuse_duplicates(overrides: Iterable[str]) -> None:
    """Refuse a key that is given twice.

    Raises:
        UserError: names the key and both values.
    """
    seen: dict[str, str] = {}
    for override in overrides:
        key = key_of(override)
        if key in seen:
            raise UserError(f"'{key}' is given twice: {seen[key]} and {override}", "the command line", "give it once")
        seen[key] = override


def assign(key: str, value: str) -> str:
    """`key='value'`, quoted so that Hydra takes any text as it is."""
    # Hydra keeps a backslash but where it stands before a quote
    trailing = len(value) - len(value.rstrip("\\"))
    quoted = value.replace("'", "\\'") + "\\" * trailing
    return f"{key}='{quoted}'"


def is_true(arguments: Iterable[str], key: str) -> bool:
    """Whether a boolean key is switched on, read before anything is composed."""
    words = (word.replace(" ", "") for word in arguments)
    return any(key_of(word) == key and word.partition("=")[2].lower() in ("true", "yes", "on", "1") for word in words)
