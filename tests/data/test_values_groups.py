"""Labels in other words, strata beside the rows, statements without an answer, one side of pairs."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_lines import composed

from saferlhf.config import checks
from saferlhf.config.checks import check_config
from saferlhf.config.identity import identity_tree
from saferlhf.config.schema import DataConfig, DataPolicyConfig
from saferlhf.config.validate import train_config
from saferlhf.data.build import build_data
from saferlhf.data.melt import ANSWERS, ONE_OF_EACH
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer
from saferlhf.data.sources import load_source
from saferlhf.data.sources.layouts import LAYOUTS
from saferlhf.errors import UserError

Make = Callable[..., DataConfig]
STATEMENTS = {"prompt": "text", "response": "text", "is_safe": "verdict"}
WHOLE: dict[str, Any] = {"val_fraction": 0, "test_fraction": 0}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as CSV or JSON lines, by the file's name."""
    if path.suffix == ".csv":
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def composed_data(*words: str) -> DataConfig:
    """The data config of a command, checked as a run does it."""
    config = train_config(composed("task=moderator", "backbone=smollm2", "adapter=lora", *words))
    check_config(config)
    return config.data


# ------------------------------------------------------------------------------------------------ values
@pytest.mark.parametrize("end", ["csv", "jsonl"])
def test_labels_in_other_words(tmp_path: Path, file_config: Make, end: str) -> None:
    verdicts = ["rude", "kind", " Kind ", "", "perhaps", "unclear"]
    path = write(tmp_path / f"a.{end}", [{"text": f"t{i}", "verdict": v} for i, v in enumerate(verdicts)])
    values = {"is_safe": {"rude": False, "kind": True, "unclear": None}}
    found = load_source(file_config(path, columns=STATEMENTS, values=values), QuestionAnswer, ())
    assert [(row.prompt[0].content, row.is_safe) for row in found.train if isinstance(row, QuestionAnswer)] == [
        ("t0", False),
        ("t1", True),
        ("t2", True),
        ("t3", None),
        ("t5", None),
    ]
    (bad,) = found.bad["train"]
    assert bad.kind == "bad_label" and "'verdict'" in str(bad) and "data.values.is_safe" in str(bad)
    assert bad.place == f"{path}:{6 if end == 'csv' else 5}" and "perhaps" not in str(bad), "no text of a row"


@pytest.mark.parametrize("raw", [0, 0.0, "0", " 0"])
def test_numbers_and_flags_are_listed_however_they_are_written(tmp_path: Path, file_config: Make, raw: Any) -> None:
    path = write(tmp_path / "a.jsonl", [{"text": "t", "verdict": raw}, {"text": "u", "verdict": True}])
    cfg = file_config(path, columns=STATEMENTS, values={"is_safe": {0: True, True: False}})
    assert cfg.values == {"is_safe": {"0": True, "True": False}}, "keys of one type, for the config's identity"
    rows = load_source(cfg, QuestionAnswer, ()).train
    assert [row.is_safe for row in rows if isinstance(row, QuestionAnswer)] == [True, False]


