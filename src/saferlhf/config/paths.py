"""Where the YAML files of `conf/` lie: beside `src/` in a checkout, inside the package in a wheel."""

from __future__ import annotations

import os
from pathlib import Path


def conf_dir() -> Path:
    """The folder of Hydra configs that belongs to this installation."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent.parent / "conf"


def cache_dir(configured: str | None = None) -> Path:
    """Where converted models are kept: the `cache_dir` key, else $SAFERLHF_CACHE, else ~/.cache/saferlhf."""
    return Path(configured or os.environ.get("SAFERLHF_CACHE") or Path.home() / ".cache" / "saferlhf").expanduser()
