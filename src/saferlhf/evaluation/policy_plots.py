"""Pictures of policies: the reward-cost plane with every response in it, and a constraint at work over training.

As SVG for the report page and as PNG for MLflow and for slides; the PNGs stand on white ground. Equal input gives equal
bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from saferlhf.evaluation.drawing import DASHES, GRID, INK, ON_PAGE, ON_WHITE, SERIES, panel, save_png, to_svg
from saferlhf.evaluation.plots import Curve
from saferlhf.evaluation.policy_answers import PolicyAnswers
from saferlhf.evaluation.policy_compare import height_of_front
from saferlhf.evaluation.policy_metrics import BASELINE

Floats = NDArray[np.float64]

SCATTER, CURVES = "reward_cost.png", "constraint.png"
"""Names of the pictures of one policy in its folder."""

PLANES = (("reward", "cost"), ("helpfulness", "harmlessness"))
"""What is drawn against each other, the first pair that judges give."""

_MOST_POINTS = 2_000  # of each policy; more make a blot

_CROWD = 4  # so many points close together are shown larger

Point = tuple[float, float, float]
"""A value and the ends of its interval."""

Spot = tuple[float, float]
"""x and y."""

CONSTRAINT_CURVES = ("lambda", "cost", "reward")
"""Panels of the picture of a constraint at work, top to bottom."""


def scatter_svg(policies: Mapping[str, PolicyAnswers], title: str = "responses by reward and cost") -> str | None:
    """The plane as an <svg> element for the report; None where no judge gives both of its sides."""
    figure = _scatter(policies, ON_PAGE)
    return None if figure is None else to_svg(figure, title)


def scatter_png(path: Path, policies: Mapping[str, PolicyAnswers]) -> bool:
    """Write the plane as a PNG; False where no judge gives both of its sides."""
    figure = _scatter(policies, ON_WHITE)
    if figure is None:
        return False
    save_png(figure, path)
    return True


def plane_of(
    policies: Mapping[str, PolicyAnswers],
) -> tuple[tuple[str, str], dict[str, tuple[Floats, Floats]]] | None:
    """The first pair of quantities that every policy has, and policy -> its responses' (x, y), flat and without NaN."""
    for names in PLANES:
        found: dict[str, tuple[Floats, Floats]] = {}
        for policy, answers in policies.items():
            x, y = (_output(answers, name) for name in names)
            if x is not None and y is not None:
                known = ~np.isnan(x) & ~np.isnan(y)
                found[policy] = (x[known], y[known])
        if found and len(found) == len(policies):
            return names, found
    return None


def _output(answers: PolicyAnswers, name: str) -> Floats | None:
    found = (said.values[name] for said in answers.judged.values() if name in said.values)
    values = next(found, None)
    return None if values is None else values.ravel()


def _scatter(policies: Mapping[str, PolicyAnswers], colours: Mapping[str, str]) -> Any:
    plane = plane_of(policies)
    if plane is None:
        return None
    (x_name, y_name), points = plane
    figure, axes = panel(height=4.2)
    for place, (name, (x, y)) in enumerate(points.items()):
        colour = colours[SERIES[place % len(SERIES)]]
        if not len(x):
            continue
        shown = np.unique(np.linspace(0, len(x) - 1, min(len(x), _MOST_POINTS)).round().astype(int))
        axes.plot(x[shown], y[shown], "o", color=colour, markersize=2.2, alpha=0.35, markeredgewidth=0)
        label, marker = f"{name}: mean {x.mean():.2f}, {y.mean():.2f}", "os^D"[place % 4]
        axes.plot(x.mean(), y.mean(), marker, color=colour, markersize=9, label=label, markeredgecolor=colours[INK])
    if y_name == "cost":
        axes.axhline(0.0, color=colours[INK], linewidth=1.2)
    axes.set_xlabel(x_name)
    axes.set_ylabel(f"{y_name} (above 0: unsafe)" if y_name == "cost" else y_name)
    _recolour(axes, colours)
    # above the plane: anywhere in it would hide responses
    figure.legend(loc="outside upper left", ncols=2, frameon=False, labelcolor=colours[INK], fontsize=9)
    return figure


