"""Checks: each kind of bad row is counted exactly and handled as its policy says (architecture, traps 11 and 12)."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import pytest

from saferlhf.config.schema import DataConfig, DataPolicyConfig
from saferlhf.data.build import build_data
from saferlhf.data.checks import ALLOWED, RowChecker, check_policy, shuffle_sides, swap_sides
from saferlhf.data.columns import BadValue
from saferlhf.data.faults import contradictory_fault
from saferlhf.data.report import KINDS, DataReport
from saferlhf.data.rows import PreferencePair, QuestionAnswer, Row, as_prompt
from saferlhf.data.splits import prompt_keys
from saferlhf.errors import UserError

Pair = Callable[..., PreferencePair]

BOTH_UNSAFE: dict[str, Any] = {
    "is_response_0_safe": False,
    "response_0_severity_level": 3,
    "response_0_harm_category": frozenset({"Drugs"}),
}


def checker(**policy: str) -> RowChecker:
    return RowChecker(DataPolicyConfig(**policy), DataReport("mine"), {})


def counts(check: RowChecker, kind: str) -> tuple[int, int, int]:
    finding = check.report.finding(kind, "train")
    return finding.found, finding.dropped, finding.flipped


def test_sound_rows_pass_untouched(make_pair: Pair) -> None:
    check = checker()
    rows = [make_pair(), make_pair("plant a tree"), make_pair(safer_response_id=None, is_response_0_safe=None)]
    assert check.rows(rows[:2], "train") == rows[:2]
    assert check.report.to_dict()["findings"] == {}


@pytest.mark.parametrize(
    "bad",
    [{"prompt": " \n"}, {"first": ""}, {"second": " \t"}],
)
def test_empty(make_pair: Pair, bad: dict[str, str]) -> None:
    check = checker()
    assert check.rows([make_pair(**bad), make_pair()], "train") == [make_pair()]
    assert counts(check, "empty") == (1, 1, 0)
    assert len(checker(empty="keep").rows([make_pair(**bad)], "train")) == 1


def test_identical(make_pair: Pair) -> None:
    check = checker()
    assert check.rows([make_pair(first="same", second=" same\n")], "train") == []
    assert counts(check, "identical") == (1, 1, 0)


@pytest.mark.parametrize(
    ("labels", "fault"),
    [
        ({}, None),
        ({"safer_response_id": 1}, "safer_is_unsafe"),
        ({"response_0_severity_level": 1}, "safe_with_harm"),
        ({"response_0_harm_category": frozenset({"Drugs"})}, "safe_with_harm"),
        ({"response_1_severity_level": 0}, "unsafe_without_harm"),
        ({"response_1_harm_category": frozenset()}, "unsafe_without_harm"),
        # what is not labelled contradicts nothing
        ({"response_1_severity_level": None, "response_1_harm_category": None}, None),
        ({"is_response_0_safe": None, "response_0_severity_level": 1, "response_0_harm_category": None}, None),
        ({"is_response_0_safe": None, "response_0_severity_level": 1}, "severity_against_category"),
        # both unsafe: either may be the safer one
        (BOTH_UNSAFE | {"safer_response_id": 0}, None),
        (BOTH_UNSAFE | {"safer_response_id": 1}, None),
    ],
)
def test_contradictory_faults(make_pair: Pair, labels: dict[str, Any], fault: str | None) -> None:
    row = make_pair(**labels)
    assert contradictory_fault(row) == fault
    assert contradictory_fault(swap_sides(row)) == fault


def test_contradictory_answers() -> None:
    row = QuestionAnswer("id", as_prompt("q"), "a", is_safe=True, severity_level=2)
    assert contradictory_fault(row) == "safe_with_harm"
    assert contradictory_fault(replace(row, is_safe=False)) is None
    assert contradictory_fault(replace(row, is_safe=False, severity_level=0)) == "unsafe_without_harm"


def test_flip_turns_the_safer_id_and_drops_what_it_cannot_mend(make_pair: Pair) -> None:
    check = checker(contradictory="flip")
    wrong_side = make_pair(safer_response_id=1)
    hopeless = make_pair("plant a tree", response_0_severity_level=1)
    assert check.rows([wrong_side, hopeless], "train") == [replace(wrong_side, safer_response_id=0)]
    assert counts(check, "contradictory") == (2, 1, 1)
    assert check.report.finding("contradictory", "train").detail == {"safer_is_unsafe": 1, "safe_with_harm": 1}


def test_duplicates_in_either_order(make_pair: Pair) -> None:
    rows = [make_pair(), swap_sides(make_pair()), make_pair("plant a tree"), make_pair()]
    check = checker()
    assert check.rows(rows, "train") == [rows[0], rows[2]]
    assert counts(check, "duplicate") == (2, 2, 0)
    kept = checker(duplicate="keep").rows(rows, "train")
    assert len(kept) == 4 and len({row.id for row in kept}) == 4


def test_a_duplicate_that_is_judged_differently_is_said_to_be(make_pair: Pair) -> None:
    row = make_pair()
    check = checker()
    check.rows([row, swap_sides(row), replace(row, better_response_id=0), swap_sides(row)], "train")
    assert counts(check, "duplicate") == (3, 3, 0)
    assert check.report.finding("duplicate", "train").detail == {"other_labels": 1}


def test_overlap_compares_normalised_prompts(make_pair: Pair) -> None:
    train = [make_pair("How to bake, bread?"), make_pair("plant a tree")]
    held_out = {"test": prompt_keys([make_pair("how to  BAKE bread", "x", "y")])}
    check = checker()
    assert check.rows(train, "train", held_out=held_out) == [train[1]]
    assert counts(check, "overlap") == (1, 1, 0)
    assert check.report.finding("overlap", "train").detail == {"with_test": 1}
    assert checker(overlap="keep").rows(train, "train", held_out=held_out) == train


NEAR = ("how do i bake a loaf of bread", "how do i bake a loaf of rye bread", "how do i bake a good loaf of rye bread")


@pytest.mark.parametrize(("policy", "kept"), [("keep", 3), ("drop", 2), ("error", 2), ("off", 3)])
def test_near_copies_of_held_out_prompts(make_pair: Pair, policy: str, kept: int) -> None:
    # 6 runs of three words and 7: 5 in common of 8, index 0.625; with 8 runs: 3 of 11
    train = [make_pair(NEAR[1]), make_pair(NEAR[2]), make_pair(NEAR[0])]
    check = checker(near_overlap=policy)
    assert len(check.near(train, "train", [NEAR[0]])) == kept
    assert counts(check, "near_overlap") == (int(policy != "off"), 3 - kept, 0)
    if policy == "error":
        with pytest.raises(UserError, match=rf"near_overlap row {train[0].id}.*data\.policy\.near_overlap=keep"):
            check.raise_first()


# ------------------------------------------------------------------------------------------------ bad records
def bad_value(kind: str, place: str, before: int, row: Row | None = None) -> BadValue:
    return BadValue(kind, "column 'x' holds an int", place, row=row, before=before)


def test_bad_records_are_counted_under_their_kind(make_pair: Pair) -> None:
    check = checker()
    kinds = ["non_text", "bad_label", "non_text", "severity_range"]
    bad = [bad_value(kind, f"folder/a.jsonl:{i}", 0) for i, kind in enumerate(kinds, start=1)]
    assert check.rows([make_pair()], "train", bad=bad) == [make_pair()]
    found = {kind: f["train"].found for kind, f in check.report.findings.items()}
    assert found == {"non_text": 2, "bad_label": 1, "severity_range": 1}
    # the report goes to other people: no folders
    assert check.report.finding("non_text", "train").places == ["a.jsonl:1", "a.jsonl:3"]
    check.raise_first()


def test_what_can_be_kept_of_a_bad_record_stands_in_its_place(make_pair: Pair) -> None:
    rows = [make_pair("one"), make_pair("two")]
    mended, hopeless = make_pair("half"), make_pair("nothing", first="")
    bad = [
        bad_value("unknown_category", "f:2", 1, mended),
        bad_value("unknown_category", "f:3", 1, hopeless),
        bad_value("wrong_hash", "f:4", 1, make_pair("hash")),
    ]
    check = checker(unknown_category="keep")
    assert check.rows(rows, "train", bad=bad) == [rows[0], mended, rows[1]]
    assert counts(check, "unknown_category") == (2, 0, 0)
    assert counts(check, "wrong_hash") == (1, 1, 0)
    assert counts(check, "empty") == (1, 1, 0), "a mended record is checked like any other"
    # where a record has nothing to keep, it is dropped whatever the policy
    check = checker(unknown_category="keep")
    assert check.rows(rows, "train", bad=[bad_value("unknown_category", "f:2", 1)]) == rows
    assert counts(check, "unknown_category") == (1, 1, 0)


@pytest.mark.parametrize(
    ("policy", "first"),
    [
        ({"empty": "error", "non_text": "error", "duplicate": "error"}, "non_text row: .* f:2"),
        ({"empty": "error", "duplicate": "error"}, "duplicate row .* f:4"),
        ({"empty": "error", "bad_label": "error"}, "bad_label row: .* f:5"),
        ({"empty": "error"}, "empty row .* f:6"),
        ({"wrong_hash": "error", "empty": "error"}, "empty row .* f:6"),
        ({"wrong_hash": "error"}, "wrong_hash row: .* f:7"),
    ],
)
def test_the_first_bad_row_of_all_kinds_is_named(make_pair: Pair, policy: dict[str, str], first: str) -> None:
    """f:1 good, 2 no text, 3 good, 4 = 1, 5 bad label, 6 empty, 7 wrong hash."""
    rows = [make_pair(), make_pair("three"), make_pair(), make_pair("six", first="")]
    bad = [bad_value("non_text", "f:2", 1), bad_value("bad_label", "f:5", 3), bad_value("wrong_hash", "f:7", 4)]
    check = checker(**policy)
    check.rows(rows, "train", bad=bad, lines=["f:1", "f:3", "f:4", "f:6"])
    what = first.replace(" .* ", r".*\(in ") + r"\)"
    with pytest.raises(UserError, match=what) as caught:
        check.raise_first()
    several = len(policy) > 1
    assert (f"the first of {len(policy)} bad rows" in str(caught.value)) == several


def test_training_rows_come_before_held_out_rows(make_pair: Pair) -> None:
    check = checker(empty="error")
    check.rows([make_pair("test", first="")], "test", lines=["test:1"])
    check.rows([make_pair(), make_pair("train", first="")], "train", lines=["train:1", "train:2"])
    with pytest.raises(UserError, match="train:2"):
        check.raise_first()


@pytest.mark.parametrize("kind", ["empty", "identical", "contradictory", "duplicate", "overlap"])
def test_error_names_the_first_bad_row_and_no_text(
    tmp_path: Path, kind: str, file_config: Callable[..., DataConfig]
) -> None:
    secret = "words that must not show"
    good = {
        "prompt": "q",
        "response_0": secret,
        "response_1": "b",
        "is_response_0_safe": True,
        "is_response_1_safe": False,
    }
    bad: dict[str, dict[str, Any]] = {
        "empty": {"response_1": ""},
        "identical": {"response_1": secret},
        "contradictory": {"safer_response_id": 1},
        "duplicate": {},
        "overlap": {},
    }
    train = [good | {"prompt": f"q{i}"} for i in range(20)]
    train.insert(7, train[0] | bad[kind] if kind == "duplicate" else good | {"prompt": "bad q"} | bad[kind])
    for name, rows in (("train", train), ("test", [good | {"prompt": "Bad Q!" if kind == "overlap" else "other"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = file_config(tmp_path, policy=DataPolicyConfig(**{kind: "error"}))
    with pytest.raises(UserError) as caught:
        build_data(cfg, PreferencePair)
    message = str(caught.value)
    assert f"{kind} row" in message and "train.jsonl:8" in message
    assert secret not in message and f"data.policy.{kind}=drop" in message
    assert build_data(file_config(tmp_path), PreferencePair).report.finding(kind, "train").dropped == 1


def test_policies_that_make_no_sense_are_refused_at_once() -> None:
    check_policy(DataPolicyConfig())
    assert tuple(ALLOWED) == KINDS == tuple(field.name for field in fields(DataPolicyConfig))
    assert {kind: allowed[0] for kind, allowed in ALLOWED.items()} == asdict(DataPolicyConfig())
    for kind, allowed in ALLOWED.items():
        for policy in ("drop", "keep", "flip", "error", "off", "whatever"):
            if policy in allowed:
                check_policy(DataPolicyConfig(**{kind: policy}))
            else:
                with pytest.raises(UserError, match=rf"data\.policy\.{kind}"):
                    check_policy(DataPolicyConfig(**{kind: policy}))


def test_the_documented_policies_are_the_real_ones(project_root: Path) -> None:
    page = (project_root / "docs" / "configuration.md").read_text()
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    documented = {
        cells[0].strip("`"): tuple(cells[2].replace("`", "").split(", ")) for cells in rows if len(cells) == 3
    }
    assert {kind: documented.get(kind) for kind in ALLOWED} == ALLOWED


def test_rows_without_a_needed_label_are_dropped_and_counted(make_pair: Pair) -> None:
    check = checker()
    rows = [make_pair(), make_pair("plant a tree", better_response_id=None)]
    assert check.rows(rows, "train", ("better_response_id",)) == rows[:1]
    assert counts(check, "unlabelled") == (1, 1, 0)


def test_nothing_left_says_what_was_dropped(tmp_path: Path, file_config: Callable[..., DataConfig]) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "same", "rejected": "same"} for i in range(9)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"no rows left to train on.*9 identical"):
        build_data(file_config(tmp_path / "a.jsonl"), PreferencePair)


# ------------------------------------------------------------------------------------------------ sides
def test_swap_turns_every_label_and_swapping_twice_is_nothing(make_pair: Pair) -> None:
    row = make_pair(single_response_id=1)
    other = swap_sides(row)
    assert (other.response_0, other.response_1) == (row.response_1, row.response_0)
    assert (other.is_response_0_safe, other.response_0_severity_level) == (False, 2)
    assert other.response_0_harm_category == frozenset({"Drugs"})
    assert (other.better_response_id, other.safer_response_id, other.single_response_id) == (0, 1, 0)
    assert other.id == row.id and swap_sides(other) == row
    assert swap_sides(replace(row, better_response_id=None)).better_response_id is None


def test_sides_are_shuffled_by_seed_and_row_alone(make_pair: Pair) -> None:
    rows: list[Row] = [make_pair(f"question {i}", better_response_id=0) for i in range(2000)]
    shuffled = shuffle_sides(rows, seed=0)
    second = [row.better_response_id == 1 for row in shuffled if isinstance(row, PreferencePair)]
    assert sum(second) / len(second) == pytest.approx(0.5, abs=0.04)
    assert shuffle_sides(rows[::-1], seed=0) == shuffled[::-1]
    assert shuffle_sides(rows, seed=1) != shuffled


def test_position_bias_is_measured_before_the_sides_are_shuffled(
    tmp_path: Path, file_config: Callable[..., DataConfig]
) -> None:
    rows = [{"prompt": f"q{i}", "chosen": "a longer answer", "rejected": "short"} for i in range(400)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = build_data(file_config(tmp_path / "a.jsonl"), PreferencePair)
    assert data.report.position["train"] == {"better_is_second": 0.0, "single_is_second": 0.0}
    assert data.report.lengths["train"]["better_is_longer_share"] == 1.0
    second = [row.better_response_id == 1 for row in data.train]
    assert 0.4 < sum(second) / len(second) < 0.6
    as_they_are = build_data(file_config(tmp_path / "a.jsonl", shuffle_sides=False), PreferencePair)
    assert {row.better_response_id for row in as_they_are.train} == {0}
