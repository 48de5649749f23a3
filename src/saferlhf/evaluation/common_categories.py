"""Harm categories that a moderator and the rows it is measured on have in common.

A moderator of PKU-SafeRLHF's 19 categories is measured on BeaverTails' rows in those of the 14 that have a counterpart,
one of BeaverTails' 14 on PKU-SafeRLHF's rows in the groups that both map onto (`data/category_map.py`). Rows with names
of neither are measured without categories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from saferlhf.data.category_map import map_labels, map_verdicts
from saferlhf.data.labels import labels_of
from saferlhf.data.rows import PKU_CATEGORIES, QuestionAnswer
from saferlhf.data.taxonomy import BEAVERTAILS_CATEGORIES, taxonomy_of
from saferlhf.ops.moderation import ModerationLabels, Verdicts


@dataclass(frozen=True)
class CommonCategories:
    """How labels and verdicts are brought to the same columns.

    Attributes:
        ours: the moderator's, in the order of its columns.
        to: what both are mapped to: beavertails | common; None: as they are.
        measured: names of the columns; empty: categories are not measured.
        foreign: a name of the rows that the moderator has not, where categories are not measured for it.
    """

    ours: tuple[str, ...]
    to: str | None
    measured: tuple[str, ...]
    foreign: str | None = None

    def labels(self, rows: Sequence[QuestionAnswer]) -> ModerationLabels:
        """Labels of rows of either taxonomy, in the measured columns."""
        if self.to is None or not self.measured:
            return labels_of(rows, self.measured)
        names = taxonomy_of({name for row in rows for name in row.harm_category or ()})
        if not set(names) <= {*PKU_CATEGORIES, *BEAVERTAILS_CATEGORIES}:
            return labels_of(rows, self.measured)
        found = map_labels(labels_of(rows, names), to=self.to)
        place = {name: column for column, name in enumerate(found.categories)}
        category = np.full((len(rows), len(self.measured)), -1, np.int64)
        if all(name in place for name in self.measured):
            category = found.category[:, [place[name] for name in self.measured]]
        return ModerationLabels(found.unsafe, found.severity, category, self.measured)

    def verdicts(self, verdicts: Verdicts) -> Verdicts:
        """The moderator's verdicts in the measured columns."""
        if not self.measured:
            values = vars(verdicts) | {"category": None, "p_category": None}
            return Verdicts(**values)
        return verdicts if self.to is None else map_verdicts(verdicts, self.ours, to=self.to)[0]


def common_categories(rows: Sequence[QuestionAnswer], ours: tuple[str, ...]) -> CommonCategories:
    """What a moderator of the categories `ours` can be measured in on these rows."""
    named = {name for row in rows for name in row.harm_category or ()}
    foreign = sorted(named - set(ours))
    if not ours or not foreign:
        return CommonCategories(ours, None, ours)
    pku, beavertails = set(PKU_CATEGORIES), set(BEAVERTAILS_CATEGORIES)
    to = None
    if set(ours) <= pku and named <= beavertails:
        to = "beavertails"
    elif set(ours) <= beavertails and named <= pku:
        to = "common"
    if to is None:
        return CommonCategories(ours, None, (), foreign[0])
    theirs = BEAVERTAILS_CATEGORIES if to == "beavertails" else PKU_CATEGORIES
    empty = np.zeros((0, len(theirs)), np.int64)
    nothing = np.zeros(0, np.int64)
    of_rows = map_labels(ModerationLabels(nothing, nothing, empty, theirs), to=to).categories
    no_verdict = Verdicts(np.zeros(0), None, np.zeros((0, len(ours))), nothing.astype(bool), None, None)
    of_model = map_verdicts(no_verdict, ours, to=to)[1]
    return CommonCategories(ours, to, tuple(name for name in of_model if name in of_rows))