def test_values_of_every_kind_of_label(tmp_path: Path, file_config: Make) -> None:
    row = {"prompt": "q", "response_0": "a", "response_1": "b", "better_response_id": "B", "safer_response_id": "tie"}
    row |= {"is_response_0_safe": "no", "response_0_severity_level": "high", "response_0_harm_category": "drugs"}
    values = {
        "better_response_id": {"A": 0, "B": 1},
        "safer_response_id": {"tie": -1},
        "is_response_0_safe": {"no": False, "yes": True},
        "response_0_severity_level": {"high": 3},
        "response_0_harm_category": {"drugs": ["Drugs"], "none": []},
    }
    path = write(tmp_path / "a.csv", [row])
    (read,) = load_source(file_config(path, values=values), PreferencePair, ()).train
    assert isinstance(read, PreferencePair)
    assert (read.better_response_id, read.safer_response_id, read.is_response_0_safe) == (1, None, False)
    assert (read.response_0_severity_level, read.response_0_harm_category) == (3, frozenset({"Drugs"}))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"is_save": {"a": True}}, r"no label column 'is_save'.*data\.values\.is_save.*did you mean is_safe"),
        ({"prompt": {"a": "b"}}, "no label column 'prompt'"),
        ({"group": {"a": "b"}}, "no label column 'group'"),
        ({"is_safe": {"rude": "perhaps"}}, r"'rude' stands for 'perhaps', true or false is needed.*data\.values"),
        ({"severity_level": {"bad": 7}}, "a severity from 0 to 3 is needed"),
        ({"is_safe": {"rude": False, "Rude": True}}, "'Rude' is listed twice"),
        ({"severity_level": {"bad": 3}}, r"data\.values\.severity_level is given and no column feeds"),
    ],
)
def test_impossible_values_are_refused(tmp_path: Path, file_config: Make, values: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.csv", [{"text": "t", "verdict": "rude"}])
    with pytest.raises(UserError, match=message) as caught:
        load_source(file_config(path, columns=STATEMENTS, values=values), QuestionAnswer, ())
    assert "\n" not in str(caught.value)


def test_values_by_command(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", [{"text": f"t{i}", "verdict": i % 2} for i in range(4)])
    words = ["data=jsonl", f"data.path={path}", "data.columns={prompt: text, response: text, is_safe: verdict}"]
    cfg = composed_data(*words, "data.values={is_safe: {0: true, 1: false}}", "data.split=test")
    assert [row.is_safe for row in build_data(cfg, QuestionAnswer, ("is_safe",)).test] == [True, False, True, False]
    for values in ("{is_safe: false}", "{is_safe: {}}"):
        with pytest.raises(UserError, match=r"a mapping of the file's values.*data\.values\.is_safe"):
            composed_data(*words, f"data.values={values}")
    with pytest.raises(UserError, match=r"data\.values would be ignored"):
        check_config(train_config(composed("task=reward", "data.values={is_safe: {a: true}}")))
    parts = "data.parts={beavertails: {}}"
    for key in ("values={is_safe: {a: true}}", "named_splits=false"):
        with pytest.raises(UserError, match="parts have their own files"):
            composed_data("data=mix", parts, f"data.{key}")


def test_keys_that_are_not_given_leave_no_trace() -> None:
    def tree(**given: Any) -> dict[str, Any]:
        return identity_tree(DataConfig("mine", "file", **given), lambda key, value: "content")

    assert not {"values", "named_splits"} & set(tree())
    given = tree(values={"is_safe": {"a": True}}, named_splits=False)
    assert given["values"] == {"is_safe": {"a": True}} and given["named_splits"] is False


def test_the_config_knows_the_choices_of_the_code() -> None:
    assert (*LAYOUTS,) == checks.LAYOUTS[1:] and checks.LAYOUTS[0] == "auto"
    assert (*ANSWERS,) == checks.ANSWERS and set(ONE_OF_EACH) < set(ANSWERS)


# ------------------------------------------------------------------------------------------------ groups
def test_groups_stand_beside_the_rows(tmp_path: Path, file_config: Make) -> None:
    rows = [
        {"prompt": "q0", "response": "a", "language": "de", "topic": "bread"},
        {"prompt": "q1", "response": "a", "language": "en", "topic": None},
        {"prompt": "q2", "response": "a", "language": "", "topic": ""},
        {"prompt": "q3", "response": "a", "language": 3, "topic": True},
    ]
    path = write(tmp_path / "a.jsonl", rows)

    def groups(column: Any, kind: type[Any] = QuestionAnswer) -> list[str | None]:
        data = build_data(file_config(path, columns={"group": column}, **WHOLE), kind)
        assert set(data.groups) <= {row.id for row in data.train}
        return [data.groups.get(row.id) for row in data.train]

    assert groups("language") == ["de", "en", None, "3"]
    assert groups("language + topic") == ["de/bread", "en", None, "3/True"]
    assert groups(["region", "topic"]) == ["bread", None, None, "True"]
    assert groups("language", PromptRow) == ["de", "en", None, "3"], "prompts too"
    assert build_data(file_config(path, **WHOLE), QuestionAnswer).groups == {}
    with pytest.raises(UserError, match=r"no column 'tongue'.*data\.columns\.group=COLUMN"):
        groups("tongue")


def test_a_group_is_one_value(tmp_path: Path, file_config: Make) -> None:
    rows = [{"prompt": f"q{i}", "response": "a", "group": ["a"], "tags": ["b"]} for i in range(3)]
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(UserError, match=r"column 'tags' holds no single value.*a\.jsonl:1"):
        build_data(file_config(path, columns={"group": "tags"}, **WHOLE), QuestionAnswer)
    # an object that happens to be called so was read before there were groups
    assert len(build_data(file_config(path, **WHOLE), QuestionAnswer).train) == 3
    named = write(tmp_path / "b.jsonl", [{"prompt": "q", "response": "a", "group": "de"}])
    assert list(build_data(file_config(named, **WHOLE), QuestionAnswer).groups.values()) == ["de"]
    left_out = file_config(named, columns={"group": None}, **WHOLE)
    assert build_data(left_out, QuestionAnswer).groups == {}


def test_the_group_changes_neither_rows_nor_their_fingerprint(tmp_path: Path, file_config: Make) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": f"q{i}", "response": "a", "topic": "x"} for i in range(5)])
    plain = build_data(file_config(path, **WHOLE), QuestionAnswer)
    grouped = build_data(file_config(path, columns={"group": "topic"}, **WHOLE), QuestionAnswer)
    assert grouped.train == plain.train and grouped.fingerprint == plain.fingerprint and len(grouped.groups) == 5


@pytest.mark.parametrize("policy", ["keep", "drop"])
def test_a_kept_duplicate_stays_in_its_own_group(tmp_path: Path, file_config: Make, policy: str) -> None:
    rows = [{"prompt": "q", "response": "a", "topic": topic} for topic in ("bread", "soup", None, "salt")]
    cfg = file_config(
        write(tmp_path / "a.jsonl", rows),
        columns={"group": "topic"},
        policy=DataPolicyConfig(duplicate=policy),
        split="test",
    )
    data = build_data(cfg, QuestionAnswer)
    groups = [data.groups.get(row.id) for row in data.test]
    assert groups == (["bread", "soup", None, "salt"] if policy == "keep" else ["bread"])


def test_groups_are_kept_through_melting_and_chosen_style(tmp_path: Path, file_config: Make) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": f"b{i}", "topic": f"t{i}"} for i in range(3)]
    cfg = file_config(write(tmp_path / "a.jsonl", rows), columns={"group": "topic"}, **WHOLE)
    for kind, count in ((PreferencePair, 3), (QuestionAnswer, 6), (PromptRow, 3)):
        data = build_data(cfg, kind)
        assert len(data.train) == count == len(data.groups)
        assert all(data.groups[row.id] == f"t{row.prompt[0].content[1:]}" for row in data.train)


def test_groups_of_a_mixture(tmp_path: Path) -> None:
    for name in ("one", "two"):
        rows = [{"text": f"{name} {i}", "verdict": "kind", "tongue": f"{name}{i % 2}"} for i in range(4)]
        write(tmp_path / f"{name}.csv", rows)
    part = "columns: {prompt: text, response: text, is_safe: verdict, group: tongue}, values: {is_safe: {kind: true}}"
    parts = ", ".join(f"{name}: {{name: jsonl, path: {tmp_path / name}.csv, {part}}}" for name in ("one", "two"))
    cfg = composed_data("data=mix", f"data.parts={{{parts}}}", "data.val_fraction=0", "data.test_fraction=0")
    data = build_data(cfg, QuestionAnswer, ("is_safe",))
    assert len(data.train) == 8 and all(row.is_safe for row in data.train)
    assert all(data.groups[row.id][:3] == row.prompt[0].content[:3] for row in data.train)
    assert set(data.groups.values()) == {"one0", "one1", "two0", "two1"}


# ------------------------------------------------------------------------------------------------ statements
def test_a_statement_is_prompt_and_response(tmp_path: Path, file_config: Make) -> None:
    rows = [{"text": text, "verdict": "1"} for text in ("good bread", "  ", "good soup", "good bread")]
    cfg = file_config(write(tmp_path / "a.csv", rows), columns=STATEMENTS, split="test")
    data = build_data(cfg, QuestionAnswer, ("is_safe",))
    assert [(row.prompt[0].content, row.response, row.is_safe) for row in data.test] == [
        ("good bread", "good bread", True),
        ("good soup", "good soup", True),
    ]
    found = data.report.to_dict()["findings"]
    assert {kind: counts["test"]["dropped"] for kind, counts in found.items()} == {"empty": 1, "duplicate": 1}
    assert len(build_data(cfg, PromptRow).test) == 2


# ------------------------------------------------------------------------------------------------ one side of pairs
def test_one_answer_of_each_pair(tmp_path: Path, file_config: Make) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": "q", "response_0": "a", "response_1": "b", "is_response_0_safe": True, "is_response_1_safe": False},
        {"prompt": "q", "response_0": "a", "response_1": "c", "is_response_0_safe": False, "is_response_1_safe": True},
        {"prompt": "r", "response_0": "d", "response_1": "e", "is_response_0_safe": True, "is_response_1_safe": True},
    ]
    path = write(tmp_path / "a.jsonl", [{**row, "topic": f"t{i}"} for i, row in enumerate(rows)])

    def answers(which: str) -> list[tuple[str, bool | None, str]]:
        cfg = file_config(path, answers=which, split="test", columns={"group": "topic"})
        data = build_data(cfg, QuestionAnswer, ("is_safe",))
        assert len({row.id for row in data.test}) == len(data.test)
        return [(row.response, row.is_safe, data.groups[row.id]) for row in data.test]

    # sides as the file has them, though the pairs themselves are shuffled; every pair has its answer
    assert answers("response_0") == [("a", True, "t0"), ("a", False, "t1"), ("d", True, "t2")]
    assert answers("response_1") == [("b", False, "t0"), ("c", True, "t1"), ("e", True, "t2")]
    assert len(answers("all")) == 5