# ------------------------------------------------------------------------------------------------ several policies
def plane_png(
    path: Path,
    policies: Mapping[str, Mapping[str, float]],
    *,
    baseline: str | None = None,
    front: Sequence[str] = (),
    prefix: str = "policy",
) -> bool:
    """Write policies as points of the plane of safe responses and helpfulness; False where neither is known.

    Args:
        path: of the PNG.
        policies: heading -> metrics of its evaluation, with intervals.
        baseline: heading of the policy that all of them are measured against; None: it is not drawn.
        front: headings of the policies that span the front (`policy_compare.height_of_front`).
        prefix: of the metrics' names.
    """
    places = {name: point for name, metrics in policies.items() if (point := _place(metrics, prefix)) is not None}
    if baseline is not None and policies:
        start = _place(next(iter(policies.values())), f"{prefix}/{BASELINE}")
        places = places if start is None else {baseline: start, **places}
    if not places:
        return False
    from matplotlib.figure import Figure

    best_key = f"{prefix}/best_safe_helpfulness"
    best = next((m[best_key] for m in policies.values() if best_key in m), None)
    fixed = [(places[name][0][0], places[name][1][0]) for name in front if name in places]
    crowd = _crowd([(x[0], y[0]) for x, y in places.values()])
    figure = Figure(figsize=(7.2 if crowd is None else 11.0, 4.4), layout="constrained")
    axes, *closer = figure.subplots(1, 1 if crowd is None else 2, squeeze=False)[0]
    for panel_axes in (axes, *closer):
        _draw_plane(panel_axes, places, fixed, best)
    if crowd is not None:
        closer[0].set(xlim=crowd[0], ylim=crowd[1], title="closer")
        axes.indicate_inset((crowd[0][0], crowd[1][0], *map(_width, crowd)), edgecolor=ON_WHITE[INK])
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    save_png(figure, path)
    return True


