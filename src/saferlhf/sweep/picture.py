"""The objective over one swept number, or over two as colours; nothing for other sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.evaluation.drawing import GRID, INK, ON_WHITE, SERIES, save_png
from saferlhf.sweep.child import Child
from saferlhf.sweep.space import Dimension, Space, as_number

LOG_SPAN = 9.99
"""Positive values that span more than this are drawn on a log scale."""
MOST_TICKS = 8
"""Different values that are written below the axis one by one."""


def draw_sweep(path: Path, space: Space, children: Sequence[Child], objective: str) -> bool:
    """Draw what can be drawn: one or two swept keys with numbers, and no others.

    Args:
        path: of the PNG.
        space: what was swept.
        children: the runs; those without the objective are left out.
        objective: key of their metrics.

    Returns:
        Whether there was anything to draw.
    """
    shown = [child for child in children if child.objective(objective) is not None]
    columns = [_numbers(shown, dimension) for dimension in space.dimensions]
    if len(shown) < 2 or not 1 <= len(columns) <= 2 or any(column is None for column in columns):
        return False
    values = np.array([child.objective(objective) for child in shown], np.float64)
    xs = [column for column in columns if column is not None]
    figure, axes = _panel()
    if len(xs) == 1:
        _over_one(axes, xs[0], values, _intervals(shown, objective))
        axes.set_ylabel(objective, fontsize=9)
    else:
        _over_two(figure, axes, xs, values, objective)
        axes.set_ylabel(space.dimensions[1].name, fontsize=9)
    axes.set_xlabel(space.dimensions[0].name, fontsize=9)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_color(ON_WHITE[INK])
    save_png(figure, path)
    return True


def log_scale(dimension_log: bool, values: NDArray[np.float64]) -> bool:
    """Whether numbers are drawn on a log scale: asked for by the sweep, or spread over decades."""
    positive = bool((values > 0).all())
    return positive and (dimension_log or float(values.max() / values.min()) > LOG_SPAN)


def _numbers(children: Sequence[Child], dimension: Dimension) -> tuple[NDArray[np.float64], bool] | None:
    """The key's values and whether they stand on a log scale; None where one is no number."""
    found = [as_number(child.values[dimension.name]) for child in children]
    if not found or any(value is None for value in found):
        return None
    values = np.array(found, np.float64)
    return values, log_scale(dimension.interval is not None and dimension.interval.log, values)


def _intervals(children: Sequence[Child], objective: str) -> NDArray[np.float64] | None:
    """(2, runs) ends of the objective's intervals; None unless every run has one."""
    ends = [[child.metrics().get(f"{objective}_{end}") for child in children] for end in ("low", "high")]
    if any(end is None for row in ends for end in row):
        return None
    return np.array(ends, np.float64)


def _over_one(
    axes: Any,
    column: tuple[NDArray[np.float64], bool],
    values: NDArray[np.float64],
    intervals: NDArray[np.float64] | None,
) -> None:
    x, log = column
    order = np.argsort(x, kind="stable")
    colour = ON_WHITE[SERIES[0]]
    axes.plot(x[order], values[order], "-", color=colour, linewidth=0.8, alpha=0.5)
    if intervals is None:
        axes.plot(x, values, "o", color=colour, markersize=4)
    else:
        reach = np.abs(intervals - values)  # (2, runs): down and up
        axes.errorbar(x, values, yerr=reach, fmt="o", color=colour, markersize=4, elinewidth=1.0, capsize=2)
    _scale(axes.xaxis, x, log)


def _over_two(
    figure: Any,
    axes: Any,
    columns: Sequence[tuple[NDArray[np.float64], bool]],
    values: NDArray[np.float64],
    objective: str,
) -> None:
    (x, x_log), (y, y_log) = columns
    points = axes.scatter(x, y, c=values, cmap="viridis", s=90, edgecolors=ON_WHITE[GRID], linewidths=0.6)
    bar = figure.colorbar(points, ax=axes)
    bar.set_label(objective, fontsize=9, color=ON_WHITE[INK])
    bar.ax.tick_params(labelsize=8, colors=ON_WHITE[INK])
    bar.outline.set_visible(False)
    _scale(axes.xaxis, x, x_log)
    _scale(axes.yaxis, y, y_log)
    axes.margins(0.12)


def _scale(axis: Any, values: NDArray[np.float64], log: bool) -> None:
    """Scale of an axis, and the values themselves as ticks where they are few."""
    if log:
        axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    different = np.unique(values)
    if len(different) <= MOST_TICKS:
        axis.set_ticks(different, [f"{value:g}" for value in different])
        axis.set_ticks([], minor=True)


def _panel() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(ON_WHITE[GRID])
    axes.tick_params(colors=ON_WHITE[INK], labelcolor=ON_WHITE[INK], color=ON_WHITE[GRID], labelsize=9)
    axes.grid(color=ON_WHITE[GRID], linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes
