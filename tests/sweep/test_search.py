"""Optuna by ask and tell: planted objectives, workers, and going on after a stop."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest

from saferlhf.config.sweep_schema import SweepConfig
from saferlhf.errors import UserError
from saferlhf.sweep.search import DATABASE, Search
from saferlhf.sweep.space import read_space

WORDS = ["lr=tag(log,interval(1e-5,1e-1))", "kind=a,b"]


def settings(trials: int = 40, **changes: object) -> SweepConfig:
    values = {"name": "optuna", "objective": "x", "direction": "maximize", "trials": trials, **changes}
    return SweepConfig(**values)  # type: ignore[arg-type]


def planted(values: dict[str, str]) -> float:
    """Best at lr = 1e-3 and kind = b."""
    from math import log10

    return -((log10(float(values["lr"])) + 3) ** 2) + (values["kind"] == "b")


def run(search: Search, at_most: int = 1000) -> list[dict[str, str]]:
    tried = []
    while len(tried) < at_most and (proposal := search.ask()) is not None:
        tried.append(proposal.values)
        search.tell(proposal.number, planted(proposal.values))
    return tried


def test_it_finds_a_planted_optimum_better_than_chance(tmp_path: Path) -> None:
    best = {}
    for sampler in ("tpe", "random"):
        search = Search(read_space(WORDS), settings(40, sampler=sampler), tmp_path / sampler)
        tried = run(search)
        assert len(tried) == 40
        assert all(1e-5 <= float(values["lr"]) <= 1e-1 for values in tried)
        late = [planted(values) for values in tried[20:]]
        best[sampler] = sum(late) / len(late)
    # by chance: the variance of a uniform draw over four decades is 16 / 12, and half of the kinds are b
    assert best["tpe"] > best["random"] + 0.5
    assert best["random"] == pytest.approx(-16 / 12 + 0.5, abs=0.8)


def test_it_goes_on_where_it_was_stopped(tmp_path: Path) -> None:
    first = Search(read_space(WORDS), settings(10), tmp_path)
    tried = run(first, at_most=4)
    open_ones = [first.ask(), first.ask()]  # their runs are on their way when the process is killed
    del first
    second = Search(read_space(WORDS), settings(10), tmp_path)
    assert [proposal.values for proposal, _ in second.ended()] == tried
    assert [reached for _, reached in second.ended()] == pytest.approx([planted(values) for values in tried])
    again = [second.ask(), second.ask()]
    assert again == open_ones, "first what was begun, with the values it had"
    for proposal in again:
        assert proposal is not None
        second.tell(proposal.number, planted(proposal.values))
    rest = run(second)
    assert len(tried) + len(again) + len(rest) == 10
    every = [tuple(values.items()) for values in [*tried, *rest]]
    assert len(set(every)) == len(every), "the sampler does not propose its first values once more"
    assert Search(read_space(WORDS), settings(10), tmp_path).ask() is None
    assert Search(read_space(WORDS), settings(11), tmp_path).ask() is not None, "more trials go on"


def test_no_more_than_asked_for_are_on_their_way(tmp_path: Path) -> None:
    search = Search(read_space(WORDS), settings(3), tmp_path)
    asked = [search.ask() for _ in range(5)]
    assert [proposal is None for proposal in asked] == [False] * 3 + [True] * 2


def test_a_failed_run_is_made_up_for_by_the_next_call(tmp_path: Path) -> None:
    search = Search(read_space(WORDS), settings(3), tmp_path)
    for value in (None, float("nan"), 1.0):
        proposal = search.ask()
        assert proposal is not None
        search.tell(proposal.number, value)
    assert search.ask() is None
    assert len(run(Search(read_space(WORDS), settings(3), tmp_path))) == 2


def test_ranges_and_whole_numbers(tmp_path: Path) -> None:
    words = ["a=range(1,6,2)", "b=range(0,1,0.25)", "c=tag(int,log,interval(1,64))", "+d=x,1,true"]
    search = Search(read_space(words), settings(30, sampler="random"), tmp_path)
    tried = [p.values for p in iter(search.ask, None) if p is not None]
    assert {values["a"] for values in tried} == {"1", "3", "5"}
    assert {float(values["b"]) for values in tried} == {0.0, 0.25, 0.5, 0.75}
    assert all(1 <= int(values["c"]) <= 64 for values in tried)
    assert {values["d"] for values in tried} == {"x", "1", "True"}


def test_another_study_in_the_same_folder(tmp_path: Path) -> None:
    run(Search(read_space(WORDS), settings(2), tmp_path))
    with pytest.raises(UserError, match="is to maximize"):
        Search(read_space(WORDS), settings(2, direction="minimize"), tmp_path)
    Search(read_space(WORDS), settings(3), tmp_path).ask()
    with pytest.raises(UserError, match=f"{DATABASE} knows no seed"):
        Search(read_space(["seed=interval(0,1)"]), settings(3), tmp_path)


def test_nothing_swept(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing is swept"):
        Search(read_space(["task=reward"]), settings(), tmp_path)


def test_without_optuna(tmp_path: Path) -> None:
    with mock.patch.dict(sys.modules, {"optuna": None}), pytest.raises(UserError) as caught:
        Search(read_space(WORDS), settings(), tmp_path)
    assert str(caught.value) == "Optuna is not installed (in sweep=optuna); pip install 'saferlhf[sweeps]'"