def _draw_plane(
    axes: Any, places: Mapping[str, tuple[Point, Point]], fixed: Sequence[Spot], best: float | None
) -> None:
    """Points with their intervals, the front that the fixed weights span, the best reachable point."""
    if len(fixed) > 1:
        safe, helpful = (np.array(values) for values in zip(*fixed, strict=True))
        across = np.unique(np.concatenate([safe, np.linspace(safe.min(), safe.max(), 200)]))
        heights = [height_of_front(safe, helpful, float(at)) for at in across]
        axes.plot(across, heights, ":", color=ON_WHITE[INK], linewidth=1.2, label="front of fixed weights")
    for number, (name, (x, y)) in enumerate(places.items()):
        colour, marker = ON_WHITE[SERIES[number % len(SERIES)]], "os^Dv<>p"[number // len(SERIES) % 8]
        # a percentile interval of few prompts may leave its own value out
        spans = [[[max(point - low, 0.0)], [max(high - point, 0.0)]] for point, low, high in (x, y)]
        axes.errorbar(x[0], y[0], xerr=spans[0], yerr=spans[1], fmt=marker, color=colour, label=name, capsize=2)
    if best is not None:
        axes.plot(1.0, best, "*", color=ON_WHITE[INK], markersize=11, label="best safe")
    axes.set_xlabel("share of safe responses")
    axes.set_ylabel("mean helpfulness")
    axes.grid(color=ON_WHITE[GRID], linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _width(span: Spot) -> float:
    return span[1] - span[0]


def _crowd(spots: Sequence[Spot]) -> tuple[Spot, Spot] | None:
    """Limits around half of the points or more that share a tenth of the plane; None where nothing is crowded."""
    if len(spots) < _CROWD:
        return None
    x, y = (np.array(values) for values in zip(*spots, strict=True))
    middle = (float(np.median(x)), float(np.median(y)))
    reach = [max(0.1 * float(np.ptp(values)), 1e-9) for values in (x, y)]
    near = (abs(x - middle[0]) <= reach[0]) & (abs(y - middle[1]) <= reach[1])
    if near.sum() < max(_CROWD, len(spots) / 2):
        return None
    limits = []
    for values in (x[near], y[near]):
        room = 0.25 * max(float(np.ptp(values)), 1e-3)
        limits.append((float(values.min()) - room, float(values.max()) + room))
    return limits[0], limits[1]


def _place(metrics: Mapping[str, float], prefix: str) -> tuple[Point, Point] | None:
    """(x, y), each with the ends of its interval."""
    found = []
    for name in ("safe_rate", "mean_helpfulness"):
        key = f"{prefix}/{name}"
        if key not in metrics:
            return None
        value = metrics[key]
        found.append((value, metrics.get(f"{key}_low", value), metrics.get(f"{key}_high", value)))
    return found[0], found[1]


# ------------------------------------------------------------------------------------------------ training
def constraint_curves(curves: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Panel -> label -> curve: of all logged curves those that show a constraint at work.

    A curve belongs to the panel that its last name starts with: `train/lambda`, `train/lambda_severe` and
    `val/lambda` to `lambda`, `train/cost` and `train/mean_cost` to `cost`.
    """
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        area, _, last = name.rpartition("/")
        last = last.removeprefix("mean_")
        for wanted in CONSTRAINT_CURVES:
            if len(curve) and (last == wanted or last.startswith(f"{wanted}_")):
                rest = last.removeprefix(wanted).strip("_")
                panels.setdefault(wanted, {})[" ".join(part for part in (area, rest) if part) or name] = curve
    return {wanted: panels[wanted] for wanted in CONSTRAINT_CURVES if wanted in panels}


def threshold_levels(threshold: Any) -> list[float]:
    """The levels that a constraint's `threshold` names: a number, numbers by cost, or nothing."""
    levels = threshold.values() if isinstance(threshold, Mapping) else [threshold]
    return [float(level) for level in levels if level is not None]


def thresholds_of(run_folder: Path) -> list[float]:
    """What the costs of a run were to stay below, as its config.yaml says; nothing where there is none."""
    file = run_folder / "config.yaml"
    config = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return threshold_levels((config.get("constraint") or {}).get("threshold"))


def constraint_png(path: Path, curves: Mapping[str, Curve], thresholds: Sequence[float] = ()) -> bool:
    """Write lambda, cost and reward over training below each other as a PNG; False where there is no such curve.

    Args:
        curves: name -> [(step, value)], as `training/curves.py` reads them.
        thresholds: levels of the cost that the constraint demands, drawn as lines.
    """
    panels = constraint_curves(curves)
    if not panels:
        return False
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.9 * len(panels) + 0.5), layout="constrained")
    plots = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (wanted, series) in zip(plots, panels.items(), strict=True):
        for place, (label, curve) in enumerate(series.items()):
            points = np.asarray(list(curve), dtype=np.float64).reshape(-1, 2)
            points = points[np.isfinite(points).all(axis=1)]
            colour, dash = ON_WHITE[SERIES[place % len(SERIES)]], DASHES[place % len(DASHES)]
            axes.plot(points[:, 0], points[:, 1], dash, color=colour, linewidth=1.5, label=label)
        if wanted == "cost":
            for level in thresholds:
                axes.axhline(level, color=ON_WHITE[INK], linewidth=1.0, linestyle=":")
        axes.set_ylabel(wanted)
        axes.grid(axis="y", color=ON_WHITE[GRID], linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
    plots[-1].set_xlabel("rollout")
    save_png(figure, path)
    return True


# ------------------------------------------------------------------------------------------------ helpers
def _recolour(axes: Any, colours: Mapping[str, str]) -> None:
    """The panel's marker colours, which only a page knows, turned into those of this picture."""
    for side in ("left", "bottom"):
        axes.spines[side].set_color(colours[GRID])
    axes.tick_params(colors=colours[INK], labelcolor=colours[INK], color=colours[GRID])
    axes.grid(axis="both", color=colours[GRID], linewidth=0.6)
    axes.xaxis.label.set_color(colours[INK])
    axes.yaxis.label.set_color(colours[INK])
