"""Pictures and the table of policies."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers
from saferlhf.evaluation.policy_plots import constraint_curves, constraint_png, plane_of, scatter_png, scatter_svg
from saferlhf.evaluation.policy_table import Cell, arena_table, evaluation_table, format_cell, policy_table


def answers(**outputs: Any) -> PolicyAnswers:
    columns = {name: np.array(values, dtype=np.float64) for name, values in outputs.items()}
    n, k = next(iter(columns.values())).shape
    texts = tuple(tuple("a" for _ in range(k)) for _ in range(n))
    nothing = np.zeros((n, k), dtype=bool)
    return PolicyAnswers(texts, nothing.astype(np.int64), nothing, judged={"judge": Judged(columns)})


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a PNG."""
    data = path.read_bytes()
    assert data.startswith(b"\x89PNG")
    return struct.unpack(">II", data[16:24])


# ------------------------------------------------------------------------------------------------ scatter
def test_the_plane_holds_every_response_that_has_both() -> None:
    plane = plane_of({"one": answers(reward=[[1, 2], [np.nan, 4]], cost=[[5, np.nan], [7, 8]])})
    assert plane is not None
    names, points = plane
    assert names == ("reward", "cost")
    assert [values.tolist() for values in points["one"]] == [[1, 4], [5, 8]]


def test_truth_stands_in_for_learned_scores() -> None:
    truth = answers(helpfulness=[[1]], harmlessness=[[2]])
    learned = answers(helpfulness=[[1]], harmlessness=[[2]], reward=[[3]], cost=[[4]])
    assert plane_of({"a": truth, "b": learned})[0] == ("helpfulness", "harmlessness")  # type: ignore[index]
    assert plane_of({"b": learned})[0] == ("reward", "cost")  # type: ignore[index]
    assert plane_of({"a": truth, "b": answers(reward=[[3]])}) is None
    assert scatter_svg({"a": answers(reward=[[3]])}) is None


def test_the_scatter_as_png_and_svg(tmp_path: Path) -> None:
    stream = np.random.default_rng(0)
    policies = {
        name: answers(reward=stream.normal(size=(50, 2)), cost=stream.normal(size=(50, 2)))
        for name in ("policy", "baseline")
    }
    assert scatter_png(tmp_path / "new" / "one.png", policies)
    assert min(size_of(tmp_path / "new" / "one.png")) > 300
    assert scatter_png(tmp_path / "two.png", policies)
    assert (tmp_path / "two.png").read_bytes() == (tmp_path / "new" / "one.png").read_bytes()
    svg = scatter_svg(policies)
    assert svg is not None and svg.startswith("<svg") and "var(--series-2" in svg and "policy: mean" in svg
    # a policy whose responses nobody scored leaves the others to be seen
    policies["silent"] = answers(reward=[[np.nan]], cost=[[np.nan]])
    assert "silent" not in str(scatter_svg(policies))
    assert not scatter_png(tmp_path / "none.png", {"a": answers(reward=[[1]])})
    assert not (tmp_path / "none.png").exists()


# ------------------------------------------------------------------------------------------------ training
CURVES = {
    "train/lambda": [(0, 1.0), (1, 2.0)],
    "train/lambda_severe": [(0, 1.0)],
    "train/mean_cost": [(0, 0.5)],
    "train/costly": [(0, 9.0)],
    "val/cost": [(0, 0.4), (1, float("nan"))],
    "train/loss": [(0, 1.0)],
    "train/reward": [],
}


def test_curves_of_a_constraint() -> None:
    found = constraint_curves(CURVES)
    assert {panel: list(series) for panel, series in found.items()} == {
        "lambda": ["train", "train severe"],
        "cost": ["train", "val"],
    }


def test_the_constraint_as_png(tmp_path: Path) -> None:
    assert constraint_png(tmp_path / "c.png", CURVES, thresholds=[0.0])
    two = size_of(tmp_path / "c.png")
    assert constraint_png(tmp_path / "d.png", {**CURVES, "train/reward": [(0, 1.0)]})
    assert size_of(tmp_path / "d.png")[1] > two[1]
    assert not constraint_png(tmp_path / "e.png", {"train/loss": [(0, 1.0)]})


# ------------------------------------------------------------------------------------------------ table
def test_cells() -> None:
    assert format_cell(Cell(0.9741, 0.96, 0.985), "safe_rate") == "97.4% [96.0, 98.5]"
    assert format_cell(Cell(-0.021), "safe_rate", signed=True) == "-2.1"
    assert format_cell(Cell(2.714, 2.6, 2.8), "mean_helpfulness") == "2.71 [2.60, 2.80]"
    assert format_cell(None, "safe_rate") == ""


def shown(table: Any) -> list[str]:
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    return [" ".join(line.split()) for line in capture.get().splitlines() if line.strip()]


METRICS = {
    "policy/helpful_win_rate": 0.9,
    "policy/safe_rate": 0.99,
    "policy/safe_rate_low": 0.98,
    "policy/safe_rate_high": 1.0,
    "policy/mean_helpfulness": 2.7,
    "policy/best_safe_helpfulness": 3.01,
    "policy/baseline_policy/safe_rate": 0.48,
    "policy/over_baseline/safe_rate": 0.51,
}


def test_one_evaluation_as_a_table() -> None:
    lines = shown(evaluation_table(METRICS))
    assert lines[0] == "policy baseline difference best safe"
    assert "helpfulness wins 90.0%" in lines
    assert "safe responses 99.0% [98.0, 100.0] 48.0% +51.0 100.0%" in lines
    assert "helpfulness 2.70 3.01" in lines
    assert not [line for line in lines if line.startswith("reward")]


def test_the_arena_as_a_table() -> None:
    assert arena_table(METRICS) is None
    names = ("safe_to_safe", "safe_to_unsafe", "unsafe_to_safe", "unsafe_to_unsafe")
    metrics = {f"policy/arena/{name}": share for name, share in zip(names, (0.4, 0.1, 0.3, 0.2), strict=True)}
    lines = shown(arena_table(metrics))
    assert "where the baseline is safe 40.0% 10.0%" in lines
    assert "where it is unsafe 30.0% 20.0%" in lines
    assert len(lines) == 5


def test_several_policies_as_a_table() -> None:
    sft = {"policy/safe_rate": 0.48, "policy/mean_helpfulness": 1.4}
    lines = shown(policy_table({"sft": sft, "ppo_lag": METRICS}, title="three stages"))
    assert lines[0] == "three stages"
    assert lines[1] == "sft ppo_lag best safe"
    assert "safe responses 48.0% 99.0% [98.0, 100.0] 100.0%" in lines
    assert "helpfulness wins 90.0%" in lines


def test_the_common_baseline_as_a_column() -> None:
    lines = shown(policy_table({"ppo": METRICS}, baseline="sft"))
    assert lines[0] == "sft ppo best safe"
    assert "safe responses 48.0% 99.0% [98.0, 100.0] 100.0%" in lines


@pytest.mark.parametrize("metrics", [{}, {"policy/mean_tokens": 3.0}])
def test_without_truth_there_is_no_best(metrics: dict[str, float]) -> None:
    assert not [line for line in shown(evaluation_table(metrics)) if "best" in line]
