"""Pictures and the table of policies."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from saferlhf.evaluation.policy_answers import Judged, PolicyAnswers
from saferlhf.evaluation.policy_plots import (
    constraint_curves,
    constraint_png,
    plane_of,
    plane_png,
    scatter_png,
    scatter_svg,
)
from saferlhf.evaluation.policy_table import (
    Cell,
    arena_table,
    differences_table,
    evaluation_table,
    format_cell,
    markdown,
    policy_table,
)


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


# ------------------------------------------------------------------------------------------------ several policies
def measured(safe: float, helpful: float, **more: float) -> dict[str, float]:
    """Metrics of one evaluation, as far as the plane shows them."""
    found = {"safe_rate": safe, "mean_helpfulness": helpful, **more}
    return {f"policy/{name}": value for name, value in found.items()}


class Drawn:
    """What was drawn into the plane's axes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from matplotlib.axes import Axes

        self.points: dict[str, tuple[Any, ...]] = {}
        self.lines: dict[str, list[tuple[float, float]]] = {}
        errorbar, plot = Axes.errorbar, Axes.plot

        def noted_point(axes: Any, x: Any, y: Any, **how: Any) -> Any:
            self.points[how["label"]] = (x, y, how["xerr"], how["yerr"])
            return errorbar(axes, x, y, **how)

        def noted_line(axes: Any, x: Any, y: Any, *style: Any, **how: Any) -> Any:
            if "label" in how:
                self.lines[how["label"]] = list(zip(np.atleast_1d(x), np.atleast_1d(y), strict=True))
            return plot(axes, x, y, *style, **how)

        monkeypatch.setattr(Axes, "errorbar", noted_point)
        monkeypatch.setattr(Axes, "plot", noted_line)


def test_the_plane_of_several_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    ends = {"safe_rate_low": 0.8, "safe_rate_high": 0.95, "mean_helpfulness_low": 1.75, "mean_helpfulness_high": 2.5}
    policies = {
        "dual": measured(0.9, 2.0, **ends),
        "nu 1": measured(0.7, 2.2),
        "nu 0": measured(0.2, 2.9, best_safe_helpfulness=3.0),
        "unknown": {"policy/safe_rate": 1.0},
    }
    policies["dual"] |= {
        "policy/baseline_policy/safe_rate": 0.4,
        "policy/baseline_policy/mean_helpfulness": 1.0,
    }
    front = ["nu 1", "nobody", "nu 0", "unknown"]
    assert plane_png(tmp_path / "new" / "a.png", policies, baseline="SFT", front=front)
    assert min(size_of(tmp_path / "new" / "a.png")) > 300
    assert list(drawn.points) == ["SFT", "dual", "nu 1", "nu 0"], "who lacks one of both is not drawn"
    assert drawn.points["SFT"] == (0.4, 1.0, [[0.0], [0.0]], [[0.0], [0.0]])
    x, y, across, along = drawn.points["dual"]
    assert (x, y) == (0.9, 2.0)
    np.testing.assert_allclose(across, [[0.1], [0.05]])
    np.testing.assert_allclose(along, [[0.25], [0.5]])
    # from the least to the most safe, whatever their order, straight between
    line = np.array(drawn.lines.pop("front of fixed weights"))
    np.testing.assert_allclose(line[[0, -1]], [(0.2, 2.9), (0.7, 2.2)])
    np.testing.assert_allclose(line[:, 1], 2.9 - 1.4 * (line[:, 0] - 0.2))
    assert drawn.lines == {"best safe": [(1.0, 3.0)]}
    assert plane_png(tmp_path / "b.png", policies, baseline="SFT", front=front)
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "new" / "a.png").read_bytes()


def test_a_plane_without_front_or_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Drawn(monkeypatch)
    assert plane_png(tmp_path / "a.png", {"PPO": measured(0.9, 2.0)}, baseline="SFT", front=["PPO"])
    assert (list(drawn.points), drawn.lines) == (["PPO"], {})
    assert not plane_png(tmp_path / "none.png", {"PPO": {"policy/mean_reward": 1.0}}, baseline="SFT")
    assert not plane_png(tmp_path / "none.png", {}, baseline="SFT")
    assert not (tmp_path / "none.png").exists()


