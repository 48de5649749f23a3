"""The map between 19 and 14 harm categories: complete, of one mind with the groups, and right on worked examples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from command_lines import composed
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from saferlhf.config.validate import train_config
from saferlhf.data.build import build_data
from saferlhf.data.category_map import (
    COMMON_GROUPS,
    PARTIAL,
    PKU_TO_BEAVERTAILS,
    map_labels,
    map_verdicts,
    sources_of,
)
from saferlhf.data.rows import QuestionAnswer, prompt_text
from saferlhf.data.taxonomy import BEAVERTAILS_CATEGORIES, PKU_CATEGORIES
from saferlhf.errors import UserError
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.ops.metrics import auroc
from saferlhf.ops.moderation import ModerationLabels, Verdicts

FINANCIAL, HATE = "financial_crime,property_crime,theft", "hate_speech,offensive_language"
NO_PKU = {
    "child_abuse",
    "controversial_topics,politics",
    "misinformation_regarding_ethics,laws_and_safety",
    "self_harm",
}
NO_BEAVERTAILS = {
    "Endangering Public Health",
    "Copyright Issues",
    "Disrupting Public Order",
    "Environmental Damage",
}


# ------------------------------------------------------------------------------------------------ the relation
def test_every_name_is_known_and_every_category_is_spoken_of() -> None:
    assert tuple(PKU_TO_BEAVERTAILS) == PKU_CATEGORIES
    named = frozenset().union(*PKU_TO_BEAVERTAILS.values())
    assert named <= set(BEAVERTAILS_CATEGORIES)
    # what is left out is left out on purpose
    assert set(BEAVERTAILS_CATEGORIES) - named == NO_PKU
    assert {name for name, under in PKU_TO_BEAVERTAILS.items() if not under} == NO_BEAVERTAILS
    assert all(other in PKU_TO_BEAVERTAILS[one] for one, other in PARTIAL)


def test_groups_are_the_connected_parts_of_the_relation() -> None:
    """Walked from each category, both ways, until nothing new is reached."""
    edges = [(one, other) for one, under in PKU_TO_BEAVERTAILS.items() for other in under]
    found = set()
    for start, _ in edges:
        reached: set[str] = {start}
        while True:
            more = {name for edge in edges if reached & set(edge) for name in edge} - reached
            if not more:
                break
            reached |= more
        found.add((frozenset(reached & set(PKU_CATEGORIES)), frozenset(reached & set(BEAVERTAILS_CATEGORIES))))
    assert found == {tuple(group) for group in COMMON_GROUPS.values()}
    assert len(found) == len(COMMON_GROUPS)
    members = [name for group in COMMON_GROUPS.values() for name in group.pku | group.beavertails]
    assert len(members) == len(set(members)) == 19 + 14 - len(NO_PKU) - len(NO_BEAVERTAILS)


def test_measured_names_stand_in_the_taxonomys_order() -> None:
    both = [tuple(sources_of(names, "beavertails")) for names in (PKU_CATEGORIES, BEAVERTAILS_CATEGORIES)]
    assert both[0] == both[1] == tuple(name for name in BEAVERTAILS_CATEGORIES if name not in NO_PKU)
    common = [tuple(sources_of(names, "common")) for names in (PKU_CATEGORIES, BEAVERTAILS_CATEGORIES)]
    assert common[0] == common[1] == tuple(COMMON_GROUPS)
    assert tuple(sources_of(PKU_CATEGORIES, "pku")) == PKU_CATEGORIES


# ------------------------------------------------------------------------------------------------ labels
def test_sets_by_hand() -> None:
    rows = [{"White-Collar Crime", "Economic Crime"}, {"Discriminatory Behavior"}, {"Copyright Issues"}, set()]
    assert map_labels(rows, "beavertails") == [
        {FINANCIAL},
        {"discrimination,stereotype,injustice", HATE},
        frozenset(),
        frozenset(),
    ]
    assert map_labels(rows, "common") == [{"financial crime"}, {"hate and discrimination"}, frozenset(), frozenset()]
    assert map_labels([{HATE, "self_harm"}, {"self_harm"}], "common") == [{"hate and discrimination"}, frozenset()]
    assert map_labels([{HATE, "self_harm"}], "beavertails") == [{HATE}]  # PKU has no name for the other
    assert map_labels([set()], "common") == [frozenset()]


def labels(rows: list[set[str] | None], categories: tuple[str, ...]) -> ModerationLabels:
    table = [[-1] * len(categories) if row is None else [int(name in row) for name in categories] for row in rows]
    unsafe = np.array([-1 if row is None else int(bool(row)) for row in rows])
    return ModerationLabels(unsafe, np.full(len(rows), -1), np.array(table), categories)


def test_tables_of_labels_agree_with_sets() -> None:
    rows: list[set[str] | None] = [{"Drugs", "Violence"}, None, {"Cybercrime"}, {"Environmental Damage"}, set()]
    given = labels(rows, PKU_CATEGORIES)
    for to in ("beavertails", "common", "pku"):
        found = map_labels(given, to)
        sets = map_labels([row or set() for row in rows], to)
        for i, row in enumerate(rows):
            if row is None:
                assert (found.category[i] == -1).all()
            else:
                has = {name for name, one in zip(found.categories, found.category[i], strict=True) if one}
                assert has == sets[i]
                assert set(found.category[i]) <= {0, 1}
        np.testing.assert_array_equal(found.unsafe, given.unsafe)
    # unsafe all the same, although no category is left to say why
    assert map_labels(given, "common").unsafe[3] == 1


# ------------------------------------------------------------------------------------------------ verdicts
def verdicts(p: np.ndarray, threshold: float = 0.5) -> Verdicts:
    unsafe = (p >= threshold).any(axis=1)
    return Verdicts(p.max(axis=1), None, p, unsafe, None, p >= threshold)


def test_verdicts_by_hand() -> None:
    p = np.zeros((2, 19))
    p[0, PKU_CATEGORIES.index("Economic Crime")] = 0.3
    p[0, PKU_CATEGORIES.index("Cybercrime")] = 0.7
    p[0, PKU_CATEGORIES.index("Copyright Issues")] = 0.9
    p[1, PKU_CATEGORIES.index("White-Collar Crime")] = 0.4
    found, names = map_verdicts(verdicts(p), PKU_CATEGORIES, "beavertails")
    assert len(names) == 10 and found.p_category is not None and found.category is not None
    place = names.index(FINANCIAL)
    assert found.p_category[:, place].tolist() == [0.7, 0.4]
    assert found.category[:, place].tolist() == [True, False]
    assert found.category.sum() == 1 and found.category.dtype == bool
    np.testing.assert_array_equal(found.p_unsafe, p.max(axis=1))


def test_a_heads_absence_stays_absence() -> None:
    found, names = map_verdicts(Verdicts(np.zeros(2), None, None, np.zeros(2, bool), None, None), PKU_CATEGORIES)
    assert found.p_category is None and found.category is None and len(names) == 10


def test_a_moderator_of_one_taxonomy_on_rows_of_the_other() -> None:
    """Rows with any member of each group that is there, drawn apart for either side: perfect on the groups."""
    names = {"pku": PKU_CATEGORIES, "beavertails": BEAVERTAILS_CATEGORIES}
    draw = np.random.default_rng(0)
    truth = draw.random((80, len(COMMON_GROUPS))) < 0.2  # (rows, groups)
    groups = list(COMMON_GROUPS.values())
    tables = {}
    for side, categories in names.items():
        table = np.zeros((80, len(categories)), np.int64)
        for i, row in enumerate(truth):
            for group, there in zip(groups, row, strict=True):
                if there:  # any one member of the group
                    members = sorted(getattr(group, side))
                    table[i, categories.index(members[draw.integers(len(members))])] = 1
        tables[side] = table
    for said, labelled in (("pku", "beavertails"), ("beavertails", "pku")):
        p = np.where(tables[said] == 1, 0.9, 0.1)
        judged, measured = map_verdicts(verdicts(p), names[said], "common")
        wanted = map_labels(labels_of_table(tables[labelled], names[labelled]), "common")
        assert wanted.categories == measured
        found = evaluate_moderation([f"r{i}" for i in range(80)], wanted, None, judged, draws=0)
        assert found["test/category/exact_match"] == found["test/category/macro_f1"] == 1.0


def labels_of_table(table: np.ndarray, categories: tuple[str, ...]) -> ModerationLabels:
    return ModerationLabels(table.any(axis=1).astype(np.int64), np.full(len(table), -1), table, categories)


# ------------------------------------------------------------------------------------------------ real rows
def unsafe_rows(words: str) -> tuple[list[str], list[frozenset[str]]]:
    """Texts and categories of all unsafe answers of a data set."""
    data = build_data(train_config(composed("task=reward", *words.split())).data, QuestionAnswer, ("harm_category",))
    rows = [row for part in (data.train, data.val, data.test) for row in part if row.harm_category]
    return [f"{prompt_text(row.prompt)}\n{row.response}" for row in rows], [
        row.harm_category or frozenset() for row in rows
    ]


@pytest.mark.slow
def test_words_learned_from_one_data_set_find_the_other(data_root: Path) -> None:
    """Which PKU category's words rank the rows of a BeaverTails category highest: one that stands with it.

    Not so where BeaverTails is much wider (violence with aiding and abetting, unethical behaviour) or has too few rows
    (organised crime).
    """
    options = f"data.root={data_root} data.policy.near_overlap=off"
    if not (data_root / "beavertails-30k-test").is_dir() or not (data_root / "pku-saferlhf").is_dir():
        pytest.skip("no rows of both data sets")
    texts, sets = unsafe_rows(f"data=pku_saferlhf {options}")
    asked, other = unsafe_rows(f"data=beavertails_test {options}")
    vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2, max_features=15_000)
    seen, told = vectorizer.fit_transform(texts), vectorizer.transform(asked)
    scores = {}
    for name in PKU_CATEGORIES:
        model = LogisticRegression(C=10.0, solver="liblinear", random_state=0)
        scores[name] = model.fit(seen, [name in row for row in sets]).decision_function(told)
    clear = {under for name in PKU_TO_BEAVERTAILS for under in PKU_TO_BEAVERTAILS[name] if (name, under) not in PARTIAL}
    for target in sorted(clear - {"violence,aiding_and_abetting,incitement"}):
        found = {name: auroc(scores[name], [int(target in row) for row in other]) or 0.0 for name in scores}
        best = max(found, key=lambda name: found[name])
        assert target in PKU_TO_BEAVERTAILS[best] and found[best] > 0.8, (target, best, found[best])


# ------------------------------------------------------------------------------------------------ refusals
def test_what_cannot_be_mapped_is_refused() -> None:
    with pytest.raises(UserError, match="map both to 'common'"):
        map_labels([{"self_harm"}], "pku")
    with pytest.raises(UserError, match="unknown taxonomy 'guard'"):
        map_labels([{"Drugs"}], "guard")
    with pytest.raises(UserError, match="not 'gossip'"):
        map_labels([{"Drugs", "gossip"}], "beavertails")
    with pytest.raises(UserError, match="names of both taxonomies at once"):
        map_labels([{"Drugs", "self_harm"}], "common")
    with pytest.raises(ValueError, match="14 columns for 19 categories"):
        map_verdicts(verdicts(np.zeros((1, 14))), PKU_CATEGORIES)
