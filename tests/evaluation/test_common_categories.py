"""Labels and verdicts brought to common columns: a moderator of 19 categories on rows of 14, and the other way."""

from __future__ import annotations

import numpy as np

from saferlhf.data.category_map import PKU_TO_BEAVERTAILS
from saferlhf.data.rows import PKU_CATEGORIES, QuestionAnswer, as_prompt
from saferlhf.data.taxonomy import BEAVERTAILS_CATEGORIES
from saferlhf.evaluation.common_categories import common_categories
from saferlhf.ops.moderation import Verdicts


def row(number: int, *names: str) -> QuestionAnswer:
    return QuestionAnswer(f"{number}", as_prompt("q"), "a", not names, frozenset(names), None)


def said(*rows: list[int], width: int = 19) -> Verdicts:
    table = np.zeros((len(rows), width), bool)
    for i, columns in enumerate(rows):
        table[i, columns] = True
    unsafe = table.any(axis=1)
    return Verdicts(unsafe * 0.9, None, table * 0.8, unsafe, None, table)


def test_the_same_categories_stay_as_they_are() -> None:
    rows = [row(0, "Drugs"), row(1)]
    common = common_categories(rows, PKU_CATEGORIES)
    assert common.to is None and common.measured == PKU_CATEGORIES and common.foreign is None
    assert common.labels(rows).category.sum() == 1
    verdicts = said([6], [])
    assert common.verdicts(verdicts) is verdicts


def test_a_moderator_of_pku_on_rows_of_beavertails() -> None:
    rows = [row(0, "animal_abuse"), row(1, "privacy_violation", "animal_abuse"), row(2)]
    common = common_categories(rows, PKU_CATEGORIES)
    assert common.to == "beavertails" and set(common.measured) <= set(BEAVERTAILS_CATEGORIES)
    labels = common.labels(rows)
    column = common.measured.index("animal_abuse")
    assert labels.category[:, column].tolist() == [1, 1, 0]
    abuse, privacy = PKU_CATEGORIES.index("Animal Abuse"), PKU_CATEGORIES.index("Privacy Violation")
    mapped = common.verdicts(said([abuse], [privacy], []))
    assert mapped.category is not None and mapped.category[:, column].tolist() == [True, False, False]
    assert mapped.category.shape == labels.category.shape


def test_training_rows_of_the_other_data_set_meet_them_there() -> None:
    """Baselines learn from PKU-SafeRLHF's rows what BeaverTails' rows are measured in."""
    common = common_categories([row(0, "animal_abuse")], PKU_CATEGORIES)
    labels = common.labels([row(1, "Animal Abuse"), row(2), row(3, "Privacy Violation")])
    column = common.measured.index("animal_abuse")
    assert labels.category[:, column].tolist() == [1, 0, 0]
    assert "animal_abuse" in PKU_TO_BEAVERTAILS["Animal Abuse"]


def test_a_moderator_of_beavertails_on_rows_of_pku() -> None:
    rows = [row(0, "Animal Abuse"), row(1)]
    common = common_categories(rows, BEAVERTAILS_CATEGORIES)
    assert common.to == "common" and common.measured
    place = BEAVERTAILS_CATEGORIES.index("animal_abuse")
    labels, mapped = common.labels(rows), common.verdicts(said([place], [], width=14))
    assert mapped.category is not None and mapped.category.shape == labels.category.shape
    assert (mapped.category == (labels.category == 1)).all()


def test_names_of_neither_are_not_measured() -> None:
    rows = [row(0, "made up"), row(1)]
    common = common_categories(rows, PKU_CATEGORIES)
    assert common.measured == () and common.foreign == "made up"
    assert common.verdicts(said([1], [])).category is None
    assert common.labels(rows).category.shape == (2, 0)


def test_a_judge_without_categories() -> None:
    common = common_categories([row(0, "animal_abuse")], ())
    assert common.measured == () and common.foreign is None