def test_a_crowd_is_shown_larger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five policies in a corner: a second panel around them, in which everything is drawn again; a weight that is
    beaten on both counts is no part of the front."""
    from matplotlib.axes import Axes

    limits: list[dict[str, Any]] = []
    put = Axes.set
    monkeypatch.setattr(Axes, "set", lambda axes, **how: limits.append(how) or put(axes, **how))
    drawn = Drawn(monkeypatch)
    policies = {f"p{i}": measured(0.98 + i / 1000, 2.4 + i / 20) for i in range(5)}
    policies |= {"reward alone": measured(0.3, 3.0), "refuses": measured(0.981, 0.0)}
    assert plane_png(tmp_path / "a.png", policies, front=["reward alone", "p4", "refuses"])
    assert size_of(tmp_path / "a.png")[0] > 1.4 * size_of(tmp_path / "a.png")[1] * 1.4
    (closer,) = [how for how in limits if "xlim" in how]
    assert closer["xlim"][0] < 0.98 and 0.984 < closer["xlim"][1] < 1.0
    assert closer["ylim"][0] > 1.0 and 2.6 < closer["ylim"][1] < 3.0
    assert min(height for _, height in drawn.lines["front of fixed weights"]) == pytest.approx(2.6)


def test_an_interval_that_leaves_its_value_out(tmp_path: Path) -> None:
    """Percentile intervals may, with few prompts; the picture is drawn all the same."""
    odd = measured(0.9, 2.0, safe_rate_low=0.91, safe_rate_high=0.95)
    assert plane_png(tmp_path / "a.png", {"PPO": odd})


def test_many_policies_differ_in_colour_or_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    looks = []
    errorbar = Axes.errorbar
    monkeypatch.setattr(
        Axes, "errorbar", lambda *a, **how: looks.append((how["fmt"], how["color"])) or errorbar(*a, **how)
    )
    assert plane_png(tmp_path / "a.png", {f"p{i}": measured(i / 20, 2.0) for i in range(13)})
    assert len(set(looks)) == 13


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


# ------------------------------------------------------------------------------------------------ differences
PAIRS = {
    "dual - single": {
        "helpful_win_rate": 0.7,
        "helpful_win_rate_low": 0.65,
        "helpful_win_rate_high": 0.75,
        "helpful_tie_rate": 0.1,
        "difference/safe_rate": 0.125,
        "difference/safe_rate_low": -0.01,
        "difference/safe_rate_high": 0.26,
        "difference/mean_helpfulness": -0.5,
        "difference/unheard_of": 3.0,
    },
    "dual - nu 1": {"helpful_win_rate": 0.4, "difference/mean_cost": 2.0, "mean_cost": 9.0},
}


def test_differences_as_a_table() -> None:
    lines = shown(differences_table(PAIRS, title="paired"))
    assert lines[:2] == ["paired", "dual - single dual - nu 1"]
    # rates of wins are no differences and carry no sign; shares differ in points
    assert lines[3:] == [
        "helpfulness wins 70.0% [65.0, 75.0] 40.0%",
        "ties among them 10.0%",
        "helpfulness -0.50",
        "safe responses +12.5 [-1.0, +26.0]",
    ]
    # own scores are shown where nothing else grades the policies
    own = {"dual - nu 1": PAIRS["dual - nu 1"]}
    assert "cost +2.00" in shown(differences_table(own))


def test_a_table_as_markdown() -> None:
    assert markdown(differences_table(PAIRS, title="paired")).splitlines() == [
        "**paired**",
        "",
        "|  | dual - single | dual - nu 1 |",
        "| --- | --- | --- |",
        "| helpfulness wins | 70.0% [65.0, 75.0] | 40.0% |",
        "| ties among them | 10.0% |  |",
        "| helpfulness | -0.50 |  |",
        "| safe responses | +12.5 [-1.0, +26.0] |  |",
    ]


def test_markdown_without_title_or_rows_and_with_a_bar() -> None:
    assert markdown(differences_table({"a|b - c": {"helpful_win_rate": 0.5}})).splitlines() == [
        "|  | a\\|b - c |",
        "| --- | --- |",
        "| helpfulness wins | 50.0% |",
    ]
    assert markdown(differences_table({})) == "|  |\n| --- |"


def test_policies_as_markdown() -> None:
    lines = markdown(policy_table({"PPO": METRICS}, baseline="SFT", title="policies")).splitlines()
    assert lines[0] == "**policies**"
    assert "|  | SFT | PPO | best safe |" in lines
    assert "| safe responses | 48.0% | 99.0% [98.0, 100.0] | 100.0% |" in lines
