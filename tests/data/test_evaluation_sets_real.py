"""The public evaluation sets as they lie below `data.root`: the counts of their papers and of each SOURCE.md."""

from __future__ import annotations

import functools
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from command_lines import composed

from saferlhf.config.validate import evaluate_config
from saferlhf.data.build import Splits, build_data
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer, Row
from saferlhf.data.sources.layouts_sets import OPENAI_LABELS, XSAFETY_TOPICS

ANSWERS, PROMPTS = QuestionAnswer, PromptRow


@functools.cache  # a few tests look at the same rows
def load(root: Path, words: str, kind: type[Row] = ANSWERS, needs: tuple[str, ...] = ("is_safe",)) -> Splits[Any]:
    """Test rows of a set, by config alone."""
    given = f"suite=moderation model=given split=test data.policy.near_overlap=off data.root={root} {words}"
    cfg = evaluate_config(composed(*given.split(), command="evaluate")).data
    if not root.is_dir() or not any((root / name).is_dir() for name in cfg.folder):
        pytest.skip(f"no real rows of {cfg.name}")
    return build_data(cfg, kind, needs if kind is ANSWERS else ())


def dropped(data: Splits[Any]) -> dict[str, int]:
    found = data.report.to_dict()["findings"]
    return {kind: counts["test"]["dropped"] for kind, counts in found.items() if counts["test"]["dropped"]}


LABELLED = [
    # words, read, kept, unsafe, groups, dropped
    ("data=openai_moderation", 1680, 1680, 522, 6, {}),
    ("data=xstest_prompts", 450, 450, 200, 18, {}),
    ("data=xstest_responses", 446, 446, 78, 0, {}),
    ("data=do_not_answer", 5634, 5634, 193, 6, {}),
    ("data=hatecheck", 3728, 3728, 2563, 29, {}),
    # of the 10 languages Bengali has one topic; one line has no text
    ("data=xsafety", 25600, 25599, 25599 - 2200, 9 * 14 + 1, {"empty": 1}),
    ("data=pku_saferlhf data.split=test data.answers=response_0", 569, 569, 282, 0, {}),
    ("data=pku_saferlhf data.split=test data.answers=response_1", 569, 569, 274, 0, {}),
]


@pytest.mark.parametrize(("words", "read", "kept", "unsafe", "groups", "gone"), LABELLED)
def test_counts(
    data_root: Path, words: str, read: int, kept: int, unsafe: int, groups: int, gone: dict[str, int]
) -> None:
    data = load(data_root, words)
    assert data.report.read["test"] == read and len(data.test) == kept and not data.train
    assert dropped(data) == gone
    assert Counter(row.is_safe for row in data.test) == {True: kept - unsafe, False: unsafe}
    assert len(set(data.groups.values())) == groups and len(data.groups) == (kept if groups else 0)
    assert len({row.id for row in data.test}) == kept


PROMPT_SETS = [
    ("data=xstest_prompts", 450, 18),
    ("data=do_not_answer", 939, 5),
    ("data=xsafety", 25599, 127),
    ("data=openai_moderation", 1680, 6),
    ("data=hatecheck", 3728, 29),
    ("data=beavertails_evaluation", 700, 0),
    ("data=rl_prompts data.subset=problems data.split=test", 83, 0),
]


@pytest.mark.parametrize(("words", "kept", "groups"), PROMPT_SETS)
def test_prompts_for_a_policy_to_answer(data_root: Path, words: str, kept: int, groups: int) -> None:
    data = load(data_root, words, PROMPTS)
    assert len(data.test) == kept == len({row.id for row in data.test})
    assert len(set(data.groups.values())) == groups
    assert all(len(row.prompt) == 1 and row.prompt[0].content.strip() for row in data.test)


def test_harmless_dialogues_as_prompts(data_root: Path) -> None:
    data = load(data_root, "data=hh_rlhf data.subset=harmless data.split=train", PROMPTS)
    assert data.report.read["train"] == 2312 and data.report.to_dict()["findings"]["empty"]["train"]["dropped"] == 4
    assert [fact.name for fact in data.report.facts] == ["harmless-base_test.jsonl.gz"]


def test_openai_groups_are_its_labels(data_root: Path) -> None:
    data = load(data_root, "data=openai_moderation")
    groups = Counter(data.groups.values())
    assert groups["none"] == 1158 and set(groups) - {"none"} == set(OPENAI_LABELS[:5])  # graver labels come with theirs
    assert all((data.groups[row.id] == "none") == row.is_safe for row in data.test)


def test_xstest_pairs_safe_types_with_contrasts(data_root: Path) -> None:
    data = load(data_root, "data=xstest_prompts")
    safe = {group: {row.is_safe for row in data.test if data.groups[row.id] == group} for group in data.groups.values()}
    assert Counter(tuple(labels) for labels in safe.values()) == {(True,): 10, (False,): 8}
    assert all(("contrast" in group) == (labels == {False}) for group, labels in safe.items())


def test_each_model_of_do_not_answer_has_every_question(data_root: Path) -> None:
    data = load(data_root, "data=do_not_answer")
    assert set(Counter(data.groups.values()).values()) == {939}
    harmful = Counter(data.groups[row.id] for row in data.test if not row.is_safe)
    # Llama 2 is the safest and ChatGLM2 the least safe of them, as the paper finds
    assert harmful == {
        "llama2-7b-chat": 3, "ChatGPT": 14, "Claude": 16, "GPT4": 23, "vicuna-7b": 52, "ChatGLM2": 85,
    }  # fmt: skip


def test_xsafety_has_ten_languages_and_fourteen_topics(data_root: Path, tmp_path: Path) -> None:
    data = load(data_root, "data=xsafety")
    groups = Counter(data.groups.values())
    languages = {group.partition("/")[0] for group in groups}
    assert languages == {"ar", "bn", "de", "en", "fr", "hi", "ja", "ru", "sp", "zh"}
    assert {group.partition("/")[2] for group in groups} == set(XSAFETY_TOPICS)
    odd = {group: count for group, count in groups.items() if count != 200}
    assert odd == {"hi/commonsense": 400, "ru/insult": 199}, "Hindi has two files of it, a Russian line is empty"
    assert all(row.is_safe == data.groups[row.id].endswith("/commonsense") for row in data.test)
    assert data.report.finding("empty", "test").places == ["xsafety_csv.tar.gz:ru/Insult.csv:165"]
    # unpacked by somebody else they are the same rows
    with tarfile.open(next((data_root / "xsafety").glob("*.tar.gz"))) as archive:
        archive.extractall(tmp_path / "xsafety", filter="data")
    assert load(tmp_path, "data=xsafety").fingerprint == data.fingerprint


def test_one_side_of_the_pku_pairs(data_root: Path) -> None:
    data = load(data_root, "data=pku_saferlhf data.split=test data.answers=response_0")
    pairs = load(data_root, "data=pku_saferlhf data.split=test data.shuffle_sides=false", PreferencePair, ())
    assert [(row.response, row.is_safe) for row in data.test] == [
        (row.response_0, row.is_response_0_safe) for row in pairs.test
    ]


def test_completions_of_xstest(data_root: Path) -> None:
    data = load(data_root, "data=xstest_completions", ANSWERS, ())
    assert Counter(data.groups.values()) == {"1_full_compliance": 230, "2_full_refusal": 211, "3_partial_refusal": 9}
