"""Flags in any order, overrides by key, and values that Hydra has to take as they are."""

from __future__ import annotations

import os

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from saferlhf.config.arguments import assign, folder_flags, is_true, key_of, merged, ordered, refuse_duplicates
from saferlhf.errors import UserError


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (["task=reward", "-m", "seed=0,1"], ["-m", "task=reward", "seed=0,1"]),
        (["task=reward", "--multirun", "seed=0,1"], ["--multirun", "task=reward", "seed=0,1"]),
        (["a=1", "--config-dir", "mine", "b=2"], ["--config-dir", "mine", "a=1", "b=2"]),
        (["a=1", "--config-dir=mine", "b=2"], ["--config-dir=mine", "a=1", "b=2"]),
        (["a=1", "--cfg", "job"], ["--cfg", "job", "a=1"]),
        (["a=1", "--info", "b=2"], ["--info=all", "a=1", "b=2"]),
        (["a=1", "--info", "defaults", "b=2"], ["--info=defaults", "a=1", "b=2"]),
        (["--multi", "a=1"], ["--multirun", "a=1"]),
        (["-sc", "install=bash"], ["-sc", "install=bash"]),
        (["~a", "+b=1", "++c=1"], ["~a", "+b=1", "++c=1"]),
        # mappings of any names take new ones without a plus
        (["data.columns.prompt=q", "data.path=x"], ["++data.columns.prompt=q", "data.path=x"]),
        (["data.parts={a: {}}", "+data.parts.a.rows=3"], ["++data.parts={a: {}}", "+data.parts.a.rows=3"]),
        ([], []),
    ],
)
def test_flags_come_first(typed: list[str], expected: list[str]) -> None:
    assert ordered(typed) == expected


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["--mulitrun"], "did you mean '--multirun'?"),
        (["task=reward", "--config-dri", "x"], "did you mean '--config-dir'?"),
        (["--config"], "unknown flag"),  # three flags begin so
        (["--cfg"], "--cfg needs a value"),
        (["-x"], "unknown flag '-x'"),
    ],
)
def test_a_wrong_flag_is_one_line(typed: list[str], says: str) -> None:
    with pytest.raises(UserError, match=r"\A[^\n]*\Z") as caught:
        ordered(typed)
    assert says in str(caught.value)


def test_flags_with_folders_are_handed_on_as_absolute_paths() -> None:
    words = ordered(["task=sft", "--config-dir", "mine", "-m", "-cp=other", "--cfg", "job"])
    assert folder_flags(words) == ["--config-dir", os.path.abspath("mine"), "-cp", os.path.abspath("other")]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed"),
        ("+trainer.max_steps=2", "trainer.max_steps"),
        ("++a.b={c: 1}", "a.b"),
        ("~pipeline", "pipeline"),
        ("data/policy=default", "data/policy"),
        ("name='a=b'", "name"),
    ],
)
def test_key_of(override: str, key: str) -> None:
    assert key_of(override) == key


def test_a_later_override_of_a_key_wins() -> None:
    definition = ["task=sft", "backbone=tiny", "trainer.max_steps=9"]
    typed = ["backbone=smollm2", "+trainer.max_steps=2", "seed=1"]
    assert merged(definition, typed) == ["task=sft", "backbone=smollm2", "+trainer.max_steps=2", "seed=1"]
    assert merged(["~pipeline"], ["pipeline=x"]) == ["pipeline=x"]


def test_one_key_has_one_value() -> None:
    refuse_duplicates(["task=sft", "seed=1", "data.seed=1"])
    with pytest.raises(UserError, match="'seed' is given twice: seed=1 and \\+seed=2"):
        refuse_duplicates(["seed=1", "task=sft", "+seed=2"])


TEXTS = ["plain", "with space", "a=b", "it's", "a,b", "${x}", "[1]", "C:\\dir", "ends\\", "ümlaut", "", "null", "1"]


@pytest.mark.parametrize("value", [*TEXTS, "'", '"', "''", "a'b'"])
def test_hydra_reads_an_assigned_text_as_it_is(value: str) -> None:
    parsed = OverridesParser.create().parse_override(assign("init", value))
    assert parsed.key_or_group == "init"
    assert str(getattr(parsed.value(), "text", parsed.value())) == value


@pytest.mark.parametrize("value", ["=true", "=True", "=1", " = on"])
@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_switched_on(plus: str, value: str) -> None:
    assert is_true(["task=sft", f"{plus}verbose_errors{value}"], "verbose_errors")


@pytest.mark.parametrize("word", ["verbose_errors=false", "x.verbose_errors=true", "verbose_errors"])
def test_not_switched_on(word: str) -> None:
    assert not is_true(["task=sft", word], "verbose_errors")
