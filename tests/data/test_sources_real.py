"""Every real file that is of a known kind loads by config alone, with the counts that its SOURCE.md states."""

from __future__ import annotations

import functools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command_lines import composed

from saferlhf.config.schema import DataConfig
from saferlhf.config.validate import train_config
from saferlhf.data.build import Splits, build_data, data_fingerprint
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer, Row
from saferlhf.data.splits import prompt_key
from saferlhf.data.taxonomy import BEAVERTAILS_CATEGORIES, PKU_CATEGORIES, taxonomy_of

PAIRS, ANSWERS, PROMPTS = PreferencePair, QuestionAnswer, PromptRow
SAFE = ("is_response_0_safe", "is_response_1_safe")
COST = ("safer_response_id", *SAFE)


def config_of(root: Path, words: str) -> DataConfig:
    if not root.is_dir():
        pytest.skip("no real rows")
    # near copies are another test's business, and take a second on many prompts
    words += " data.policy.near_overlap=off"
    return train_config(composed("task=reward", *words.format(root=root).split())).data


@functools.cache  # a few tests look at the same rows
def load(root: Path, words: str, kind: type[Row], needs: tuple[str, ...] = ()) -> Splits[Any]:
    cfg = config_of(root, words)
    places = [Path(cfg.path)] if cfg.path else [root / name for name in cfg.folder]
    if not any(place.exists() for place in places):
        pytest.skip(f"no rows for {words}")
    return build_data(cfg, kind, needs)


FILES: list[tuple[str, type[Row], tuple[str, ...], dict[str, int]]] = [
    # words, kind, needed labels, rows by SOURCE.md
    ("data=pku_saferlhf data.root={root}", PAIRS, COST, {"train": 2486, "test": 569}),
    ("data=pku_saferlhf data.root={root}", ANSWERS, ("is_safe", "severity_level"), {"train": 2486, "test": 569}),
    ("data=pku_saferlhf data.root={root}", PROMPTS, (), {"train": 2486, "test": 569}),
    ("data=pku_saferlhf data.path={root}/pku-saferlhf/train.parquet", PAIRS, COST, {"train": 2486}),
    ("data=safety_pairs data.root={root}", PAIRS, COST, {"train": 3444}),
    ("data=safety_pairs data.root={root}", ANSWERS, ("is_safe",), {"train": 3444}),
    ("data=safety_pairs data.subset=sft data.root={root}", ANSWERS, (), {"train": 3475}),
    ("data=guard_suite data.root={root}", ANSWERS, ("is_safe",), {"train": 0, "test": 1346}),
    ("data=beavertails_test data.root={root}", ANSWERS, ("is_safe", "harm_category"), {"train": 0, "test": 1987}),
    (
        "data=guard_suite data.path={root}/beavertails-30k-test/0_A_beaver_tails.json.gz",
        ANSWERS,
        ("is_safe",),
        {"train": 0, "test": 1987},
    ),
    (
        "data=jsonl data.path={root}/beavertails-30k-test/beavertails_30k.json.gz ++data.columns.prompt=text",
        PROMPTS,
        (),
        {"train": 1987},
    ),
    ("data=beavertails_evaluation data.root={root}", PROMPTS, (), {"train": 0, "test": 700}),
    ("data=hh_rlhf data.root={root}", PAIRS, ("better_response_id",), {"train": 2312 + 2332}),
    ("data=hh_rlhf data.subset=harmless data.root={root}", PAIRS, ("single_response_id",), {"train": 2312}),
    ("data=hh_rlhf data.subset=helpful data.root={root}", PAIRS, ("better_response_id",), {"train": 2332}),
    ("data=hh_rlhf data.root={root}", PROMPTS, (), {"train": 2312 + 2332}),
    ("data=jsonl data.path={root}/hh-rlhf-test/harmless-base_test.jsonl.gz", PAIRS, (), {"train": 2312}),
    ("data=rl_prompts data.root={root}", PROMPTS, (), {"train": 17186, "test": 135}),
    ("data=rl_prompts data.subset=hh_rlhf data.root={root}", PROMPTS, (), {"train": 22490, "test": 200}),
    ("data=rl_prompts data.subset=problems data.split=test data.root={root}", PROMPTS, (), {"train": 0, "test": 83}),
    (
        "data=rl_prompts data.subset=alpaca_eval data.split=test data.root={root}",
        PROMPTS,
        (),
        {"train": 0, "test": 129},
    ),
]


