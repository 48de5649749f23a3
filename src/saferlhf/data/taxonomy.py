"""Taxonomies: which harm categories a data set has, and in which order.

PKU-SafeRLHF labels 19, BeaverTails 14, by names of their own; the two do not map onto each other one to one, so they
are never merged. Rows of anything else bring their own names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from saferlhf.data.rows import PKU_CATEGORIES

BEAVERTAILS_CATEGORIES: tuple[str, ...] = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)
"""The 14 harm categories of BeaverTails, in data set order. The names hold commas: never split on them."""

TAXONOMIES: dict[str, tuple[str, ...]] = {"pku": PKU_CATEGORIES, "beavertails": BEAVERTAILS_CATEGORIES}
"""What `data.taxonomy` may name, besides `open` (any name) and `auto` (by the names that most rows use)."""


def taxonomy_of(names: Iterable[str]) -> tuple[str, ...]:
    """The columns for a set of names: all of a known taxonomy where every name belongs to it, else the sorted names."""
    found = set(names)
    for known in TAXONOMIES.values():
        if found and found <= set(known):
            return known
    return tuple(sorted(found))


def likely_taxonomy(counts: Counter[str]) -> tuple[str, ...] | None:
    """The known taxonomy that more than half of the labels belong to; None where no known one has so many.

    Args:
        counts: category name -> number of rows that have it.
    """
    total = sum(counts.values())
    for known in TAXONOMIES.values():
        if 2 * sum(counts[name] for name in known) > total:
            return known
    return None


__all__ = ["BEAVERTAILS_CATEGORIES", "PKU_CATEGORIES", "TAXONOMIES", "likely_taxonomy", "taxonomy_of"]
