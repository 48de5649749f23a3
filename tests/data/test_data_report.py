"""The data report: its numbers by hand, and its tables on screen, page and card."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from saferlhf.config.schema import DataConfig, DataPolicyConfig
from saferlhf.data.build import build_data
from saferlhf.data.report import (
    DataReport,
    FileFacts,
    category_counts,
    label_balance,
    position_bias,
    severity_counts,
    word_lengths,
)
from saferlhf.data.report_tables import data_markdown, data_tables
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer, as_prompt
from saferlhf.data.splits import near_prompts
from saferlhf.evaluation.data_section import data_section
from saferlhf.run import screen

Pair = Callable[..., PreferencePair]


def three_pairs(make_pair: Pair) -> list[PreferencePair]:
    """Unsafe: the second; none; both. Better: second, first, first. Safer: first, first, unknown."""
    unsafe = {"is_response_0_safe": False, "response_0_severity_level": 3}
    both = {"is_response_1_safe": True, "response_1_severity_level": 0, "response_1_harm_category": frozenset()}
    return [
        make_pair(first="one two", second="one two three"),
        make_pair("plant a tree", first="one", second="two", better_response_id=0, **both),
        make_pair(
            first="one two three four",
            second="one",
            better_response_id=0,
            safer_response_id=None,
            response_0_harm_category=frozenset({"Drugs", "Violence"}),
            **unsafe,
        ),
    ]


# ------------------------------------------------------------------------------------------------ numbers
def test_label_numbers_by_hand(make_pair: Pair) -> None:
    rows = three_pairs(make_pair)
    assert label_balance(rows) == {
        "distinct_prompts": 2,
        "unsafe_share": pytest.approx(3 / 6),
        "both_safe_share": pytest.approx(1 / 3),
        "one_safe_share": pytest.approx(1 / 3),
        "better_is_safer_share": pytest.approx(1 / 2),
    }
    assert severity_counts(rows) == {"0": 3, "1": 0, "2": 2, "3": 1}
    assert list(category_counts(rows).items()) == [("Drugs", 3), ("Violence", 1)]
    assert position_bias(rows) == {"better_is_second": pytest.approx(1 / 3), "safer_is_second": 0.0}


def test_lengths_by_hand(make_pair: Pair) -> None:
    found = word_lengths(three_pairs(make_pair))
    assert found == {
        "prompt_words_mean": pytest.approx((4 + 3 + 4) / 3),
        "response_words_mean": pytest.approx(12 / 6),
        "safe_words_mean": pytest.approx((2 + 1 + 1) / 3),
        "unsafe_words_mean": pytest.approx((3 + 4 + 1) / 3),
        # the second pair is of equal length
        "better_is_longer_share": 1.0,
        "safer_is_longer_share": 0.0,
    }
    answer = QuestionAnswer("a", as_prompt("q"), "one two", is_safe=False, harm_category=frozenset({"Drugs"}))
    assert word_lengths([answer]) == {"prompt_words_mean": 1, "response_words_mean": 2, "unsafe_words_mean": 2}
    assert category_counts([answer]) == {"Drugs": 1} and severity_counts([answer]) == {}
    assert word_lengths([PromptRow("p", as_prompt("a b"))]) == {"prompt_words_mean": 2}


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.8, 1.0])
def test_near_prompts_are_those_that_comparing_all_pairs_finds(threshold: float) -> None:
    draw = random.Random(0)

    def runs(key: str) -> set[tuple[str, ...]]:
        words = key.split()
        return {tuple(words[i : i + 3]) for i in range(max(1, len(words) - 2))}

    def index(one: str, other: str) -> float:
        return len(runs(one) & runs(other)) / len(runs(one) | runs(other))

    found = 0
    for _ in range(20):
        ours, theirs = ({" ".join(draw.choices("abcd", k=draw.randint(1, 9))) for _ in range(50)} for _ in range(2))
        expected = {a for a in ours - theirs if any(index(a, b) >= threshold - 1e-12 for b in theirs)}
        assert near_prompts(ours, theirs, threshold) == expected
        found += len(expected)
    assert found


# ------------------------------------------------------------------------------------------------ tables
def full_report() -> DataReport:
    """A report with something in every part."""
    report = DataReport("mine", licence="CC BY-NC 4.0", revision="abc123", policy={"near_overlap": "off"})
    report.read, report.kept = {"train": 1200, "test": 100}, {"test": 90, "train": 1000, "val": 100}
    report.facts = [FileFacts("test.jsonl", "test", "f" * 64, 100), FileFacts("train.jsonl", "train", "e" * 64, 1200)]
    report.hash_rule = {"train": {"checked": 2400, "wrong": 2}}
    empty = report.finding("empty", "test")
    empty.found, empty.dropped, empty.detail = 7, 7, {"response": 7}
    contradictory = report.finding("contradictory", "train")
    contradictory.found, contradictory.dropped, contradictory.flipped = 12, 2, 9
    contradictory.detail = {"safer_is_unsafe": 9, "safe_with_harm": 3}
    report.finding("duplicate", "train")
    report.labels = {"train": {"unsafe_share": 0.5124}}
    report.severity = {"train": {"0": 10, "1": 0, "2": 5, "3": 1}}
    report.categories = {"train": {"a|b": 6}, "test": {"Drugs": 2}}
    report.position = {"train": {"better_is_second": 0.63}}
    report.lengths = {"train": {"tokens_mean": 134.25, "tokens_max": 900.0, "tokens_total": 1234567.0}}
    report.truncated = {"train": {"prompt_cut_share": 0.0125}}
    return report


def test_report_is_plain_json_in_a_fixed_order() -> None:
    plain = full_report().to_dict()
    assert json.loads(json.dumps(plain)) == plain
    assert list(plain["kept"]) == ["train", "val", "test"] and next(iter(plain["findings"])) == "empty"
    assert plain["files"]["train"] == [{"name": "train.jsonl", "sha256": "e" * 64, "rows": 1200}]


def test_tables_say_what_was_found_and_done() -> None:
    tables = {table.title: table for table in data_tables(full_report().to_dict())}
    assert list(tables) == ["rows", "bad rows", "labels", "biases", "lengths", "harm categories", "files"]
    for table in tables.values():
        assert all(len(line.cells) == len(table.columns) for line in table.lines), table.title
    assert tables["rows"].lines[:2] == (("read", ("1,200", "", "100"), 0), ("kept", ("1,000", "100", "90"), 0))
    assert tables["rows"].note == "Hash rule: 2,400 hashes checked, 2 wrong."
    assert tables["bad rows"].lines == (
        ("empty (response), dropped", ("0", "0", "7"), 0),
        ("contradictory", ("12", "0", "0"), 0),
        ("dropped", ("2", "0", "0"), 1),
        ("flipped", ("9", "0", "0"), 1),
        ("kept", ("1", "0", "0"), 1),
        ("safe with harm", ("3", "0", "0"), 1),
        ("safer is unsafe", ("9", "0", "0"), 1),
    )
    # what was not looked for was not found to be absent
    assert "duplicate" in tables["bad rows"].note and "near overlap" not in tables["bad rows"].note
    assert ("unsafe responses", ("51.2%", "", ""), 0) in tables["labels"].lines
    assert ("tokens in all", ("1,234,567", "", ""), 0) in tables["lengths"].lines
    assert tables["harm categories"].lines == (("a|b", ("6", "0", "0"), 0), ("Drugs", ("0", "0", "2"), 0))
    assert tables["files"].lines[0] == ("train.jsonl", ("train", "1,200", "e" * 16), 0)


def test_an_old_or_empty_report_has_tables_too() -> None:
    assert data_tables({}) == []
    assert "Source: mine." in data_markdown(DataReport("mine", read={"train": 1}).to_dict())


def test_markdown_keeps_its_columns() -> None:
    text = data_markdown(full_report().to_dict())
    assert "Source: mine, revision abc123, CC BY-NC 4.0." in text
    for table in text.split("\n\n"):
        lines = [line.replace("\\|", "") for line in table.splitlines() if line.startswith("|")]
        assert len({line.count("|") for line in lines}) <= 1, table


def test_report_page_shows_all_tables_and_escapes_what_files_say() -> None:
    page = data_section(full_report().to_dict() | {"categories": {"train": {"<script>": 3}}})
    assert "&lt;script&gt;</td><td class=number>3</td>" in page and "<script>" not in page
    assert page.count("<table>") == page.count("</table>") == 7
    assert "revision abc123" in page and f">{'e' * 16}</td>" in page


@pytest.mark.parametrize("width", [34, 80, 140])
def test_screen_fits_its_width(width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(screen, "output_width", lambda: width)
    screen.show_data(full_report().to_dict())
    shown = capsys.readouterr().out
    assert max(len(line) for line in shown.splitlines()) <= width
    words = shown.split()
    for piece in ("1,200", "51.2%", "134.2", "contradictory", "flipped"):
        assert piece in words, piece
    # numbers are never broken, and wide screens have two tables side by side
    assert ("labels" in shown.splitlines()[2]) == (width >= 100)


# ------------------------------------------------------------------------------------------------ real rows
def test_real_rows_show_the_known_flaws_of_the_public_data(data_root: Path) -> None:
    """Counts as computed by hand from the files: prompts that train and test share, places, hashes."""
    path = data_root / "pku-saferlhf"
    if not path.is_dir():
        pytest.skip(f"{path} is not there")

    def build(**policy: Any) -> DataReport:
        cfg = DataConfig("pku_saferlhf", source="file", path=str(path), policy=DataPolicyConfig(**policy))
        return build_data(cfg, PreferencePair, ("better_response_id",)).report

    report = build()
    overlap = report.finding("overlap", "train")
    assert (overlap.found, overlap.dropped, overlap.detail) == (110, 110, {"with_test": 110})
    assert report.kept["train"] + report.kept["val"] == 2486 - 110 - report.finding("empty", "train").found
    assert report.kept["test"] == 569
    assert 0.60 < report.position["test"]["better_is_second"] < 0.65
    assert 0.70 < report.position["train"]["safer_is_second"] < 0.73
    assert report.hash_rule == {"train": {"checked": 4972, "wrong": 0}, "test": {"checked": 1138, "wrong": 0}}
    assert set(report.categories["train"]) == set(report.categories["test"]) and len(report.categories["test"]) == 19
    assert report.facts[0].rows == 2486 and (report.facts[0].sha256 or "").startswith("a5ede66399c315df")
    stricter = build(near_overlap="drop")
    assert stricter.finding("near_overlap", "train").dropped == report.finding("near_overlap", "train").found > 0
