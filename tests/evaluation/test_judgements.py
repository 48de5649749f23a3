"""Judgements on disk: what goes in comes out, without texts and without pickles; damaged and foreign files."""

from __future__ import annotations

import dataclasses
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from saferlhf.data.labels import labels_of
from saferlhf.data.rows import PreferencePair, QuestionAnswer, as_prompt
from saferlhf.errors import UserError
from saferlhf.evaluation import judgements as made
from saferlhf.evaluation.judgements import Judgements, list_judgements, load, of_pairs, of_verdicts, prompt_hashes
from saferlhf.ops.moderation import Verdicts

CATEGORIES = ("Weather", "Gardening")
ROWS = [
    QuestionAnswer("r0", as_prompt("How do I water a fern?"), "often", True, frozenset(), 0),
    QuestionAnswer("r1", as_prompt("how do i water a fern"), "never", False, frozenset({"Gardening"}), 2),
    QuestionAnswer("r2", as_prompt("Will it rain?"), "ask the frogs", None, None, None),
]
VERDICTS = Verdicts(
    p_unsafe=np.array([0.1, 0.8, 1.0]),
    p_severity=np.array([[0.9, 0.1, 0.0, 0.0], [0.2, 0.1, 0.6, 0.1], [0.0, 0.0, 0.5, 0.5]]),
    p_category=np.array([[0.1, 0.0], [0.2, 0.9], [0.5, 0.5]]),
    unsafe=np.array([False, True, True]),
    severity=np.array([0, 2, 3]),
    category=np.array([[False, False], [False, True], [True, True]]),
    unsafe_logit=np.array([-2.2, 1.4, 40.0]),
)
PAIRS = [
    PreferencePair("p0", as_prompt("fern?"), "a", "b", True, False, better_response_id=1, safer_response_id=0),
    PreferencePair("p1", as_prompt("frog?"), "a", "b", None, None, better_response_id=None, safer_response_id=1),
]


def moderated(**changes: Any) -> Judgements:
    found = of_verdicts("toy", ROWS, labels_of(ROWS, CATEGORIES), VERDICTS, groups=["a", "a", "b"])
    return dataclasses.replace(found, **changes)


def same(one: Any, other: Any) -> bool:
    """Equal in every field, arrays by value."""
    if dataclasses.is_dataclass(one):
        return all(same(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return bool(one == other)


def rewritten(path: Path, **changes: Any) -> Path:
    """The same file with some arrays replaced; None takes one out."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    arrays |= changes
    np.savez_compressed(path, **{name: values for name, values in arrays.items() if values is not None})
    return path


def test_verdicts_come_back(tmp_path: Path) -> None:
    wanted = moderated()
    path = wanted.save(tmp_path)
    assert path == tmp_path / "judgements" / "toy.npz"
    found = load(path)
    assert same(found, wanted)
    assert found.metric == "unsafe/macro_f1" and found.kind == "moderation" and len(found) == 3
    assert found.given.all() and found.parsed is None
    assert found.labels is not None and found.labels.unsafe.tolist() == [0, 1, -1]
    # a prompt in other letters is the same prompt
    assert found.prompts[0] == found.prompts[1] != found.prompts[2]
    assert found.prompts.tolist() == prompt_hashes(row.prompt for row in ROWS).tolist()
    assert all(len(code) == 16 and set(code) <= set("0123456789abcdef") for code in found.prompts)


def test_without_heads_logits_and_groups(tmp_path: Path) -> None:
    """A judge that only says yes or no, and once nothing at all."""
    verdicts = Verdicts(np.full(3, np.nan), None, None, np.array([True, False, True]), None, None)
    wanted = of_verdicts("guard", ROWS, labels_of(ROWS, ()), verdicts, parsed=[True, False, True])
    found = load(wanted.save(tmp_path))
    assert found.groups is None and found.verdicts is not None and found.verdicts.severity is None
    assert found.verdicts.unsafe_logit is None and np.isnan(found.verdicts.p_unsafe).all()
    assert found.given.tolist() == [True, False, True]
    assert found.labels is not None and found.labels.categories == () and found.labels.category.shape == (3, 0)


def test_pairs_come_back(tmp_path: Path) -> None:
    scores = np.array([[-1.0, 2.0], [0.5, -0.5]])
    cost = of_pairs("pairs", PAIRS, scores, kind="cost")
    found = load(cost.save(tmp_path))
    assert same(found, cost)
    assert found.metric == "cost/pair_accuracy" and found.preferred is not None and found.unsafe is not None
    assert found.preferred.tolist() == [0, 1] and found.unsafe.tolist() == [[0, 1], [-1, -1]]
    reward = of_pairs("pairs", PAIRS, scores, kind="reward")
    assert reward.preferred is not None and reward.preferred.tolist() == [1, -1]
    # what was not scored may hold anything, the rest may not
    odd = np.array([[np.nan, 2.0], [0.5, -0.5]])
    assert of_pairs("pairs", PAIRS, odd, kind="reward", parsed=[False, True]).given.tolist() == [False, True]
    with pytest.raises(UserError, match="NaN or infinite"):
        of_pairs("pairs", PAIRS, odd, kind="reward")


def test_rows_are_taken_everywhere(tmp_path: Path) -> None:
    found = moderated().taken([2, 0])
    assert found.row_ids.tolist() == ["r2", "r0"] and found.groups is not None and found.groups.tolist() == ["b", "a"]
    assert found.labels is not None and found.labels.unsafe.tolist() == [-1, 0]
    assert found.labels.categories == CATEGORIES
    assert found.verdicts is not None and found.verdicts.severity is not None
    assert found.verdicts.severity.tolist() == [3, 0] and found.verdicts.p_unsafe.tolist() == [1.0, 0.1]


def test_no_text_and_no_pickle_in_the_file(tmp_path: Path) -> None:
    path = moderated().save(tmp_path)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    for name, content in parts.items():
        # no array of objects: numpy reads it without pickles
        np.lib.format.read_array(io.BytesIO(content), allow_pickle=False)
        for text in ("fern", "rain", "frogs", "often", "never"):
            assert text.encode() not in content and text.encode("utf-32-le") not in content, name


def test_saving_replaces_whole_files(tmp_path: Path) -> None:
    moderated().save(tmp_path)
    moderated(metric="unsafe/auroc").save(tmp_path)
    of_pairs("pairs", PAIRS, np.zeros((2, 2)), kind="reward").save(tmp_path)
    assert {path.name for path in (tmp_path / "judgements").iterdir()} == {"toy.npz", "pairs.npz"}
    found = list_judgements(tmp_path)
    assert list(found) == ["pairs", "toy"] and load(found["toy"]).metric == "unsafe/auroc"
    assert list_judgements(tmp_path / "nothing") == {}


class Loud:
    """A pickle that would say so."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was read",))


