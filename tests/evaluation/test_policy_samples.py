"""`samples.jsonl`: what is written is read again, and what is none of ours is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saferlhf.data.rows import Turn, as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_samples import read_samples, sample_lines

NAN = np.nan

PROMPTS = PromptSet(
    ids=("r1", "r0", "r2"),
    prompts=(
        as_prompt("one"),
        (Turn("user", "hi"), Turn("assistant", "yes"), Turn("user", "go on")),
        as_prompt("three"),
    ),
    harmful=np.array([1.0, NAN, 0.0]),
)
POLICY = PolicyAnswers(
    texts=(("a b", ""), ("c\u2028d\x85e", "f\ng"), ("ü", '"h"')),
    tokens=np.array([[3, 1], [4, 4], [2, 5]]),
    truncated=np.array([[False, False], [True, False], [False, True]]),
    kl=np.array([[0.5, NAN], [-0.25, 1.0], [0.0, 2.0]]),
    judged={
        "truth": Judged({"is_safe": np.array([[1, 0], [1, NAN], [0, 0]]), "helpfulness": np.full((3, 2), 1.5)}),
        "roles": Judged({"reward": np.array([[NAN, -1.25], [0.0, 3.0], [1.0, 2.0]])}),
    },
)
BASELINE = PolicyAnswers(
    texts=(("x",), ("y",), ("z",)), tokens=np.array([[1], [2], [3]]), truncated=np.zeros((3, 1), dtype=bool)
)


def written(path: Path, lines: list[Any]) -> Path:
    """The file as a run writes it: one JSON object in a line, other alphabets as they are."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return path


def same(one: PolicyAnswers, other: PolicyAnswers) -> None:
    """Equal in everything that a file keeps, NaN equal to NaN."""
    assert one.texts == other.texts
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.truncated, other.truncated)
    assert (one.kl is None) == (other.kl is None)
    if one.kl is not None and other.kl is not None:
        np.testing.assert_array_equal(one.kl, other.kl)
    assert list(one.judged) == list(other.judged)
    for judge, said in one.judged.items():
        assert list(said.values) == list(other.judged[judge].values)
        for name, column in said.values.items():
            np.testing.assert_array_equal(column, other.judged[judge].values[name])


# ------------------------------------------------------------------------------------------------ writing
def test_lines_of_samples() -> None:
    rows = PromptSet(("row0",), (as_prompt("prompt 0"),), np.array([1.0]))
    judged = {"length": Judged({"reward": np.array([[NAN, 2.0000004]])})}
    one = PolicyAnswers((("bad", "a b"),), np.array([[1, 2]]), np.array([[False, True]]), judged=judged)
    other = PolicyAnswers((("c",),), np.array([[1]]), np.array([[False]]))
    lines = sample_lines(rows, {"policy": one, "baseline": other})
    assert [(line["policy"], line["sample"], line["response"]) for line in lines] == [
        ("policy", 0, "bad"),
        ("policy", 1, "a b"),
        ("baseline", 0, "c"),
    ]
    assert lines[0]["scores"] == {"length": {"reward": None}}
    assert lines[1]["scores"] == {"length": {"reward": 2.0}}
    assert lines[0]["prompt"] == [["user", "prompt 0"]]
    assert (lines[1]["tokens"], lines[1]["truncated"], lines[1]["harmful"]) == (2, True, 1.0)
    assert "kl" not in lines[0]
    assert "scores" not in sample_lines(rows, {"policy": one}, with_scores=False)[0]


def test_lines_are_json_without_nan() -> None:
    lines = sample_lines(PROMPTS, {"policy": POLICY})
    assert len(lines) == 6
    assert [line["harmful"] for line in lines[::2]] == [1.0, None, 0.0]
    assert lines[1]["kl"] is None
    json.dumps(lines, allow_nan=False)


