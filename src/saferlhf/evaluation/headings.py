"""Headings of models and policies as parts of metric names."""

from __future__ import annotations


def slug(heading: str) -> str:
    """The heading in a metric's name: `reward shaping, nu 0.5` is `reward_shaping_nu_0.5`."""
    return "_".join("".join(c if c.isalnum() or c in ".-" else " " for c in heading).lower().split())
