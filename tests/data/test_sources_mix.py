"""Mixtures by count and share, one set to train and another to test; pairs as answers and prompts."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from command_lines import composed

from saferlhf.config.checks import check_config
from saferlhf.config.data_parts import settled
from saferlhf.config.schema import DataConfig, DataPolicyConfig
from saferlhf.config.validate import train_config
from saferlhf.data.build import Splits, build_data, data_fingerprint
from saferlhf.data.melt import ANSWERS, as_kind
from saferlhf.data.rows import PreferencePair, PromptRow, QuestionAnswer
from saferlhf.data.splits import prompt_key
from saferlhf.errors import UserError
from saferlhf.run.prepare import checked

Pair = Callable[..., PreferencePair]


# ------------------------------------------------------------------------------------------------ melting
def test_a_pair_is_two_answers_with_their_own_labels(make_pair: Pair) -> None:
    pair = make_pair()
    melted, counts = as_kind([pair], QuestionAnswer)
    first, second = (row for row, _ in melted)
    assert isinstance(first, QuestionAnswer) and isinstance(second, QuestionAnswer)
    assert (first.response, first.is_safe, first.harm_category, first.severity_level) == (
        "first water",
        True,
        frozenset(),
        0,
    )
    assert (second.response, second.is_safe, second.harm_category, second.severity_level) == (
        "then flour",
        False,
        frozenset({"Drugs"}),
        2,
    )
    assert [origin for _, origin in melted] == [pair.id] * 2 and counts == {"made": 2}
    assert len({first.id, second.id, pair.id}) == 3


def test_a_response_of_several_pairs_stays_once(make_pair: Pair) -> None:
    pairs = [make_pair(), make_pair(second="other"), make_pair(second="third", is_response_0_safe=None)]
    melted, counts = as_kind(pairs, QuestionAnswer)
    assert [row.response for row, _ in melted] == ["first water", "then flour", "other", "third"]  # type: ignore[union-attr]
    assert counts == {"made": 4, "repeated": 2, "other_labels": 1}
    prompts, counts = as_kind(pairs, PromptRow)
    assert len(prompts) == 1 and isinstance(prompts[0][0], PromptRow) and counts["repeated"] == 2
    same, counts = as_kind([row for row, _ in melted], QuestionAnswer)
    assert same == [(row, row.id) for row, _ in melted] and not counts.total()


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        # response 0 is safe and safer, response 1 better and unsafe
        ({}, {"all": [0, 1], "better": [1], "safer": [0], "safe": [0], "best": []}),
        ({"better_response_id": 0}, {"all": [0, 1], "better": [0], "safer": [0], "safe": [0], "best": [0]}),
        (
            {"better_response_id": None, "single_response_id": 0},
            {"all": [0, 1], "better": [], "safer": [0], "safe": [0], "best": [0]},
        ),
        (
            {"is_response_0_safe": None, "is_response_1_safe": None},
            {"all": [0, 1], "better": [1], "safer": [0], "safe": [], "best": [1]},
        ),
    ],
)
def test_which_responses_become_answers(
    make_pair: Pair, labels: dict[str, Any], expected: dict[str, list[int]]
) -> None:
    sides = {"response_0": [0], "response_1": [1]}  # whatever the labels
    assert {name: choose(make_pair(**labels)) for name, choose in ANSWERS.items()} == expected | sides


def test_demonstrations_out_of_pairs_are_not_unsafe() -> None:
    words = ("data=jsonl", "data.path=x", "backbone=smollm2")
    assert checked(train_config(composed("task=sft", *words))).data.answers == "best"
    assert checked(train_config(composed("task=sft", *words, "data.answers=all"))).data.answers == "all"
    assert checked(train_config(composed("task=reward", *words))).data.answers is None


# ------------------------------------------------------------------------------------------------ mixtures
@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Three files: a has 400 pairs, b 100, test 50 of which 10 share a prompt with a and 10 with b."""

    def write(name: str, prompts: list[str]) -> None:
        rows = [
            {
                "prompt": prompt,
                "response_0": f"{prompt} good",
                "response_1": f"{prompt} bad",
                "is_response_0_safe": True,
                "is_response_1_safe": False,
                "better_response_id": 0,
                "safer_response_id": 0,
            }
            for prompt in prompts
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    a, b = [f"alpha {i} {i * i}" for i in range(400)], [f"beta {i} {i * i}" for i in range(100)]
    write("a.jsonl", a)
    write("b.jsonl", b)
    write("test.jsonl", a[:10] + b[:10] + [f"gamma {i} {i * i}" for i in range(30)])
    return tmp_path


@functools.cache
def mix_config() -> DataConfig:
    return train_config(composed("task=reward", "data=mix")).data


def mixed(folder: Path, given: dict[str, Any], **changes: Any) -> DataConfig:
    full = {label: {"name": "jsonl", "path": str(folder / f"{label}.jsonl"), **keys} for label, keys in given.items()}
    return settled(replace(mix_config(), parts=full, **changes))


def count(data: Splits[Any]) -> Counter[str]:
    return Counter(row.prompt[0].content.split()[0] for row in (*data.train, *data.val, *data.test))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"a": {}, "b": {}}, {"alpha": 400, "beta": 100}),
        ({"a": {"rows": 50}, "b": {"rows": 1000}}, {"alpha": 50, "beta": 100}),
        ({"a": {"share": 0.5}, "b": {"share": 0.5}}, {"alpha": 100, "beta": 100}),
        ({"a": {"share": 0.9}, "b": {"share": 0.1}}, {"alpha": 400, "beta": 44}),
        ({"a": {"share": 0.25}, "b": {"rows": 90}}, {"alpha": 30, "beta": 90}),
        ({"a": {}, "b": {"share": 0.2}}, {"alpha": 400, "beta": 100}),
    ],
)
def test_counts_and_shares(parts: Path, given: dict[str, Any], expected: dict[str, int]) -> None:
    assert count(build_data(mixed(parts, given), PreferencePair, ("better_response_id",))) == expected