# ------------------------------------------------------------------------------------------------ reading
def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Several samples, NaN scores and prompts of unknown harm, kl, two policies, characters that end lines."""
    file = written(tmp_path / "samples.jsonl", sample_lines(PROMPTS, {"policy": POLICY, "baseline": BASELINE}))
    prompts, policies = read_samples(file)
    assert (prompts.ids, prompts.prompts) == (PROMPTS.ids, PROMPTS.prompts)
    assert prompts.texts == PROMPTS.texts
    np.testing.assert_array_equal(prompts.harmful, PROMPTS.harmful)
    assert list(policies) == ["policy", "baseline"]
    same(policies["policy"], POLICY)
    same(policies["baseline"], BASELINE)
    assert policies["policy"].shape == (3, 2)
    assert (policies["policy"].tokens.dtype, policies["policy"].truncated.dtype) == (np.int64, np.bool_)


def test_without_scores_and_in_any_order_of_samples(tmp_path: Path) -> None:
    lines = sample_lines(PROMPTS, {"policy": POLICY}, with_scores=False)
    lines = [lines[place] for place in (1, 0, 2, 5, 3, 4)]
    _, policies = read_samples(written(tmp_path / "s.jsonl", lines))
    assert policies["policy"].texts == POLICY.texts
    assert policies["policy"].judged == {}


def test_a_policy_whose_rows_stand_in_another_order(tmp_path: Path) -> None:
    """Rows of all policies are in the order of the prompts, or pairs would be of different prompts."""
    lines = sample_lines(PROMPTS, {"policy": POLICY, "baseline": BASELINE})
    ours = [line for line in lines if line["policy"] == "policy"]
    theirs = [line for line in lines if line["policy"] == "baseline"]
    prompts, policies = read_samples(written(tmp_path / "s.jsonl", [*ours, *theirs[::-1]]))
    assert prompts.ids == PROMPTS.ids
    same(policies["baseline"], BASELINE)


# ------------------------------------------------------------------------------------------------ refusals
def broken(**changes: Any) -> list[dict[str, Any]]:
    """Lines of two policies, the first with some keys changed; `...` takes a key out."""
    lines = sample_lines(PROMPTS, {"policy": POLICY, "baseline": BASELINE})
    lines[0] |= changes
    lines[0] = {key: value for key, value in lines[0].items() if value is not ...}
    return lines


WRONG = [
    (broken(row_id=...), "KeyError: 'row_id'"),
    (broken(response=...), "KeyError: 'response'"),
    (broken(policy=...), "KeyError: 'policy'"),
    (broken(tokens="many"), "invalid literal"),
    (broken(tokens=None), "TypeError"),
    (broken(prompt=[["user"]]), "not enough values"),
    (broken()[:3] + [line | {"scores": [1]} for line in broken()[3:]], "TypeError"),
    ([line | {"scores": [1]} for line in broken()], "AttributeError"),
    ([3], "TypeError"),
    ([], "no line"),
    # a sample is missing, and a row of one policy
    (broken()[1:], "policy policy has not as many responses to each prompt"),
    ([line for line in broken() if (line["policy"], line["row_id"]) != ("baseline", "r1")], "policy baseline has not"),
]


@pytest.mark.parametrize(("lines", "says"), WRONG, ids=[says for _, says in WRONG])
def test_lines_that_are_none_of_ours(tmp_path: Path, lines: list[Any], says: str) -> None:
    file = written(tmp_path / "samples.jsonl", lines)
    with pytest.raises(UserError, match="these are no samples of policies") as caught:
        read_samples(file)
    assert says in caught.value.what
    assert caught.value.where == str(file)
    assert "\n" not in str(caught.value)


def test_a_score_that_one_response_lacks(tmp_path: Path) -> None:
    lines = sample_lines(PROMPTS, {"policy": POLICY})
    del lines[4]["scores"]["roles"]["reward"]
    with pytest.raises(UserError, match="KeyError: 'reward'"):
        read_samples(written(tmp_path / "s.jsonl", lines))


@pytest.mark.parametrize("content", ['{"row_id": 1', "not json\n", "\xff"])
def test_a_file_that_is_no_json(tmp_path: Path, content: str) -> None:
    file = tmp_path / "samples.jsonl"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match="no samples can be read") as caught:
        read_samples(file)
    assert "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file") as caught:
        read_samples(tmp_path / "samples.jsonl")
    assert caught.value.mend