@pytest.mark.parametrize(
    ("words", "kind", "needs", "read"),
    FILES,
    ids=[f"{words.replace('{root}', 'ROOT')} {kind.__name__}" for words, kind, *_ in FILES],
)
def test_a_real_file_loads_by_config_alone(
    data_root: Path, words: str, kind: type[Row], needs: tuple[str, ...], read: dict[str, int]
) -> None:
    data = load(data_root, words, kind, needs)
    report = data.report.to_dict()
    assert report["read"] == read
    not_rows = ("unreadable", "non_text", "bad_label", "severity_range", "unknown_category", "wrong_hash", "unlabelled")
    assert not set(report["findings"]) & set(not_rows), "every record becomes a row"
    rows = [*data.train, *data.val, *data.test]
    assert rows and all(type(row) is kind for row in rows)
    keys = [{prompt_key(row.prompt) for row in part} for part in (data.train, data.val, data.test)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert all(row.prompt[-1].role == "user" and row.prompt[-1].content.strip() for row in rows)
    assert sum(fact.rows or 0 for fact in data.report.facts) >= sum(read.values())


def test_hashes_of_the_real_rows_are_right(data_root: Path) -> None:
    data = load(data_root, "data=pku_saferlhf data.root={root}", PAIRS, COST)
    assert data.report.hash_rule == {
        "train": {"checked": 2 * 2486, "wrong": 0},
        "test": {"checked": 2 * 569, "wrong": 0},
    }


def test_real_pairs_become_answers_with_their_labels(data_root: Path) -> None:
    pairs = load(data_root, "data=pku_saferlhf data.root={root}", PAIRS, COST)
    answers = load(data_root, "data=pku_saferlhf data.root={root}", ANSWERS, ("is_safe",))
    test = {(row.prompt, row.response): row for row in answers.test}
    assert len(test) == len(answers.test) == 2 * 569 - answers.report.melted["test"]["repeated"]
    for row in pairs.test:
        for side in "01":
            answer = test[row.prompt, getattr(row, f"response_{side}")]
            assert answer.is_safe == getattr(row, f"is_response_{side}_safe")
            assert answer.severity_level == getattr(row, f"response_{side}_severity_level")
            assert answer.harm_category == getattr(row, f"response_{side}_harm_category")
    assert taxonomy_of(name for row in answers.train for name in row.harm_category) == PKU_CATEGORIES


def test_real_hh_dialogues_end_with_the_answer(data_root: Path) -> None:
    data = load(data_root, "data=hh_rlhf data.subset=harmless data.root={root}", PAIRS)
    rows = [*data.train, *data.val, *data.test]
    turns = Counter(len(row.prompt) for row in rows)
    assert set(turns) >= {1, 3, 5} and all(count % 2 == 1 for count in turns), "speakers take turns"
    assert all([turn.role for turn in row.prompt[:2]] == ["user", "assistant"][: len(row.prompt)] for row in rows)
    # some responses of these models go on with a Human turn of their own making; the dialogue itself leaves none
    assert not any("\n\nAssistant:" in text for row in rows for text in (row.response_0, row.response_1))
    assert {row.better_response_id for row in rows} == {0, 1}, "sides are shuffled"


def test_the_joined_beavertails_rows_follow_the_rule_of_their_labels(data_root: Path) -> None:
    data = load(data_root, "data=beavertails_test data.root={root}", ANSWERS, ("is_safe", "harm_category"))
    assert "contradictory" not in data.report.findings, "safe <=> no category: the two files are of the same rows"
    assert taxonomy_of(name for row in data.test for name in row.harm_category) == BEAVERTAILS_CATEGORIES
    assert 0.5 < sum(not row.is_safe for row in data.test) / len(data.test) < 0.65


def test_the_guard_layout_of_the_balanced_set(data_root: Path) -> None:
    data = load(data_root, "data=guard_suite data.root={root}", ANSWERS, ("is_safe",))
    assert len(data.test) == 1346, "rows of a published test are kept, repeated ones too"
    assert 0.49 < sum(row.is_safe for row in data.test) / 1346 < 0.51
    assert len({row.id for row in data.test}) == 1346


def test_trained_on_one_set_and_tested_on_another(data_root: Path) -> None:
    words = "data=mix data.root={root} ++data.parts.safety_pairs.rows=500 ++data.parts.pku_saferlhf.split=test"
    cfg = config_of(data_root, words)
    load(data_root, "data=safety_pairs data.root={root}", PAIRS, COST)  # or skip
    data = build_data(cfg, PAIRS, COST)
    assert len(data.test) == 569 and len(data.train) + len(data.val) <= 500
    assert not {prompt_key(row.prompt) for row in data.test} & {prompt_key(row.prompt) for row in data.train}
    assert data_fingerprint(cfg) == data_fingerprint(cfg)
