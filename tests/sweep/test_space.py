"""Words of the command line into what is swept, and the grid they span."""

from __future__ import annotations

from itertools import product

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from saferlhf.errors import UserError
from saferlhf.sweep.space import Interval, grid, is_about, label, read_space, without


def test_fixed_and_swept_words_are_told_apart() -> None:
    space = read_space(
        ["task=reward", "seed=0,1", "data.columns={a: b}", "backbone.betas=[1,2]", "+x=range(1,4)", "~y"]
    )
    assert space.fixed == ("task=reward", "data.columns={a: b}", "backbone.betas=[1,2]", "~y")
    assert [(d.key, d.name, d.values) for d in space.dimensions] == [
        ("seed", "seed", ("0", "1")),
        ("+x", "x", ("1", "2", "3")),
    ]
    assert space.words({"seed": "1", "x": "3"}) == [*space.fixed, "seed=1", "+x=3"]


WORDS = ["task=reward,cost", "seed=range(0,3)", "a=choice([1,2],{b: 1},'x, y')", "name=fixed", "lr=1e-4,0.001"]


def test_the_grid_is_hydras_own() -> None:
    """Against the basic sweeper of Hydra: the same runs in the same order."""
    space = read_space(WORDS)
    ours = [space.words(values) for values in grid(space)]
    (theirs,) = BasicSweeper.split_arguments(OverridesParser.create().parse_overrides(WORDS), None)
    assert [sorted(words) for words in ours] == [sorted(words) for words in theirs]
    assert len(ours) == 2 * 3 * 3 * 2


def test_a_grid_by_hand() -> None:
    values = grid(read_space(["a=-1,0,1", "b=0.01,0.1"]))
    assert values == [{"a": a, "b": b} for a, b in product(["-1", "0", "1"], ["0.01", "0.1"])]


def test_nothing_swept_is_one_run() -> None:
    assert grid(read_space(["task=reward"])) == [{}]
    assert label({}) == "as typed"


def test_intervals() -> None:
    words = [
        "a=interval(0,1)",
        "b=tag(log,interval(1e-5,1e-3))",
        "c=tag(int,interval(1,8))",
        "d=tag(int,log,interval(1,64))",
    ]
    words += ["e=range(1,6,2)", "f=range(0,1,0.25)", "g=tag(log,range(1,5))"]
    found = {d.name: d.interval for d in read_space(words).dimensions}
    assert found == {
        "a": Interval(0.0, 1.0),
        "b": Interval(1e-5, 1e-3, log=True),
        "c": Interval(1, 8, whole=True),
        "d": Interval(1, 64, log=True, whole=True),
        "e": Interval(1, 5, whole=True, step=2),
        "f": Interval(0.0, 0.75, step=0.25),
        "g": Interval(1, 4, log=True, whole=True),
    }
    assert [d.first for d in read_space(words).dimensions][:4] == ["0.0", "1e-05", "1", "1"]


def test_saved_keys_and_typed_ones() -> None:
    params = {"seed": [0, 1], "optimizer.lr": "tag(log, interval(1e-5, 1e-3))", "task": ["reward", "cost"]}
    space = read_space(["seed=5,6,7"], params)
    assert [(d.name, d.values) for d in space.dimensions] == [
        ("seed", ("5", "6", "7")),
        ("optimizer.lr", ()),
        ("task", ("reward", "cost")),
    ]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("a=interval(1,1)", "nothing lies between 1 and 1"),
        ("a=tag(log,interval(0,1))", "no place on a log scale"),
        ("a=tag(lgo,interval(1,2))", "unknown tag 'lgo'"),
        ("a=range(3,1)", "no value to sweep over"),
        ("a=1,1", "the same value twice"),
    ],
)
def test_what_cannot_be_swept(word: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_space([word])


def test_an_interval_is_no_grid() -> None:
    with pytest.raises(UserError, match="an interval has no values for a grid"):
        grid(read_space(["a=interval(0,1)"]))


def test_too_many_runs() -> None:
    with pytest.raises(UserError, match="10,201 runs"):
        grid(read_space(["a=range(0,101)", "b=range(0,101)"]))


def test_hydras_own_complaint_comes_through() -> None:
    with pytest.raises(HydraException):
        read_space(["a=interval(1"])


def test_labels_are_short() -> None:
    assert label({"optimizer.lr": "0.000312345678", "task": "reward", "seed": "0"}) == (
        "optimizer.lr=0.0003123, task=reward, seed=0"
    )


def test_words_about_a_group() -> None:
    words = ["sweep=optuna", "sweep.trials=3", "+sweep.x=1", "sweeper=1", "task=reward", "hydra/launcher=basic"]
    assert without(words, "sweep", "hydra") == ["sweeper=1", "task=reward"]
    assert is_about("hydra.launcher.x=1", "hydra.launcher")
