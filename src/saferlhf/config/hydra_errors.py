"""Hydra's own complaints as one line with the mend (Hydra prints a traceback or a page, and exits with 1)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException
from yaml import MarkedYAMLError, YAMLError

from saferlhf.config import evaluate_schema, schema
from saferlhf.config.arguments import key_of
from saferlhf.config.paths import conf_dir
from saferlhf.config.validate import in_plain_words, key_mend, known_keys, suggestion
from saferlhf.errors import UserError

HYDRA_TROUBLE = (HydraException, OmegaConfBaseException, YAMLError)
"""What Hydra raises when the command line or a YAML file is wrong."""

LINE = "the command line"


def is_trouble(error: BaseException) -> bool:
    """Whether `as_user_error` has words for it."""
    text = str(error)
    return (
        isinstance(error, HYDRA_TROUBLE)
        or (isinstance(error, ValueError) and "group override must be" in text)
        or (isinstance(error, ImportError) and text.startswith("Error loading '"))
    )


def as_user_error(error: BaseException, command: str = "train", overrides: Sequence[str] = ()) -> UserError:
    """Say what Hydra said, in one line.

    Args:
        error: see `is_trouble`.
        command: train | evaluate: whose keys may be suggested.
        overrides: what was typed, for errors that do not say which word they mean.
    """
    root = schema.TrainConfig if command == "train" else evaluate_schema.EvaluateConfig
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, OverrideParseException):
        return UserError(f"cannot read '{error.override}'", LINE, "write key=value; quote spaces, commas and =")
    if isinstance(error, YAMLError):
        return _yaml(error)
    if isinstance(error, ImportError):
        name, _, reason = str(error).removeprefix("Error loading '").partition("'")
        return UserError(f"cannot load '{name}'", "_target_", reason.lstrip(":\n").partition("\n")[0])
    if isinstance(error, ValueError) and not isinstance(error, HYDRA_TROUBLE):
        return _choice_is_no_name(overrides)
    return _by_text(error, root, {key_of(override) for override in overrides})


def _by_text(error: BaseException, root: type, typed: set[str]) -> UserError:
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match[1]
        inner = str(getattr(error.__cause__, "full_key", None) or key)
        if inner.startswith(f"{key}."):  # the value is a mapping with a key of its own
            return _own_key(inner)
        if key.startswith("task.") and not typed.intersection(("task", "experiment", "debug")):
            return UserError(
                f"no task is named, so there is no {key}",
                LINE,
                "add task=NAME, or set pipeline.definitions.STAGE.overrides",
            )
        return _unknown(key, root)
    if match := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        return UserError(f"'{match[1]}' is there already", LINE, f"leave the + out: {match[1]}=VALUE")
    if match := re.search(r"Could not (?:delete|override) .*?'([^']+)' does not exist", text):
        key = match[1]
        return UserError(f"no '{key}' to take away", LINE, suggestion(key.rpartition(".")[2], known_keys(key, root)))
    if match := re.search(r"Could not delete '([^']+)'", text):
        return UserError(f"no '{match[1]}' to take away", LINE, suggestion(match[1], known_keys("x", root)))
    if match := re.search(r"Multiple values for (\S+?)\.", text):
        return UserError(f"'{match[1]}' is given more than once", LINE, "give it once, without a +")
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        key, _, values = match[1].partition("=")
        return UserError(
            f"'{match[1]}' is several values", LINE, f"one run for each: add -m; a list: '{key}=[{values}]'"
        )
    if match := re.search(r"Error merging override (.*)", text):
        return UserError(f"cannot take {match[1]}", LINE, in_plain_words(str(error.__cause__ or "").partition("\n")[0]))
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    where = str(getattr(error, "full_key", None) or "the configuration")
    return UserError(in_plain_words(lines[0]) if lines else type(error).__name__, where)


def _unknown(key: str, root: type) -> UserError:
    """An override of a key or group that is not there."""
    group, _, leaf = key.replace("@", ".").rpartition(".")
    if group.partition(".")[0] == "hydra":
        return UserError(f"unknown key '{leaf}'", group, "see --hydra-help")
    known = known_keys(key.replace("/", "."), root)
    if known:
        leaf = leaf.rpartition("/")[2]
        return UserError(f"unknown key '{leaf}'", group or LINE, key_mend(leaf, known))
    if not group:
        return UserError(f"unknown group '{key}'", LINE, suggestion(key, _groups()))
    # the first of the parents that is not there is the one to mend
    above: list[str] = []
    for part in group.split("."):
        beside = known_keys(".".join([*above, part]), root)
        if part not in beside:
            break
        above.append(part)
    else:
        return _own_key(key)
    return UserError(f"unknown key '{part}'", ".".join(above) or LINE, suggestion(part, beside) if beside else "")


def _own_key(key: str) -> UserError:
    """A new key in a mapping that takes any."""
    group, _, leaf = key.rpartition(".")
    return UserError(f"no key '{leaf}'", group, f"a key of your own needs a plus: +{key}=VALUE")


def _groups() -> list[str]:
    root = conf_dir()
    return sorted({str(file.parent.relative_to(root)) for file in root.rglob("*.yaml") if file.parent != root})


def _missing_config(error: MissingConfigException) -> UserError:
    missing = str(error.missing_cfg_file or "?").removesuffix(".yaml")
    group, _, name = missing.rpartition("/")
    options = [str(option) for option in error.options or []]
    if group:
        return UserError(
            f"there is no {group} '{name}'", f"{group}={name}", suggestion(name, options) if options else ""
        )
    return UserError(f"there is no config '{missing}'", LINE, "see the files under conf/")


def _yaml(error: YAMLError) -> UserError:
    """A YAML file that cannot be read, with its place."""
    mark = error.problem_mark if isinstance(error, MarkedYAMLError) else None
    place = "" if mark is None else f"{mark.name}, line {mark.line + 1}, column {mark.column + 1}"
    problem = getattr(error, "problem", None) or str(error)
    return UserError(f"not YAML: {problem}", place, "mend that line")


def _choice_is_no_name(overrides: Sequence[str]) -> UserError:
    """`group=5`, `group=true`, `group=null`: Hydra says what it got and not for which group."""
    groups = _groups()
    for override in overrides:
        group, _, value = override.lstrip("+").partition("=")
        if group in groups and not (conf_dir() / group / f"{value}.yaml").is_file():
            options = sorted(file.stem for file in (conf_dir() / group).glob("*.yaml"))
            return UserError(f"there is no {group} '{value}'", override, "choose one of: " + " | ".join(options))
    return UserError("a choice that is no name", LINE, "write group=NAME")
