"""Sources: any file becomes canonical rows by a mapping; what cannot is refused in one line with the mend."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from saferlhf.config.schema import AnnotatorsConfig, DataConfig
from saferlhf.data.build import Splits, build_data, data_fingerprint
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer, Row, Turn
from saferlhf.data.sources import load_source
from saferlhf.data.splits import prompt_key
from saferlhf.errors import UserError

Make = Callable[..., DataConfig]

PKU = {
    "prompt": "q",
    "response_0": "a",
    "response_1": "b",
    "prompt_source": "extra",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "response_0_harm_category": {"Violence": True, "Drugs": False},
    "response_1_harm_category": {"Violence": False, "Drugs": False},
    "response_0_severity_level": 3,
    "response_1_severity_level": 0,
    "better_response_id": 0,
    "safer_response_id": 1,
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_one(cfg: DataConfig, kind: type[Row]) -> Any:
    return load_source(cfg, kind, ()).train[0]


def test_pku_names_need_no_mapping(tmp_path: Path, file_config: Make) -> None:
    row = read_one(file_config(write(tmp_path / "a.jsonl", [PKU])), PreferencePair)
    assert row.prompt == (Turn("user", "q"),) and (row.response_0, row.response_1) == ("a", "b")
    assert (row.is_response_0_safe, row.is_response_1_safe) == (False, True)
    assert (row.response_0_harm_category, row.response_1_harm_category) == (frozenset({"Violence"}), frozenset())
    assert (row.response_0_severity_level, row.response_1_severity_level) == (3, 0)
    assert (row.better_response_id, row.safer_response_id, row.single_response_id) == (0, 1, None)


def test_ids_are_by_content_only(tmp_path: Path, file_config: Make) -> None:
    first = read_one(file_config(write(tmp_path / "a.jsonl", [PKU])), PreferencePair)
    moved = read_one(file_config(write(tmp_path / "b.jsonl", [PKU | {"more": 1}])), PreferencePair)
    other = read_one(file_config(write(tmp_path / "c.jsonl", [PKU | {"response_1": "c"}])), PreferencePair)
    assert first.id == moved.id != other.id


def test_chosen_and_rejected_need_no_mapping(tmp_path: Path, file_config: Make) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad", "safer_response_id": 1}])
    row = read_one(file_config(path), PreferencePair)
    assert (row.response_0, row.response_1, row.better_response_id, row.single_response_id) == ("good", "bad", 0, 0)
    # an index by side means nothing in such a file
    assert row.safer_response_id is None and row.is_response_0_safe is None


def test_mapping_with_dotted_paths_and_chat_turns(tmp_path: Path, file_config: Make) -> None:
    record = {
        "extra": {"question": [{"role": "human", "text": "q"}]},
        "good": {"role": "assistant", "text": "yes"},
        "bad": [{"role": "assistant", "content": "no"}],
    }
    columns = {"prompt": "extra.question", "chosen": "good", "rejected": "bad"}
    row = read_one(file_config(write(tmp_path / "a.jsonl", [record]), columns=columns), PreferencePair)
    assert row.prompt == (Turn("user", "q"),) and (row.response_0, row.response_1) == ("yes", "no")


def test_whole_conversations_bring_their_prompt(tmp_path: Path, file_config: Make) -> None:
    talk = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "q1"},
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]

    def ending(answer: str) -> list[dict[str, str]]:
        return [*talk, {"role": "assistant", "content": answer}]

    path = write(tmp_path / "a.jsonl", [{"chosen": ending("good"), "rejected": ending("bad")}])
    row = read_one(file_config(path), PreferencePair)
    assert [turn.role for turn in row.prompt] == ["system", "user", "assistant", "user"]
    assert row.prompt[-1].content == "q2" and (row.response_0, row.response_1) == ("good", "bad")
    other = [{"role": "user", "content": "else"}, {"role": "assistant", "content": "bad"}]
    path = write(tmp_path / "b.jsonl", [{"chosen": ending("good"), "rejected": other}])
    with pytest.raises(UserError, match=r"differ before their last turn.*b\.jsonl:1"):
        read_one(file_config(path), PreferencePair)


def test_answers_and_prompts(tmp_path: Path, file_config: Make) -> None:
    record = {"prompt": "q", "response": "a", "is_safe": True, "category": {"x": True}, "severity_level": None}
    path = write(tmp_path / "a.jsonl", [record])
    row = read_one(file_config(path, columns={"harm_category": "category"}), QuestionAnswer)
    assert (row.response, row.is_safe, row.harm_category, row.severity_level) == ("a", True, frozenset({"x"}), None)
    assert read_one(file_config(path), PromptRow).prompt == (Turn("user", "q"),)


def test_demonstrations_from_the_chosen_side(tmp_path: Path, file_config: Make) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "chosen": "good", "rejected": "bad"}])
    assert read_one(file_config(path, columns={"response": "chosen"}), QuestionAnswer).response == "good"


def test_csv_words_become_labels(tmp_path: Path, file_config: Make) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(
            ["prompt", "response_0", "response_1", "is_response_0_safe", "safer_response_id", "better_response_id"]
        )
        writer.writerow(["q", "a", "b", "False", "1", ""])
    row = read_one(file_config(path), PreferencePair)
    assert (row.is_response_0_safe, row.safer_response_id, row.better_response_id) == (False, 1, None)


def answer(**changes: Any) -> dict[str, Any]:
    return {"prompt": "q", "response": "a"} | changes


@pytest.mark.parametrize(
    ("record", "columns", "message"),
    [
        ({"question": "q", "response": "a"}, None, r"'prompt' is missing.*question.*data\.columns\.prompt=COLUMN"),
        ({"prompt": "q"}, None, r"'response' is missing.*data\.columns\.response=COLUMN"),
        (answer(), {"prompt": "promt"}, r"no column 'promt'.*did you mean prompt"),
        (answer(), {"promt": "prompt"}, r"no canonical column 'promt'.*did you mean prompt"),
        (answer(prompt=3), None, "'prompt' holds a int, text"),
        (answer(response=None), None, "'response' holds nothing, text"),
        (answer(is_safe="perhaps"), None, "'is_safe' holds a str, true or false"),
        (answer(severity_level=4), None, "severity from 0 to 3"),
        (answer(harm_category=1), None, r"harm_category.*list of names"),
        (answer(prompt=[{"role": "user"}]), None, "role and content"),
        (answer(prompt=[{"role": "oracle", "content": "q"}]), None, "unknown role 'oracle'"),
        (answer(prompt=[{"role": "assistant", "content": "q"}]), None, "ends with a user turn"),
    ],
)
def test_wrong_rows_are_refused_with_place_and_mend(
    tmp_path: Path, file_config: Make, record: dict[str, Any], columns: Any, message: str
) -> None:
    path = write(tmp_path / "a.jsonl", [record])
    with pytest.raises(UserError, match=message) as caught:
        load_source(file_config(path, columns=columns), QuestionAnswer, ())
    assert "\n" not in str(caught.value)
    if "canonical" not in message:
        assert "a.jsonl:1" in str(caught.value)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": "q", "good": "a"}, r"'response_0' is missing.*data\.columns\.chosen=COLUMN"),
        ({"prompt": "q", "chosen": "a"}, "'rejected' is missing"),
        (PKU | {"better_response_id": 2}, "'better_response_id' holds 2"),
    ],
)
def test_wrong_pairs_are_refused(tmp_path: Path, file_config: Make, record: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_source(file_config(write(tmp_path / "a.jsonl", [record])), PreferencePair, ())


def test_a_bad_value_far_below_is_named_by_its_line(tmp_path: Path, file_config: Make) -> None:
    rows: list[dict[str, Any]] = [{"prompt": f"q{i}", "response": "a"} for i in range(200)]
    rows[150]["response"] = 7
    found = load_source(file_config(write(tmp_path / "a.jsonl", rows)), QuestionAnswer, ())
    (bad,) = found.bad["train"]
    assert bad.place.endswith("a.jsonl:151") and (bad.kind, bad.before, len(found.train)) == ("non_text", 150, 199)


def test_empty_files_and_missing_paths(tmp_path: Path, file_config: Make) -> None:
    with pytest.raises(UserError, match=r"no rows.*empty"):
        build_data(file_config(write(tmp_path / "a.jsonl", [])), PreferencePair)
    with pytest.raises(UserError, match=r"data\.path="):
        build_data(DataConfig(name="mine", source="file"), PreferencePair)
    with pytest.raises(UserError, match="known are toyworld, file, mix"):
        build_data(DataConfig(name="mine", source="web"), PreferencePair)


def test_a_task_names_the_labels_it_misses(tmp_path: Path, file_config: Make) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    needs = ("safer_response_id", "is_response_0_safe", "is_response_1_safe")
    with pytest.raises(UserError) as caught:
        build_data(file_config(path), PreferencePair, needs)
    message = str(caught.value)
    assert all(name in message for name in needs)
    assert "labels found: better_response_id, single_response_id" in message
    assert build_data(file_config(path), PreferencePair, ("better_response_id",)).train


# ------------------------------------------------------------------------------------------------ splits
def pairs(n: int, prompts: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {i % prompts}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(n)]


def keys(rows: Sequence[Row]) -> set[str]:
    return {prompt_key(row.prompt) for row in rows}


def all_ids(data: Splits[Any]) -> list[str]:
    return [row.id for rows in (data.train, data.val, data.test) for row in rows]


def test_no_prompt_is_in_two_splits(tmp_path: Path, file_config: Make) -> None:
    rows = pairs(600, 200)
    rows[0]["prompt"] = "  question 7!! "  # the same words as "Question 7"
    data = build_data(
        file_config(write(tmp_path / "a.jsonl", rows), val_fraction=0.2, test_fraction=0.3), PreferencePair
    )
    train, val, test = keys(data.train), keys(data.val), keys(data.test)
    assert not train & val and not train & test and not val & test
    assert len(all_ids(data)) == len(set(all_ids(data))) == 600
    assert 0.4 < len(train) / 200 < 0.6 and 0.1 < len(val) / 200 < 0.3 and 0.2 < len(test) / 200 < 0.4
    assert data.report.kept == {"train": len(data.train), "val": len(data.val), "test": len(data.test)}


def test_splits_follow_the_seed_and_not_the_other_rows(tmp_path: Path, file_config: Make) -> None:
    few, many = write(tmp_path / "few.jsonl", pairs(300, 300)), write(tmp_path / "many.jsonl", pairs(600, 600))
    small, large = build_data(file_config(few), PreferencePair), build_data(file_config(many), PreferencePair)
    assert keys(small.test) < keys(large.test) and keys(small.val) < keys(large.val)
    assert keys(build_data(file_config(few, seed=1), PreferencePair).test) != keys(small.test)


@pytest.mark.parametrize("seed", range(5))
def test_tiny_files_have_all_splits_or_say_why(tmp_path: Path, file_config: Make, seed: int) -> None:
    path = write(tmp_path / "a.jsonl", pairs(3, 3))
    data = build_data(file_config(path, seed=seed), PreferencePair)
    assert [len(rows) for rows in (data.train, data.val, data.test)] == [1, 1, 1]
    with pytest.raises(UserError, match="2 distinct prompts cannot be split into 3"):
        build_data(file_config(write(tmp_path / "b.jsonl", pairs(9, 2)), seed=seed), PreferencePair)
    with pytest.raises(UserError, match="leave no rows to train on"):
        build_data(file_config(path, val_fraction=0.5, test_fraction=0.5), PreferencePair)


def test_a_test_file_keeps_its_prompts_out_of_training(tmp_path: Path, file_config: Make) -> None:
    train, test = write(tmp_path / "train.jsonl", pairs(100, 100)), write(tmp_path / "t.jsonl", pairs(10, 10))
    data = build_data(file_config(train, test_path=str(test)), PreferencePair)
    assert len(data.test) == 10 and len(data.train) + len(data.val) == 90 and data.val
    overlap = data.report.finding("overlap", "train")
    assert (overlap.found, overlap.dropped, overlap.detail) == (10, 10, {"with_test": 10})
    assert not keys(data.test) & (keys(data.train) | keys(data.val))


def test_a_folder_with_splits_of_its_own(tmp_path: Path, file_config: Make) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "train.jsonl", pairs(50, 50))
    write(folder / "test.jsonl", [{"prompt": "other", "chosen": "x", "rejected": "y"}])
    data = build_data(file_config(folder, val_fraction=0.0), PreferencePair)
    assert (len(data.train), len(data.val), len(data.test)) == (50, 0, 1)
    assert data.report.files == {"train": ["train.jsonl"], "test": ["test.jsonl"]}
    with pytest.raises(UserError, match="test files of its own"):
        build_data(file_config(folder, test_path=str(folder / "test.jsonl")), PreferencePair)


def test_caps_are_fixed_choices_that_nest(tmp_path: Path, file_config: Make) -> None:
    path = write(tmp_path / "a.jsonl", pairs(200, 200))
    ten = build_data(file_config(path, train_rows=10, val_rows=2, test_rows=3), PreferencePair)
    again = build_data(file_config(path, train_rows=10, val_rows=2, test_rows=3), PreferencePair)
    twenty = build_data(file_config(path, train_rows=20), PreferencePair)
    assert [len(ten.train), len(ten.val), len(ten.test)] == [10, 2, 3]
    assert ten.train == again.train and ten.fingerprint == again.fingerprint
    assert {row.id for row in ten.train} < {row.id for row in twenty.train}


# ------------------------------------------------------------------------------------------------ fingerprints
def test_fingerprints_follow_content_and_labels(tmp_path: Path, file_config: Make) -> None:
    record = [{"prompt": f"q{i}", "response_0": "a", "response_1": "b", "better_response_id": 1} for i in range(9)]
    first, moved = write(tmp_path / "a.jsonl", record), write(tmp_path / "b.jsonl", record)
    record[4] = record[4] | {"better_response_id": 0}
    changed = write(tmp_path / "c.jsonl", record)
    cfgs = [file_config(path, shuffle_sides=False) for path in (first, moved, changed)]
    loaded = [build_data(cfg, PreferencePair).fingerprint for cfg in cfgs]
    cheap = [data_fingerprint(cfg) for cfg in cfgs]
    assert loaded[0] == loaded[1] != loaded[2] and cheap[0] == cheap[1] != cheap[2]
    with_test = data_fingerprint(file_config(first, test_path=str(moved)))
    assert with_test != cheap[0]


def test_toy_world_rows_and_fingerprints() -> None:
    def toy(seed: int) -> DataConfig:
        return DataConfig(name="toyworld", source="toyworld", seed=seed, train_rows=60, val_rows=20, test_rows=20)

    data = build_data(toy(0), PreferencePair, ("better_response_id", "safer_response_id"))
    assert [len(data.train), len(data.val), len(data.test)] == [60, 20, 20]
    assert not keys(data.train) & keys(data.test)
    assert data.fingerprint == build_data(toy(0), PreferencePair).fingerprint
    assert data.fingerprint != build_data(toy(1), PreferencePair).fingerprint
    assert data_fingerprint(toy(0)) == data_fingerprint(toy(0)) != data_fingerprint(toy(1))
    answers = build_data(toy(0), QuestionAnswer, ("is_safe",))
    demonstrations = build_data(toy(0), QuestionAnswer)
    assert all(row.is_safe is not None for row in answers.train)
    assert [row.response for row in answers.train] != [row.response for row in demonstrations.train]


def test_who_labels_the_toy_world() -> None:
    """The annotators of the config reach pairs and labelled answers; demonstrations are not labelled by anyone."""

    def toy(annotators: AnnotatorsConfig | None) -> DataConfig:
        sizes = {"train_rows": 200, "val_rows": 20, "test_rows": 20}
        return DataConfig(name="toyworld", source="toyworld", annotators=annotators, **sizes)

    for kind, needs in (
        (PreferencePair, ("single_response_id",)),
        (QuestionAnswer, ("is_safe",)),
        (QuestionAnswer, ()),
    ):
        usual = build_data(toy(None), kind, needs).train
        assert build_data(toy(AnnotatorsConfig()), kind, needs).train == usual
        others = build_data(toy(AnnotatorsConfig(safety_error=0.4)), kind, needs).train
        assert [row.id for row in others] == [row.id for row in usual]
        assert (others == usual) == (not needs)
    weighed = build_data(toy(AnnotatorsConfig(single_safety=0.0)), PreferencePair, ()).train
    usual = build_data(toy(None), PreferencePair, ()).train
    assert [row.single_response_id for row in weighed] != [row.single_response_id for row in usual]
    assert [row.better_response_id for row in weighed] == [row.better_response_id for row in usual]


# ------------------------------------------------------------------------------------------------ real rows
def test_real_pku_rows(data_root: Path, file_config: Make) -> None:
    folder = data_root / "pku-saferlhf"
    if not folder.is_dir():
        pytest.skip("no PKU-SafeRLHF rows")
    needs = ("better_response_id", "safer_response_id", "is_response_0_safe", "is_response_1_safe")
    data = build_data(file_config(folder), PreferencePair, needs)
    report = data.report.to_dict()
    assert report["read"] == {"train": 2486, "test": 569} and len(data.test) == 569
    assert report["findings"]["overlap"]["train"]["dropped"] > 0  # trap 12
    assert not keys(data.train) & keys(data.test)
    # the better answer is second in 63% of the pairs, the safer in 71%: shuffling takes that away
    assert report["position"]["train"]["better_is_second"] == pytest.approx(0.63, abs=0.03)
    assert report["position"]["train"]["safer_is_second"] == pytest.approx(0.71, abs=0.03)
    after = [row.better_response_id == 1 for row in data.train]
    assert sum(after) / len(after) == pytest.approx(0.5, abs=0.03)
    categories = {name for row in data.train for name in row.response_0_harm_category or ()}
    from saferlhf.data.rows import PKU_CATEGORIES

    assert categories <= set(PKU_CATEGORIES) and len(categories) > 15
    assert all(len(row.prompt) == 1 and row.prompt[0].role == "user" for row in data.train)