def test_pickles_are_not_read(tmp_path: Path) -> None:
    path = moderated().save(tmp_path)
    whole = tmp_path / "whole.npz"
    whole.write_bytes(pickle.dumps(Loud()))
    # arrays of objects: numpy pickles them
    np.savez(tmp_path / "inside.npz", row_ids=np.array([Loud()], dtype=object))
    rewritten(path, prompts=np.array([Loud()] * 3, dtype=object))
    for file in (whole, tmp_path / "inside.npz", path):
        with pytest.raises(UserError, match="no judgements can be read"):
            load(file)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", b"not an archive"])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.npz"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"no judgements can be read.*x\.npz.*repeat the evaluation"):
        load(path)


def test_a_file_that_was_cut_off(tmp_path: Path) -> None:
    path = moderated().save(tmp_path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match="no judgements can be read"):
        load(path)


def test_foreign_files(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(UserError, match="no judgements of this version"):
        load(tmp_path / "other.npz")
    with pytest.raises(UserError, match="no judgements can be read"):
        load(tmp_path / "single.npy")
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "none.npz")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("label_unsafe", np.array([0, 1])),  # a row short
        ("label_unsafe", np.array([0, 1, 2])),  # no such label
        ("verdict_severity", np.array([0, 1, 4])),
        ("verdict_p_unsafe", np.array([0.1, 0.2, np.inf])),
        ("verdict_unsafe", None),
        ("row_ids", np.array([1, 2, 3])),
        ("categories", np.array(["Weather"])),
        ("parsed", np.array([1, 1, 0])),
        ("protocol", np.array("../out")),
        ("metric", np.array("macro_f1")),
    ],
)
def test_changed_files(tmp_path: Path, name: str, values: Any) -> None:
    path = rewritten(moderated().save(tmp_path), **{name: values})
    with pytest.raises(UserError, match="damaged judgements"):
        load(path)


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="letters, digits"):
        moderated(protocol="a/b")
    with pytest.raises(ValueError, match="unknown kind"):
        moderated(kind="regret")
    with pytest.raises(ValueError, match="pairs need"):
        moderated(kind="reward")
    with pytest.raises(ValueError, match="moderation needs"):
        moderated(labels=None)
    assert set(made.HEADLINE) == set(made.KINDS)
