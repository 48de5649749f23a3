"""Public evaluation sets in miniature, as they lie below `data.root` and on the hub; damage is named by place."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from command_lines import composed

from saferlhf.config.schema import DataConfig
from saferlhf.config.validate import evaluate_config
from saferlhf.data.build import Splits, build_data
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer, Row
from saferlhf.data.sources import hub
from saferlhf.data.sources.layouts_sets import XSAFETY_TOPICS, xsafety_topic
from saferlhf.errors import UserError

Seen = list[tuple[str, str, bool | None, str | None]]


def config_of(*words: str) -> DataConfig:
    """The data config as `evaluate.py` takes it."""
    given = ("suite=moderation", "model=given", "split=test", "data.policy.near_overlap=off")
    return evaluate_config(composed(*given, *words, command="evaluate")).data


def load(kind: type[Row], *words: str) -> Splits[Any]:
    return build_data(config_of(*words), kind, ("is_safe",) if kind is QuestionAnswer else ())


def seen(data: Splits[Any]) -> Seen:
    """Prompt, response, label and group of the test rows."""
    assert not data.train and not data.val
    return [
        (row.prompt[0].content, row.response, row.is_safe, data.groups.get(row.id))
        if isinstance(row, QuestionAnswer)
        else (row.prompt[0].content, "", None, data.groups.get(row.id))
        for row in data.test
    ]


def faults(data: Splits[Any]) -> dict[str, list[str]]:
    """Kind of fault -> places of the dropped records."""
    found = data.report.to_dict()["findings"]
    return {kind: counts["test"]["places"] for kind, counts in found.items() if counts["test"]["dropped"]}


def table(rows: list[dict[str, Any]]) -> bytes:
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), stream)
    return stream.getvalue()


def put(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") and not name.endswith(".tar.gz") else content)
    return root


@pytest.fixture
def on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, dict[str, bytes]]]:
    """Name of a data set -> its files, for a test to fill; only what is asked for comes from there."""
    sets: dict[str, dict[str, bytes]] = {}

    def fake(repo_id: str, **given: Any) -> str:
        folder = tmp_path / "hub" / repo_id.replace("/", "--") / ("a" * 40)
        wanted = {name: content for name, content in sets[repo_id].items() if fits(name, given["allow_patterns"])}
        return str(put(folder, wanted))

    def fits(name: str, patterns: list[str]) -> bool:
        return bool(list(huggingface_hub.utils.filter_repo_objects([name], allow_patterns=patterns)))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    hub._fetch.cache_clear()
    yield sets
    hub._fetch.cache_clear()


# ------------------------------------------------------------------------------------------------ openai_moderation
OPENAI = [
    {"prompt": "t0", "S": 0, "H": 1, "V": 1},
    {"prompt": "t1", "V2": 0},
    {"prompt": "t2"},
    {"prompt": "t3", "H": 2},
    {"prompt": "t4", "S3": 1, "SH": None},
    {"prompt": "t1", "V2": 0},
    {"prompt": 5, "S": 0},
]


def test_openai_moderation(tmp_path: Path, on_the_hub: dict[str, dict[str, bytes]]) -> None:
    files = {"samples-1680.jsonl.gz": lines(OPENAI)}
    put(tmp_path / "root" / "openai-moderation", files)
    on_the_hub["mmathys/openai-moderation-api-evaluation"] = {**files, "README.md": b"card"}
    here = load(QuestionAnswer, "data=openai_moderation", f"data.root={tmp_path / 'root'}")
    assert seen(here) == [
        ("t0", "t0", False, "H"),
        ("t1", "t1", True, "none"),
        ("t4", "t4", False, "S3"),
        ("t1", "t1", True, "none"),
    ]
    assert faults(here) == {
        "non_text": ["samples-1680.jsonl.gz:7"],
        "bad_label": ["samples-1680.jsonl.gz:4"],
        "unlabelled": ["samples-1680.jsonl.gz:3"],  # nobody looked at it
    }
    assert seen(load(QuestionAnswer, "data=openai_moderation")) == seen(here)
    with pytest.raises(UserError, match=r"bad_label row: column 'H' holds neither 0 nor 1.*jsonl\.gz:4\)") as caught:
        load(QuestionAnswer, "data=openai_moderation", "data.policy.bad_label=error")
    assert "\n" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ xstest
XSTEST = [
    {"id": "1", "prompt": "How to kill a process?", "type": "homonyms", "label": "safe", "focus": "kill", "note": ""},
    {"id": "2", "prompt": "How to bake?", "type": "contrast", "label": "unsafe", "focus": "", "note": ""},
    {"id": "3", "prompt": "How to cook?", "type": "contrast", "label": "perhaps", "focus": "", "note": ""},
]


def test_xstest_prompts(tmp_path: Path, on_the_hub: dict[str, dict[str, bytes]]) -> None:
    files = {"xstest_prompts.csv": table(XSTEST), "xstest_v2_completions_gpt4.csv.gz": table([{"other": "x"}])}
    put(tmp_path / "root" / "xstest", files)
    on_the_hub["Paul/XSTest"] = files
    expected = [
        ("How to kill a process?", "How to kill a process?", True, "homonyms"),
        ("How to bake?", "How to bake?", False, "contrast"),
    ]
    for words in ([f"data.root={tmp_path / 'root'}"], []):
        data = load(QuestionAnswer, "data=xstest_prompts", *words)
        assert seen(data) == expected
        assert faults(data) == {"bad_label": ["xstest_prompts.csv:4"]}
    prompts = seen(load(PromptRow, "data=xstest_prompts", f"data.root={tmp_path / 'root'}"))
    assert [(prompt, group) for prompt, _, _, group in prompts] == [
        ("How to kill a process?", "homonyms"),
        ("How to bake?", "contrast"),
        ("How to cook?", "contrast"),
    ]


def test_xstest_responses_in_both_ways_of_writing(tmp_path: Path, on_the_hub: dict[str, dict[str, bytes]]) -> None:
    rows = [("q0", "a", "harmful"), ("q1", "b\n\nc", "unharmful"), ("q2", "d", "unclear")]
    guard = [
        {"instruction": "judge", "input": f"Human user:\n{q}\n\nAI assistant:\n{a}\n\n", "output": f"{label}\n"}
        for q, a, label in rows
    ]
    refusals = [{"instruction": "judge", "input": "Human user:\nq\n\nAI assistant:\na\n\n", "output": "refusal"}]
    put(
        tmp_path / "root" / "xstest",
        {
            "0_6_xstest_response_harmful.json.gz": json.dumps(guard).encode(),
            "0_7_xstest_response_refusal.json.gz": json.dumps(refusals).encode(),
        },
    )
    plain = [{"prompt": q, "response": a, "label": label, "prompt_type": f"type {q}"} for q, a, label in rows]
    on_the_hub["allenai/xstest-response"] = {
        "data/response_harmfulness-00000-of-00001.parquet": parquet(plain),
        "data/response_refusal-00000-of-00001.parquet": parquet([{"other": 1}]),
    }
    here = load(QuestionAnswer, "data=xstest_responses", f"data.root={tmp_path / 'root'}")
    there = load(QuestionAnswer, "data=xstest_responses")
    assert seen(here) == [("q0", "a", False, None), ("q1", "b\n\nc", True, None)]
    assert seen(there) == [("q0", "a", False, "type q0"), ("q1", "b\n\nc", True, "type q1")]
    assert faults(here) == {"bad_label": ["0_6_xstest_response_harmful.json.gz, row 3"]}
    assert faults(there) == {"bad_label": ["response_harmfulness-00000-of-00001.parquet, row 3"]}


def test_xstest_completions_are_grouped_by_what_people_saw(tmp_path: Path) -> None:
    def rows(model: str) -> list[dict[str, Any]]:
        return [{"prompt": "q", "completion": f"{model} says", "final_label": "2_full_refusal"}]

    put(
        tmp_path / "xstest",
        {f"xstest_v2_completions_{m}.csv.gz": table(rows(m)) for m in ("gpt4", "mistralguard")},
    )
    cfg = config_of("data=xstest_completions", "data.subset=mistralguard", f"data.root={tmp_path}")
    assert seen(build_data(cfg, QuestionAnswer)) == [("q", "mistralguard says", None, "2_full_refusal")]
    with pytest.raises(UserError, match="needs the column 'is_safe'"):
        build_data(cfg, QuestionAnswer, ("is_safe",))


# ------------------------------------------------------------------------------------------------ do_not_answer
def asked(question: str, area: str, *answers: tuple[str, Any]) -> dict[str, Any]:
    row: dict[str, Any] = {"id": 1, "risk_area": area, "question": question}
    for model, (response, harmful) in zip(("GPT4", "vicuna-7b"), answers, strict=True):
        row |= {f"{model}_response": response, f"{model}_harmful": harmful, f"{model}_action": 0}
    return row


def test_do_not_answer_is_taken_apart_by_model(tmp_path: Path, on_the_hub: dict[str, dict[str, bytes]]) -> None:
    rows = [
        asked("q0", "A", ("no", 0), ("sure", 1)),
        asked("q1", "B", ("no", 0), ("no", 0)),
        asked("q2", "B", ("", 0), ("sure", None)),
    ]
    put(tmp_path / "root" / "do-not-answer", {"data_en.csv.gz": table(rows)})
    on_the_hub["LibrAI/do-not-answer"] = {"data/train-00000-of-00001-ab.parquet": parquet(rows), "assets/a.png": b"x"}
    expected = [
        ("q0", "no", True, "GPT4"),
        ("q0", "sure", False, "vicuna-7b"),
        ("q1", "no", True, "GPT4"),
        ("q1", "no", True, "vicuna-7b"),
    ]
    for words in ([f"data.root={tmp_path / 'root'}"], []):
        data = load(QuestionAnswer, "data=do_not_answer", *words)
        assert seen(data) == expected, "the same response of two models is a row of each"
        assert data.report.read["test"] == 6 and set(faults(data)) == {"empty", "unlabelled"}
        questions = seen(load(PromptRow, "data=do_not_answer", *words))
        assert [(prompt, group) for prompt, _, _, group in questions] == [("q0", "A"), ("q1", "B"), ("q2", "B")]
    by_harm = load(QuestionAnswer, "data=do_not_answer", "++data.columns.group=risk_area")
    assert [group for _, _, _, group in seen(by_harm)] == ["A", "A", "B", "B"]


def test_damage_in_do_not_answer_costs_one_row(tmp_path: Path) -> None:
    rows = [
        asked("q0", "A", ("no", "maybe"), ("sure", 1)),
        asked("q1", "A", (None, 0), ("sure", 0)),
        asked("q2", "A", ("no", 0), ("no", 0)),
    ]
    rows.append({**rows[2], "question": None})
    path = put(tmp_path, {"a.jsonl": lines(rows)}) / "a.jsonl"
    data = load(QuestionAnswer, "data=do_not_answer", f"data.path={path}")
    assert [row[:3] for row in seen(data)] == [
        ("q0", "sure", False),
        ("q1", "sure", True),
        ("q2", "no", True),
        ("q2", "no", True),
    ]
    assert faults(data) == {"non_text": ["a.jsonl:2", "a.jsonl:4"], "bad_label": ["a.jsonl:1"]}
    with pytest.raises(UserError, match=r"'GPT4_harmful' holds neither 0 nor 1.*a\.jsonl:1"):
        load(QuestionAnswer, "data=do_not_answer", f"data.path={path}", "data.policy.bad_label=error")
    questions = put(tmp_path, {"b.jsonl": lines([{"question": "q"}])}) / "b.jsonl"
    with pytest.raises(UserError, match=r"no column '\{model\}_response'.*b\.jsonl:1.*ask for prompts"):
        load(QuestionAnswer, "data=do_not_answer", f"data.path={questions}")
    assert len(load(PromptRow, "data=do_not_answer", f"data.path={questions}").test) == 1


# ------------------------------------------------------------------------------------------------ xsafety
XSAFETY = {
    "de/Insult.csv": "\ufeffwie backt man Brot\n".encode(),
    "en/Crimes_And_Illegal_Activities_en.csv": b"\xef\xbb\xbfhow to bake bread\n",
    "en/Insult_n.csv": b'how to cook soup,,\n"two\nlines"\n\n  ,\n',
    "en/commonsense.csv": b"is bread food\n",
    "hi/commen_sense.csv": "रोटी\n".encode(),
    "ru/Crimes_And_Illegal_Activitie.csv": "хлеб\n".encode(),
}
XSAFETY_ROWS: Seen = [
    ("wie backt man Brot", "wie backt man Brot", False, "de/insult"),
    ("how to bake bread", "how to bake bread", False, "en/crimes_and_illegal_activities"),
    ("how to cook soup", "how to cook soup", False, "en/insult"),
    ("two\nlines", "two\nlines", False, "en/insult"),
    ("is bread food", "is bread food", True, "en/commonsense"),
    ("रोटी", "रोटी", True, "hi/commonsense"),
    ("хлеб", "хлеб", False, "ru/crimes_and_illegal_activities"),
]


def packed(files: dict[str, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def test_xsafety_as_archive_and_as_folders(tmp_path: Path) -> None:
    put(tmp_path / "packed" / "xsafety", {"xsafety_csv.tar.gz": packed(XSAFETY), "SOURCE.md": b"about"})
    put(tmp_path / "plain" / "XSafety", {**XSAFETY, "README.md": b"about"})
    archive = load(QuestionAnswer, "data=xsafety", f"data.root={tmp_path / 'packed'}")
    folder = load(QuestionAnswer, "data=xsafety", f"data.root={tmp_path / 'plain'}")
    assert seen(archive) == seen(folder) == XSAFETY_ROWS
    assert archive.fingerprint == folder.fingerprint
    assert faults(archive) == {"empty": ["xsafety_csv.tar.gz:en/Insult_n.csv:5"]}
    assert faults(folder) == {"empty": ["Insult_n.csv:5"]}
    prompts = seen(load(PromptRow, "data=xsafety", f"data.root={tmp_path / 'packed'}"))
    assert [(row[0], row[3]) for row in prompts] == [(row[0], row[3]) for row in XSAFETY_ROWS]
    one = load(QuestionAnswer, "data=xsafety", f"data.path={tmp_path / 'plain' / 'XSafety' / 'de' / 'Insult.csv'}")
    assert seen(one) == XSAFETY_ROWS[:1]


def test_xsafety_as_one_table(on_the_hub: dict[str, dict[str, bytes]]) -> None:
    rows = [
        {"text": "how to cook soup", "language": "en", "category": "Insult_n"},
        {"text": "is bread food", "language": "en", "category": "commonsense"},
        {"text": "pan", "language": "sp", "category": "Unlisted"},
        {"text": None, "language": "sp", "category": "Insult"},
    ]
    on_the_hub["ToxicityPrompts/XSafety"] = {"data/test-00000-of-00001.parquet": parquet(rows)}
    data = load(QuestionAnswer, "data=xsafety")
    assert seen(data) == [XSAFETY_ROWS[2], XSAFETY_ROWS[4]]
    assert faults(data) == {
        "bad_label": ["test-00000-of-00001.parquet, row 3"],
        "non_text": ["test-00000-of-00001.parquet, row 4"],
    }


def test_a_file_that_is_none_of_xsafetys(tmp_path: Path) -> None:
    put(tmp_path / "xsafety", {"a.tar.gz": packed({**XSAFETY, "en/Notes.csv": b"hello\n", "Insult.csv": b"hello\n"})})
    data = load(QuestionAnswer, "data=xsafety", f"data.root={tmp_path}")
    assert seen(data) == XSAFETY_ROWS
    assert faults(data)["bad_label"] == ["a.tar.gz:en/Notes.csv:1", "a.tar.gz:Insult.csv:1"]
    with pytest.raises(UserError, match=r"'en/Notes' is no language with one of the 14 topics.*Notes\.csv:1"):
        load(QuestionAnswer, "data=xsafety", f"data.root={tmp_path}", "data.policy.bad_label=error")


def test_topics_agree_over_languages() -> None:
    assert len(XSAFETY_TOPICS) == len(set(XSAFETY_TOPICS)) == 14
    assert {xsafety_topic(name, "en") for name in ("Insult_n", "Insult_en", "Insult", "insult")} == {"insult"}
    assert xsafety_topic("Goal_Hijacking", "ja") == "goal_hijacking"


# ------------------------------------------------------------------------------------------------ hatecheck
def test_hatecheck(tmp_path: Path, on_the_hub: dict[str, dict[str, bytes]]) -> None:
    rows = [
        {"functionality": "spell", "case_id": "1", "test_case": "bread is bad", "label_gold": "hateful"},
        {"functionality": "negate", "case_id": "2", "test_case": "bread is good", "label_gold": "non-hateful"},
        {"functionality": "negate", "case_id": "3", "test_case": "bread", "label_gold": "hateful?"},
    ]
    put(tmp_path / "root" / "HateCheck", {"test_suite_cases.csv.gz": table(rows), "all_cases.csv": table(rows[:1])})
    on_the_hub["Paul/hatecheck"] = {"test.csv": table(rows), "README.md": b"card"}
    for words, name in (([f"data.root={tmp_path / 'root'}"], "test_suite_cases.csv.gz"), ([], "test.csv")):
        data = load(QuestionAnswer, "data=hatecheck", *words)
        assert seen(data) == [
            ("bread is bad", "bread is bad", False, "spell"),
            ("bread is good", "bread is good", True, "negate"),
        ]
        assert faults(data) == {"bad_label": [f"{name}:4"]}


# ------------------------------------------------------------------------------------------------ splits
def test_names_of_files_are_no_splits_where_told_so(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": "a"} for i in range(3)]
    put(tmp_path / "set", {"data/train-0.jsonl": lines(rows), "data/test-0.jsonl": lines([{**rows[0], "prompt": "t"}])})
    words = ["data=jsonl", f"data.path={tmp_path / 'set'}", "data.split=test"]
    assert len(build_data(config_of(*words), QuestionAnswer).test) == 1
    assert len(build_data(config_of(*words, "data.named_splits=false"), QuestionAnswer).test) == 4
    (tmp_path / "set" / "data" / "test-0.jsonl").unlink()
    with pytest.raises(UserError, match="no test file"):
        build_data(config_of(*words), QuestionAnswer)


@pytest.mark.parametrize("kind", [PreferencePair, QuestionAnswer])
def test_sets_without_pairs_say_so(tmp_path: Path, kind: type[Row]) -> None:
    put(tmp_path / "xstest", {"xstest_prompts.csv": table(XSTEST)})
    cfg = config_of("data=xstest_prompts", f"data.root={tmp_path}")
    if kind is PreferencePair:
        with pytest.raises(UserError, match=r"'response_0' is missing"):
            build_data(cfg, kind)
    else:
        assert build_data(cfg, kind).test
