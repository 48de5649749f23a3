"""Layouts, hashes, categories and row-aligned files: records that are no plain columns still become the right rows."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saferlhf.config.schema import DataConfig, DataPolicyConfig
from saferlhf.data.build import build_data
from saferlhf.data.columns import choose_columns
from saferlhf.data.files import Record
from saferlhf.data.parse import BadValue
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer, Turn, prompt_text
from saferlhf.data.sources import SourceRows, load_source
from saferlhf.data.sources.layouts import dialogue_turns
from saferlhf.data.taxonomy import BEAVERTAILS_CATEGORIES, PKU_CATEGORIES, TAXONOMIES, taxonomy_of
from saferlhf.errors import UserError

Make = Callable[..., DataConfig]


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def kinds(found: SourceRows, split: str = "train") -> list[tuple[str, str, int | None]]:
    return [(bad.kind, bad.place.rpartition(":")[2], bad.before) for bad in found.bad.get(split, [])]


# ------------------------------------------------------------------------------------------------ dialogue
def test_a_dialogue_is_split_at_its_turns() -> None:
    text = "\n\nHuman: hi\n\nthere\n\nAssistant: yes?\n\nHuman: Human: odd\n\nAssistant:  fine \n\nAssistant: really"
    assert dialogue_turns(text) == [
        {"role": "Human", "content": "hi\n\nthere"},
        {"role": "Assistant", "content": "yes?"},
        {"role": "Human", "content": "Human: odd"},
        {"role": "Assistant", "content": "fine\n\nreally"},
    ]
    assert dialogue_turns("no marks") == [] and dialogue_turns("intro\n\nHuman: a") == []


def test_dialogues_become_pairs_of_their_last_turn(tmp_path: Path, file_config: Make) -> None:
    start = "\n\nHuman: q1\n\nAssistant: a1\n\nHuman: q2\n\nAssistant:"
    rows: list[Any] = [
        {"chosen": f"{start} good", "rejected": f"{start} bad"},
        {"chosen": "plain text", "rejected": f"{start} bad"},
        {"chosen": f"{start} good", "rejected": "\n\nHuman: other\n\nAssistant: bad"},
        {"chosen": "\n\nHuman: q\n\nAssistant: a\n\nHuman: b", "rejected": "\n\nHuman: q\n\nAssistant: a"},
    ]
    rows += [rows[0]] * 3
    found = load_source(file_config(write(tmp_path / "a.jsonl", rows)), PreferencePair, ())
    row = found.train[0]
    assert isinstance(row, PreferencePair)
    assert row.prompt == (Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2"))
    assert (row.response_0, row.response_1, row.better_response_id) == ("good", "bad", 0)
    assert kinds(found) == [("non_text", "2", 1), ("non_text", "3", 1), ("non_text", "4", 1)]
    # demonstrations and prompts come out of such files too
    prompts = build_data(file_config(tmp_path / "a.jsonl", val_fraction=0, test_fraction=0), PromptRow)
    assert [row.prompt for row in prompts.train] == [row.prompt]


# ------------------------------------------------------------------------------------------------ other layouts
def test_safe_unsafe_pairs_must_be_asked_for(tmp_path: Path, file_config: Make) -> None:
    rows = [{"prompt": "q", "response": ["fine", "harmful"]}, {"prompt": "q", "response": ["one"]}]
    path = write(tmp_path / "a.jsonl", rows)
    found = load_source(file_config(path, layout="safe_unsafe"), PreferencePair, ())
    row = found.train[0]
    assert isinstance(row, PreferencePair)
    assert (row.response_0, row.is_response_0_safe, row.is_response_1_safe) == ("fine", True, False)
    assert (row.safer_response_id, row.better_response_id) == (0, None)
    assert kinds(found) == [("non_text", "2", 1)]
    with pytest.raises(UserError, match="response_0"):
        load_source(file_config(path), PreferencePair, ())


def guard(prompt: str, response: str, label: str) -> dict[str, str]:
    given = f"Human user:\n{prompt}\n\nAI assistant:\n{response}\n\n"
    return {"instruction": "judge", "input": given, "output": f"Completion: None\nResponse: {label}\n"}


def test_the_guard_layout(tmp_path: Path, file_config: Make) -> None:
    rows: list[Any] = [
        guard("q\n\nmore", "a\n\nb", "harmful"),
        guard("q", "c", "unharmful"),
        guard("q", "c", "perhaps"),
        {"input": 3, "output": "Response: harmful"},
        guard("q", "d", "harmful"),
    ]
    found = load_source(file_config(write(tmp_path / "a.jsonl", rows)), QuestionAnswer, ("is_safe",))
    assert [(row.prompt[0].content, row.response, row.is_safe) for row in found.train] == [  # type: ignore[union-attr]
        ("q\n\nmore", "a\n\nb", False),
        ("q", "c", True),
        ("q", "d", False),
    ]
    assert kinds(found) == [("bad_label", "3", 2), ("non_text", "4", 2)]


def joined(folder: Path, beside: list[Any], make: Make) -> SourceRows:
    write(folder / "answers.jsonl", [guard("q0", "a", "harmful"), guard("q1", "b", "unharmful")])
    write(folder / "beside.jsonl", beside)
    cfg = make(folder, layout="guard", join={"beside*": "text"}, columns={"harm_category": "category"})
    return load_source(cfg, QuestionAnswer, ())


def test_row_aligned_files_are_joined_and_checked(tmp_path: Path, file_config: Make) -> None:
    first = {"text": "q0 ", "category": {"self_harm": True}, "response": "ignored"}
    found = joined(tmp_path / "a", [first, {"text": "q1", "category": {"self_harm": False}}], file_config)
    rows = [row for row in found.train if isinstance(row, QuestionAnswer)]
    assert [(row.response, row.is_safe, row.harm_category) for row in rows] == [
        ("a", False, frozenset({"self_harm"})),
        ("b", True, frozenset()),
    ]
    assert found.files == {"train": ["answers.jsonl", "beside.jsonl"]}
    for beside, message in (
        ([first], "no row for .*answers.jsonl:2"),
        ([first, {"text": "other"}], "'text' is not the prompt of .*answers.jsonl:2"),
        ([first, {"text": "q1"}, first], "more rows than the file beside it"),
    ):
        with pytest.raises(UserError, match=message):
            joined(tmp_path / "b", beside, file_config)


# ------------------------------------------------------------------------------------------------ columns
def test_of_several_columns_the_first_that_is_there_counts(tmp_path: Path, file_config: Make) -> None:
    path = write(tmp_path / "a.jsonl", [{"instruction": "q", "text": "t", "response": "a", "is_safe": True}])
    columns = {"prompt": ["question", "instruction", "text"], "is_safe": None}
    row = load_source(file_config(path, columns=columns), QuestionAnswer, ()).train[0]
    assert isinstance(row, QuestionAnswer)
    assert row.prompt == (Turn("user", "q"),) and row.is_safe is None, "null leaves a column out"
    assert load_source(file_config(path, columns=columns), PromptRow, ()).train[0].prompt == row.prompt


def test_categories_as_text(tmp_path: Path, file_config: Make) -> None:
    rows: list[Any] = [
        {"prompt": "q", "response": "a", "harm_category": "{'self_harm': True, 'privacy_violation': False}"},
        {"prompt": "q", "response": "b", "harm_category": '["privacy_violation"]'},
        {"prompt": "q", "response": "c", "harm_category": "perhaps"},
    ]
    found = load_source(file_config(write(tmp_path / "a.jsonl", rows)), QuestionAnswer, ())
    listed = [row.harm_category for row in found.train if isinstance(row, QuestionAnswer)]
    assert listed == [frozenset({"self_harm"}), frozenset({"privacy_violation"})]
    assert kinds(found) == [("bad_label", "3", 2)]


def test_every_kind_of_bad_record_is_named_with_its_place(tmp_path: Path, file_config: Make) -> None:
    good = {"prompt": "q", "response": "a", "is_safe": True, "severity_level": 0, "harm_category": []}
    rows = [
        good,
        good | {"response": 3},
        good | {"prompt": None},
        good | {"response": "\ud83d"},
        good | {"is_safe": "maybe"},
        good | {"severity_level": 4},
        good | {"severity_level": "high"},
        good | {"is_safe": False, "severity_level": 2, "harm_category": ["Drugs", "Being rude"]},
        good | {"sha256": "0" * 64},
        good | {"is_safe": False, "severity_level": 1, "harm_category": ["Drugs"]},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    with path.open("a") as stream:
        stream.write('{"prompt": \n[1]\n')
    with path.open("ab") as binary:
        binary.write(b'{"prompt": "\xff"}\n')
    found = load_source(file_config(path), QuestionAnswer, ())
    assert len(found.train) == 2
    assert kinds(found) == [
        ("non_text", "2", 1),
        ("non_text", "3", 1),
        ("non_text", "4", 1),
        ("bad_label", "5", 1),
        ("severity_range", "6", 1),
        ("bad_label", "7", 1),
        ("unknown_category", "8", 1),
        ("wrong_hash", "9", 1),
        ("unreadable", "11", 2),
        ("unreadable", "12", 2),
        ("unreadable", "13", 2),
    ]
    kept = {bad.kind: bad.row for bad in found.bad["train"] if isinstance(bad.row, QuestionAnswer)}
    assert kept["unknown_category"].harm_category == frozenset({"Drugs"}) and kept["wrong_hash"].response == "a"


def test_a_file_in_which_nothing_is_right_is_refused(tmp_path: Path, file_config: Make) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "q", "response": 3}] * 3)
    with pytest.raises(UserError, match=r"'response' holds a int.*a\.jsonl:1"):
        load_source(file_config(path), QuestionAnswer, ())
    path.write_text("{broken\n")
    with pytest.raises(UserError, match=r"not JSON.*a\.jsonl:1"):
        load_source(file_config(path), QuestionAnswer, ())


# ------------------------------------------------------------------------------------------------ hashes
def sha(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def test_the_hash_rule(tmp_path: Path, file_config: Make) -> None:
    good = {"prompt": "frägen", "response_0": "a", "response_1": "b"}
    good |= {"response_0_sha256": sha("frägena"), "response_1_sha256": sha("frägenb").upper()}
    rows = [
        good,
        good | {"response_1": "c"},
        good | {"prompt": [{"role": "user", "content": "frägen"}]},
        good | {"response_1_sha256": None},
        # these are found by other checks, which must not lose them to this one
        good | {"response_0": "  "},
        good | {"response_1": "a"},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    found = load_source(file_config(path), PreferencePair, ())
    assert kinds(found) == [("wrong_hash", "2", 1)]
    assert found.hash_rule == {"train": {"checked": 11, "wrong": 1}}
    cfg = file_config(path, val_fraction=0, test_fraction=0, policy=DataPolicyConfig(duplicate="keep"))
    report = build_data(cfg, PreferencePair).report.to_dict()
    assert {kind: found["train"]["found"] for kind, found in report["findings"].items()} == {
        "wrong_hash": 1,
        "empty": 1,
        "identical": 1,
        "duplicate": 2,
    }
    unchecked = load_source(file_config(path, check_hashes=False), PreferencePair, ())
    assert not unchecked.bad and not unchecked.hash_rule and len(unchecked.train) == 6


def test_hashes_of_something_else_drop_no_row(tmp_path: Path, file_config: Make) -> None:
    rows = [{"prompt": "q", "response": f"a{i}", "sha256": sha(f"a{i}")} for i in range(20)]
    rows[3]["sha256"] = sha("qa3")
    path = write(tmp_path / "a.jsonl", rows)
    found = load_source(file_config(path), QuestionAnswer, ())
    assert len(found.train) == 20 and not found.bad
    assert found.hash_rule == {"train": {"checked": 20, "wrong": 19}}
    assert found.notes[0].startswith("a.jsonl: 19 rows have hashes of something else")
    strict = load_source(file_config(path, policy=DataPolicyConfig(wrong_hash="error")), QuestionAnswer, ())
    assert len(strict.bad["train"]) == 19


# ------------------------------------------------------------------------------------------------ taxonomy
def test_taxonomies_are_those_of_the_papers() -> None:
    assert {name: (len(names), len(set(names))) for name, names in TAXONOMIES.items()} == {
        "pku": (19, 19),
        "beavertails": (14, 14),
    }
    assert not set(PKU_CATEGORIES) & set(BEAVERTAILS_CATEGORIES)
    assert taxonomy_of(["Drugs"]) == PKU_CATEGORIES and taxonomy_of(["self_harm"]) == BEAVERTAILS_CATEGORIES
    assert taxonomy_of(["self_harm", "Drugs"]) == ("Drugs", "self_harm") and taxonomy_of([]) == ()


def labelled(*names: str) -> list[Any]:
    return [{"prompt": f"q{i}", "response": "a", "harm_category": [name]} for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("taxonomy", "names", "bad"),
    [
        ("auto", ["Drugs", "Violence", "rude"], 1),
        ("auto", ["Drugs", "rude", "mean"], 0),
        ("auto", ["self_harm", "self_harm", "Drugs"], 1),
        ("open", ["Drugs", "Violence", "rude"], 0),
        ("pku", ["Drugs", "rude", "mean"], 2),
        ("beavertails", ["Drugs", "rude", "self_harm"], 2),
    ],
)
def test_categories_outside_the_taxonomy(
    tmp_path: Path, file_config: Make, taxonomy: str, names: list[str], bad: int
) -> None:
    path = write(tmp_path / "a.jsonl", labelled(*names))
    found = load_source(file_config(path, taxonomy=taxonomy), QuestionAnswer, ())
    assert [value.kind for value in found.bad.get("train", [])] == ["unknown_category"] * bad
    assert len(found.train) == len(names) - bad


def test_rows_of_another_taxonomy_altogether_are_refused(tmp_path: Path, file_config: Make) -> None:
    path = write(tmp_path / "a.jsonl", labelled("self_harm", "self_harm"))
    with pytest.raises(UserError, match=r"no harm category is one of taxonomy 'pku'.*data\.taxonomy=open"):
        load_source(file_config(path, taxonomy="pku"), QuestionAnswer, ())


# ------------------------------------------------------------------------------------------------ where files lie
def test_the_folders_of_the_hub_by_root_and_subset(tmp_path: Path) -> None:
    folder = tmp_path / "PKU-SafeRLHF" / "data"
    for model in ("Alpaca-7B", "Alpaca2-7B"):
        for split in ("train", "test"):
            write(folder / model / f"{split}.jsonl", [{"prompt": f"{model} {split}", "response": "a"}])
    subsets = {"alpaca-7b": ["*/Alpaca-7B/*"], "gone": ["*/Alpaca3-8B/*"]}

    def texts(**changes: Any) -> dict[str, list[str]]:
        cfg = DataConfig("mine", "file", root=str(tmp_path), folder=["pku-saferlhf"], subsets=subsets, **changes)
        found = load_source(cfg, QuestionAnswer, ())
        return {split: [row.prompt[0].content for row in getattr(found, split) or []] for split in ("train", "test")}

    assert texts() == {
        "train": ["Alpaca-7B train", "Alpaca2-7B train"],
        "test": ["Alpaca-7B test", "Alpaca2-7B test"],
    }
    assert texts(subset="alpaca-7b") == {"train": ["Alpaca-7B train"], "test": ["Alpaca-7B test"]}
    assert texts(split="test", subset="alpaca-7b") == {"train": [], "test": ["Alpaca-7B test"]}
    with pytest.raises(UserError, match=r"no file .* fits .*Alpaca3-8B.*there are: data/Alpaca-7B/test\.jsonl"):
        texts(subset="gone")
    with pytest.raises(UserError, match=r"no subset 'typo'.*alpaca-7b"):
        texts(subset="typo")
    with pytest.raises(UserError, match="no val file"):
        texts(split="val")
    with pytest.raises(UserError, match=r"no folder else in .*data\.path=FILE_OR_FOLDER"):
        load_source(DataConfig("mine", "file", root=str(tmp_path), folder=["else"]), QuestionAnswer, ())


def test_a_single_file_is_of_whatever_split_is_asked_for(tmp_path: Path, file_config: Make) -> None:
    path = write(tmp_path / "train.jsonl", [{"prompt": f"q{i}", "response": "a"} for i in range(5)])
    data = build_data(file_config(path, split="test"), QuestionAnswer)
    assert [len(rows) for rows in (data.train, data.val, data.test)] == [0, 0, 5]
    assert data.report.files == {"test": ["train.jsonl"]}


@pytest.mark.parametrize(("end", "opener"), [("gz", gzip.open), ("xz", lzma.open)])
def test_packed_files_of_old_releases(tmp_path: Path, file_config: Make, end: str, opener: Any) -> None:
    folder = tmp_path / "round0"
    folder.mkdir()
    for split in ("train", "test"):
        with opener(folder / f"{split}.jsonl.{end}", "wt") as stream:
            stream.write(json.dumps({"prompt": split, "response": "a"}) + "\n")
    found = load_source(file_config(tmp_path), QuestionAnswer, ())
    assert [row.prompt[0].content for row in (*found.train, *(found.test or []))] == ["train", "test"]
    facts = [(fact.name, fact.split, fact.rows) for fact in found.facts]
    assert facts == [(f"round0/train.jsonl.{end}", "train", 1), (f"round0/test.jsonl.{end}", "test", 1)]
    assert found.facts[0].sha256 == hashlib.sha256((folder / f"train.jsonl.{end}").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("record", "prompt"),
    [
        ({"instruction": "Sum up.", "input": "A text.", "output": "x"}, "Sum up.\nA text."),
        ({"instruction": "Say hello.", "input": "", "output": "x"}, "Say hello."),
        ({"instruction": "Say hello.", "input": None, "output": "x"}, "Say hello."),
        ({"instruction": "Say hello.", "output": "x"}, "Say hello."),
    ],
)
def test_alpacas_input_belongs_to_the_prompt(record: dict[str, Any], prompt: str) -> None:
    mapping = {"prompt": "instruction + input", "response": "output"}
    records = [Record({"instruction": "a", "input": "b", "output": "c"}, "x.json:1"), Record(record, "x.json:2")]
    columns = choose_columns(QuestionAnswer, mapping, records)
    assert prompt_text(columns.row(records[1]).prompt) == prompt
    with pytest.raises(BadValue, match="holds a int"):
        columns.row(Record({"instruction": "Sum up.", "input": 3, "output": "x"}, "x.json:3"))
    with pytest.raises(UserError, match="no column 'instruction \\+ input'"):
        choose_columns(QuestionAnswer, mapping, [Record({"input": "b", "output": "c"}, "y.json:1")])
