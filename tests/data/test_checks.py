"""Checks: each kind of bad row is counted exactly and handled as its policy says (architecture, traps 11 and 12)."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from saferlhf.config.schema import DataConfig, DataPolicyConfig
from saferlhf.data.build import build_data
from saferlhf.data.checks import ALLOWED, RowChecker, check_policy, contradictory_fault, shuffle_sides, swap_sides
from saferlhf.data.report import DataReport
from saferlhf.data.rows import PreferencePair, QuestionAnswer, Row, as_prompt
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
        ({"is_response_0_safe": None, "response_0_severity_level": 1, "safer_response_id": 1}, None),
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


def test_overlap_compares_normalised_prompts(make_pair: Pair) -> None:
    train = [make_pair("How to bake, bread?"), make_pair("plant a tree")]
    held_out = [make_pair("how to  BAKE bread", "x", "y")]
    check = checker()
    assert check.overlap(train, "train", held_out) == [train[1]]
    assert counts(check, "overlap") == (1, 1, 0)
    assert checker(overlap="keep").overlap(train, "train", held_out) == train


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
    # a duplicate has the place of the row it repeats: both have one id
    assert f"{kind} row" in message and f"train.jsonl:{1 if kind == 'duplicate' else 8}" in message
    assert secret not in message and f"data.policy.{kind}=drop" in message
    assert build_data(file_config(tmp_path), PreferencePair).report.finding(kind, "train").dropped == 1


def test_policies_that_make_no_sense_are_refused_at_once() -> None:
    check_policy(DataPolicyConfig())
    for kind, allowed in ALLOWED.items():
        for policy in ("drop", "keep", "flip", "error", "whatever"):
            if policy in allowed:
                check_policy(DataPolicyConfig(**{kind: policy}))
            else:
                with pytest.raises(UserError, match=rf"data\.policy\.{kind}"):
                    check_policy(DataPolicyConfig(**{kind: policy}))


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


def test_a_damaged_file_is_counted_exactly(tmp_path: Path, file_config: Callable[..., DataConfig]) -> None:
    """A thousand rows, damaged in every way at once, shuffled: the report has each kind as it was put in."""
    rng = random.Random(3)
    good = [
        {
            "prompt": f"question {i}",
            "response_0": f"yes {i}",
            "response_1": f"no {i}",
            "is_response_0_safe": i % 2 == 0,
            "is_response_1_safe": True,
            "response_0_severity_level": 0 if i % 2 == 0 else 1 + i % 3,
            "response_1_severity_level": 0,
            "better_response_id": i % 2,
            "safer_response_id": 1,
        }
        for i in range(1000)
    ]
    damage: list[tuple[str, dict[str, Any]]] = [
        ("empty", {"response_0": " "}),
        ("identical", {"response_0": "x", "response_1": "x"}),
        ("contradictory", {"is_response_0_safe": False, "response_0_severity_level": 1, "safer_response_id": 0}),
        ("contradictory", {"is_response_1_safe": True, "response_1_severity_level": 2}),
    ]
    expected = {"empty": 0, "identical": 0, "contradictory": 0, "duplicate": 0}
    rows = list(good)
    for i in rng.sample(range(1000), 200):
        kind, change = rng.choice(damage)
        rows[i] = rows[i] | change
        expected[kind] += 1
    intact = [row for row in rows if row in good]
    copies = rng.sample(intact, 25)
    expected["duplicate"] = len(copies)
    rows += copies
    rng.shuffle(rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = build_data(file_config(tmp_path / "a.jsonl"), PreferencePair)
    found = {kind: data.report.finding(kind, "train").found for kind in expected}
    assert found == expected
    assert len(data.train) + len(data.val) + len(data.test) == 800
    assert json.loads(json.dumps(data.report.to_dict())) == data.report.to_dict()
    table = data.report.table()
    assert f"{expected['identical']} ({expected['identical']} dropped)" in table and "question" not in table


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
