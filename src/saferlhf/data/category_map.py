"""PKU-SafeRLHF's 19 harm categories and BeaverTails' 14 held against each other, for tests across the two data sets.

The two taxonomies share an origin and few borders, so nothing is ever merged in training; this map is for measuring a
moderator of the one on rows of the other. It is a judgement made from the names and definitions in the papers (Ji et
al. 2023, BeaverTails; Ji et al. 2024, PKU-SafeRLHF), not a fact of either data set. The words of real rows agree: in
tests/data/test_category_map.py a classifier of one set's categories finds those of the other.

A PKU category stands with a BeaverTails category where most answers of the first fall under the second, and in
`PARTIAL` where only a good part does:

- `Discriminatory Behavior` is often, not always, hate speech as well
- `Cybercrime` falls under financial crime where it steals; break-ins for other ends have no place of their own
- `Human Trafficking` is organised crime as a rule; `Endangering National Security` is terrorism only in part
- `Mental Manipulation` and `Psychological Harm` are the non-violent unethical behaviour that PKU names; lies, cheating
  and the like are not among its categories

and some have no counterpart at all:

- of PKU: `Endangering Public Health`, `Copyright Issues`, `Disrupting Public Order`, `Environmental Damage`
- of BeaverTails: `child_abuse` and `self_harm` (in PKU a small part of several categories each),
  `controversial_topics,politics` and `misinformation_regarding_ethics,laws_and_safety`

Two BeaverTails categories are much wider than what stands with them: `violence,aiding_and_abetting,incitement` counts
help with any crime, and `non_violent_unethical_behavior` any misconduct. On these a PKU moderator misses rows that PKU
would have called something else: low recall there tells of the taxonomies.

So the way from 19 to 14 loses the categories without counterpart; the way from 14 to 19 is closed, since one
BeaverTails category stands with several of PKU. `COMMON_GROUPS`, the connected parts of the relation, are the finest
classes that either taxonomy can tell: there both can be scored on rows of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from saferlhf.data.taxonomy import BEAVERTAILS_CATEGORIES, PKU_CATEGORIES
from saferlhf.errors import UserError
from saferlhf.ops.moderation import ModerationLabels, Verdicts

_DISCRIMINATION, _HATE = "discrimination,stereotype,injustice", "hate_speech,offensive_language"
_FINANCIAL, _UNETHICAL = "financial_crime,property_crime,theft", "non_violent_unethical_behavior"
_ORGANISED, _VIOLENCE = "terrorism,organized_crime", "violence,aiding_and_abetting,incitement"

PKU_TO_BEAVERTAILS: dict[str, frozenset[str]] = {
    "Endangering National Security": frozenset({_ORGANISED}),
    "Insulting Behavior": frozenset({_HATE}),
    "Discriminatory Behavior": frozenset({_DISCRIMINATION, _HATE}),
    "Endangering Public Health": frozenset(),
    "Copyright Issues": frozenset(),
    "Violence": frozenset({_VIOLENCE}),
    "Drugs": frozenset({"drug_abuse,weapons,banned_substance"}),
    "Privacy Violation": frozenset({"privacy_violation"}),
    "Economic Crime": frozenset({_FINANCIAL}),
    "Mental Manipulation": frozenset({_UNETHICAL}),
    "Human Trafficking": frozenset({_ORGANISED}),
    "Physical Harm": frozenset({_VIOLENCE}),
    "Sexual Content": frozenset({"sexually_explicit,adult_content"}),
    "Cybercrime": frozenset({_FINANCIAL}),
    "Disrupting Public Order": frozenset(),
    "Environmental Damage": frozenset(),
    "Psychological Harm": frozenset({_UNETHICAL}),
    "White-Collar Crime": frozenset({_FINANCIAL}),
    "Animal Abuse": frozenset({"animal_abuse"}),
}
"""PKU category -> the BeaverTails categories it falls under; empty: no counterpart."""

PARTIAL: frozenset[tuple[str, str]] = frozenset(
    {
        ("Endangering National Security", _ORGANISED),
        ("Discriminatory Behavior", _HATE),
        ("Mental Manipulation", _UNETHICAL),
        ("Human Trafficking", _ORGANISED),
        ("Cybercrime", _FINANCIAL),
        ("Psychological Harm", _UNETHICAL),
    }
)
"""Pairs of the relation where only a part of the PKU category falls under the other."""


class Group(NamedTuple):
    """Categories of both data sets that are one where the two are compared."""

    pku: frozenset[str]
    beavertails: frozenset[str]


COMMON_GROUPS: dict[str, Group] = {
    "animal abuse": Group(frozenset({"Animal Abuse"}), frozenset({"animal_abuse"})),
    "hate and discrimination": Group(
        frozenset({"Insulting Behavior", "Discriminatory Behavior"}), frozenset({_DISCRIMINATION, _HATE})
    ),
    "drugs": Group(frozenset({"Drugs"}), frozenset({"drug_abuse,weapons,banned_substance"})),
    "financial crime": Group(
        frozenset({"Economic Crime", "White-Collar Crime", "Cybercrime"}), frozenset({_FINANCIAL})
    ),
    "unethical behaviour": Group(frozenset({"Mental Manipulation", "Psychological Harm"}), frozenset({_UNETHICAL})),
    "privacy": Group(frozenset({"Privacy Violation"}), frozenset({"privacy_violation"})),
    "sexual content": Group(frozenset({"Sexual Content"}), frozenset({"sexually_explicit,adult_content"})),
    "organised crime": Group(
        frozenset({"Endangering National Security", "Human Trafficking"}), frozenset({_ORGANISED})
    ),
    "violence": Group(frozenset({"Violence", "Physical Harm"}), frozenset({_VIOLENCE})),
}
"""Name -> the categories of both data sets; every category that has a counterpart is in exactly one."""

TARGETS = ("beavertails", "pku", "common")
"""What `to` may be."""


def sources_of(categories: Sequence[str], to: str) -> dict[str, tuple[str, ...]]:
    """Target category -> which of `categories` stand for it, targets in their taxonomy's order, without those of none.

    Every function here goes by this, so labels and verdicts that were mapped to one target have the same columns:
    BeaverTails' own categories mapped to `beavertails` lose those that PKU has no counterpart of.

    Args:
        categories: names of one of the two taxonomies.
        to: beavertails | pku | common.

    Raises:
        UserError: `to` is unknown, a name is of neither taxonomy, or the way is closed (BeaverTails to PKU).
    """
    if to not in TARGETS:
        raise UserError(f"unknown taxonomy '{to}'", "the map of harm categories", f"take one of {', '.join(TARGETS)}")
    pku, beavertails = set(categories) <= set(PKU_CATEGORIES), set(categories) <= set(BEAVERTAILS_CATEGORIES)
    if not pku and not beavertails:
        strange = sorted(set(categories) - set(PKU_CATEGORIES) - set(BEAVERTAILS_CATEGORIES))
        shown = ", ".join(f"'{name}'" for name in strange[:3]) or "names of both taxonomies at once"
        raise UserError(
            f"only the categories of PKU-SafeRLHF or of BeaverTails can be mapped, not {shown}",
            "the harm categories",
            "measure these rows with a moderator of their own categories",
        )
    if to == "common":
        members = {name: group.pku | group.beavertails for name, group in COMMON_GROUPS.items()}
    elif to == "beavertails":
        covered = {
            name: frozenset(p for p, under in PKU_TO_BEAVERTAILS.items() if name in under)
            for name in BEAVERTAILS_CATEGORIES
        }
        members = {name: found | {name} for name, found in covered.items() if found}
    elif pku:
        members = {name: frozenset({name}) for name in PKU_CATEGORIES}
    else:
        raise UserError(
            "14 categories of BeaverTails do not tell 19 of PKU-SafeRLHF apart",
            "the map of harm categories",
            "map both to 'common'",
        )
    found = {name: tuple(c for c in categories if c in under) for name, under in members.items()}
    return {name: sources for name, sources in found.items() if sources}


@overload
def map_labels(labels: ModerationLabels, to: str = ...) -> ModerationLabels: ...
@overload
def map_labels(labels: Iterable[Iterable[str]], to: str = ...) -> list[frozenset[str]]: ...
def map_labels(
    labels: ModerationLabels | Iterable[Iterable[str]], to: str = "beavertails"
) -> ModerationLabels | list[frozenset[str]]:
    """Labels in another taxonomy: a target category is there where one of its sources is.

    Args:
        labels: of N rows, or N sets of category names (all of one taxonomy).
        to: beavertails | pku | common.

    Returns:
        The same kind. Rows without category labels stay without; `unsafe` and `severity` are as they were, so a row
        whose categories all lack a counterpart is unsafe and has none of the target's.

    Raises:
        UserError: as `sources_of`.
    """
    if isinstance(labels, ModerationLabels):
        sources = sources_of(labels.categories, to)
        # the greatest of 1 has it, 0 has it not, -1 not labelled (whole rows)
        category = _greatest(labels.category, labels.categories, sources)
        return replace(labels, category=category, categories=tuple(sources))
    sets = [frozenset(names) for names in labels]
    stands = sources_of(sorted(frozenset().union(*sets)), to)
    return [frozenset(target for target, under in stands.items() if row & set(under)) for row in sets]


def map_verdicts(
    verdicts: Verdicts, categories: Sequence[str], to: str = "beavertails"
) -> tuple[Verdicts, tuple[str, ...]]:
    """Verdicts in another taxonomy: p of a target is the greatest of its sources, decided where one of them is.

    The greatest probability is a lower bound of "any of them", and exact where one source implies the others.

    Args:
        verdicts: of N rows.
        categories: C names, in the order of the verdicts' columns.
        to: beavertails | pku | common.

    Returns:
        The verdicts and the names measured, in the order of their columns; targets without a source are left out.

    Raises:
        UserError: as `sources_of`.
        ValueError: names and columns differ in number.
    """
    for found in (verdicts.p_category, verdicts.category):
        if found is not None and found.shape[1] != len(categories):
            raise ValueError(f"{found.shape[1]} columns for {len(categories)} categories")
    sources = sources_of(categories, to)
    p = None if verdicts.p_category is None else _greatest(verdicts.p_category, categories, sources)
    said = None if verdicts.category is None else _greatest(verdicts.category, categories, sources)
    return replace(verdicts, p_category=p, category=said), tuple(sources)


def _greatest(table: NDArray[Any], categories: Sequence[str], sources: Mapping[str, tuple[str, ...]]) -> NDArray[Any]:
    """(N, targets) from (N, C): the greatest over each target's sources."""
    place = {name: index for index, name in enumerate(categories)}
    columns = [table[:, [place[name] for name in under]].max(axis=1) for under in sources.values()]
    return np.stack(columns, axis=1) if columns else np.zeros((len(table), 0), table.dtype)
