"""Hydra's own complaints as one line with the mend (Hydra prints a traceback or a page, and exits with 1)."""

from __future__ import annotations

import re

from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from saferlhf.config import schema
from saferlhf.config.validate import known_keys, suggestion
from saferlhf.errors import UserError

HYDRA_TROUBLE = (HydraException, OmegaConfBaseException)
"""What Hydra raises when the command line or a YAML file is wrong."""


def as_user_error(error: BaseException, command: str = "train") -> UserError:
    """Say what Hydra said, in one line."""
    root = schema.TrainConfig if command == "train" else schema.EvaluateConfig
    if isinstance(error, MissingConfigException):
        return _missing_config(error)
    if isinstance(error, OverrideParseException):
        return UserError(f"cannot read '{error.override}'", "the command line", "write key=value; quote spaces and commas")
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        key = match.group(1)
        group, _, leaf = key.replace("@", ".").rpartition(".")
        known = known_keys(key, root) or known_keys("x", root)
        return UserError(f"unknown key '{leaf}'", group or "the command line", suggestion(leaf, known))
    if match := re.search(r"Multiple values for (\S+?)\.", text):
        return UserError(f"'{match.group(1)}' is given more than once", "the command line", "give it once")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    where = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "the configuration")
    return UserError(lines[0] if lines else type(error).__name__, where)


def _missing_config(error: MissingConfigException) -> UserError:
    missing = str(error.missing_cfg_file or "?").removesuffix(".yaml")
    group, _, name = missing.rpartition("/")
    options = [str(option) for option in error.options or []]
    if group:
        return UserError(f"there is no {group} '{name}'", f"{group}={name}", suggestion(name, options) if options else "")
    return UserError(f"there is no config '{missing}'", "the command line", "see the files under conf/")