def test_a_share_counts_answers_where_answers_are_wanted(parts: Path) -> None:
    """Pairs give two answers each: half of the answers, not of the pairs."""
    rows = [{"prompt": f"delta {i}", "response": "x", "is_safe": True} for i in range(60)]
    (parts / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = mixed(parts, {"a": {"share": 0.5}, "answers": {"share": 0.5}})
    data = build_data(cfg, QuestionAnswer, ("is_safe",))
    assert count(data) == {"alpha": 60, "delta": 60}


def test_a_choice_follows_seed_and_rows_alone(parts: Path) -> None:
    def ids(rows: int, seed: int = 0) -> set[str]:
        data = build_data(mixed(parts, {"a": {"rows": rows}, "b": {}}, seed=seed), PreferencePair)
        return {row.id for row in (*data.train, *data.val, *data.test)}

    assert ids(50) == ids(50) and ids(50) < ids(80)
    assert ids(50) != ids(50, seed=1)


def test_the_test_rows_of_one_part_are_kept_out_of_all_others(parts: Path) -> None:
    cfg = mixed(parts, {"a": {"split": "train"}, "b": {"split": "train"}, "test": {"split": "test"}})
    data = build_data(cfg, PreferencePair)
    assert len(data.test) == 50 and data.val
    assert data.report.finding("overlap", "train").dropped == 20
    test = {prompt_key(row.prompt) for row in data.test}
    assert not test & {prompt_key(row.prompt) for row in (*data.train, *data.val)}
    assert data.report.files == {"train": ["a: a.jsonl", "b: b.jsonl"], "test": ["test: test.jsonl"]}


def test_bad_records_of_parts_keep_their_order(parts: Path) -> None:
    text = (parts / "b.jsonl").read_text().splitlines()
    text[3] = json.dumps({"prompt": 3, "response_0": "a", "response_1": "b"})
    (parts / "b.jsonl").write_text("\n".join(text))
    cfg = mixed(parts, {"a": {}, "b": {}}, policy=DataPolicyConfig(non_text="error"))
    with pytest.raises(UserError, match=r"non_text row.*b\.jsonl:4"):
        build_data(cfg, PreferencePair)
    data = build_data(replace(cfg, policy=DataPolicyConfig()), PreferencePair)
    assert data.report.read == {"train": 500} and count(data) == {"alpha": 400, "beta": 99}


def test_categories_of_another_taxonomy_are_left_out(parts: Path) -> None:
    """A PKU-SafeRLHF row without a category of BeaverTails was never asked for it."""
    for name, category in (("one", "Drugs"), ("two", "self_harm"), ("three", "Violence")):
        rows = [
            {"prompt": f"{name} {i}", "response": "x", "is_safe": False, "harm_category": {category: True}}
            for i in range(30)
        ]
        (parts / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given: dict[str, Any] = {"one": {}, "two": {}, "three": {"split": "test"}}

    def names(**changes: Any) -> tuple[Counter[Any], list[str]]:
        data = build_data(mixed(parts, given, **changes), QuestionAnswer, ("is_safe",))
        rows = [*data.train, *data.val, *data.test]
        assert len(rows) == 90 and not any(row.is_safe for row in rows)
        return Counter(row.harm_category and min(row.harm_category) for row in rows), data.report.notes

    found, notes = names()
    assert found == {"Drugs": 30, None: 30, "Violence": 30} and len(notes) == 1 and notes[0].startswith("two: ")
    assert names(taxonomy="beavertails")[0] == {"self_harm": 30, None: 60}
    assert names(taxonomy="open") == ({"Drugs": 30, "self_harm": 30, "Violence": 30}, [])


def test_the_identity_of_a_mixture(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    given = {"a": {"rows": 50}, "b": {"rows": 60}}
    base = data_fingerprint(mixed(parts, given))
    assert base == data_fingerprint(mixed(parts, given))
    assert base != data_fingerprint(mixed(parts, {"a": {"rows": 51}, "b": {"rows": 60}}))
    assert base != data_fingerprint(mixed(parts, {"b": {"rows": 60}, "a": {"rows": 50}})), "the order of rows"
    elsewhere = tmp_path_factory.mktemp("moved")
    for name in ("a.jsonl", "b.jsonl"):
        (elsewhere / name).write_bytes((parts / name).read_bytes())
    assert base == data_fingerprint(mixed(elsewhere, given)), "not where the files lie"
    (parts / "a.jsonl").write_bytes((parts / "b.jsonl").read_bytes())
    assert base != data_fingerprint(mixed(parts, given))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"a": {"share": 0.5}, "b": {"share": 0.4}}, "shares sum to 0.9"),
        ({"a": {"share": 1.0}, "b": {}}, "leave nothing for b"),
        ({"a": {}, "b": {"share": 0.5}}, r"a share of 0.5 is 400 rows and b has 100.*data\.parts\.b\.share"),
        ({"a": {"share": 0.5, "rows": 3}}, "by rows or by share"),
        ({"a": {"share": 1.5}}, r"1.5 is not a share .*data\.parts\.a\.share"),
        ({"a": {"rows": 0}}, "0 is not a positive number"),
        ({"a": {"name": "beavertail"}}, "no data set 'beavertail'.*did you mean 'beavertails'"),
        ({"a": {"colums": {}}}, r"unknown key 'colums'.*did you mean 'columns'"),
        ({"a": {"seed": 3}}, "'seed' holds for the whole mixture.*set data.seed"),
        ({"a": {"path": "???"}}, r"a value is missing .*data\.parts\.a\.path"),
        ({"a": {"name": "mix", "path": None}}, "a mixture in a mixture"),
    ],
)
def test_impossible_mixtures_are_refused(parts: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_data(mixed(parts, given), PreferencePair)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["data=mix"], "a mixture without parts"),
        (["data=mix", "data.parts={toyworld: {}}", "data.path=x"], "parts have their own files"),
        (["data=jsonl", "data.path=x", "data.parts={toyworld: {}}"], "parts belong to a mixture"),
        (["data=jsonl", "data.path=x", "data.layout=guards"], "data.layout"),
        (["data=jsonl", "data.path=x", "data.taxonomy=pkus"], "data.taxonomy"),
        (["data=jsonl", "data.path=x", "data.answers=both"], "data.answers"),
        (["data=jsonl", "data.path=x", "data.split=dev"], "data.split"),
        (["data=toyworld", "data.hub=a/b"], "the toy world is generated"),
    ],
)
def test_impossible_keys_are_refused_before_anything_is_read(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_config(train_config(composed("task=reward", "backbone=smollm2", *words)))


def test_named_parts_are_stored_with_all_their_keys() -> None:
    tree = composed(
        "task=reward", "data=mix", "data.root=there", "data.parts={pku_saferlhf: {share: 0.5}, hh_rlhf: null}"
    )
    data = train_config(tree).data
    assert data.parts is not None
    pku, hh = data.parts["pku_saferlhf"], data.parts["hh_rlhf"]
    assert (pku["share"], pku["folder"], pku["taxonomy"], pku["root"]) == (0.5, ["pku-saferlhf"], "pku", "there")
    assert hh["subset"] == "default" and "policy" not in hh
    assert data.licence == "CC-BY-NC-4.0 + MIT"
    tree.data.parts = data.parts
    assert train_config(tree).data.parts == data.parts, "a stored config can be read again"
