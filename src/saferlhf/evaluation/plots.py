"""Plots of a report as inline SVG: training curves and score histograms.

One drawing is readable on light and on dark ground (`drawing.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from saferlhf.data.rows import PreferencePair
from saferlhf.evaluation.drawing import DASHES, INK, SERIES, legend, panel, to_svg
from saferlhf.evaluation.preference import Kind, preferred_labels, unsafe_labels

Curve = Sequence[tuple[int, float]]
"""(step, value) in order of steps."""

_MOST_POINTS = 600
_SMOOTH_FROM = 60  # curves with more points also get a running mean


@dataclass(frozen=True)
class Histogram:
    """Distributions of one quantity, drawn over each other.

    Attributes:
        title: of the panel.
        groups: label -> values; at most four.
        zero_line: mark 0, the border between safe and unsafe of a cost.
        quantity: what is on the x axis.
    """

    title: str
    groups: Mapping[str, ArrayLike] = field(default_factory=dict)
    zero_line: bool = False
    quantity: str = "score"


def score_histograms(
    rows: Sequence[PreferencePair], scores: ArrayLike, *, kind: Kind, preference: str = "better"
) -> list[Histogram]:
    """The distributions that tell most about scores of pairs.

    Args:
        rows: n pairs.
        scores: (n, 2) rewards or costs, column = response index.
        kind: "reward" or "cost"; a cost's panel of safe and unsafe responses has the zero line.
        preference: label of a reward model.
    """
    values = np.asarray(scores, dtype=np.float64)  # (n, 2)
    preferred = preferred_labels(rows, "safer" if kind == "cost" else preference)
    unsafe = unsafe_labels(rows)
    chosen = preferred >= 0
    index = np.arange(len(rows))
    winner = values[index, np.clip(preferred, 0, 1)][chosen]
    loser = values[index, 1 - np.clip(preferred, 0, 1)][chosen]
    names = ("safer response", "other response") if kind == "cost" else ("preferred response", "other response")
    panels = [
        Histogram(f"{kind} of the two responses", {names[0]: winner, names[1]: loser}, kind == "cost", kind),
        Histogram("difference within a pair", {f"{names[0]} minus other": winner - loser}, True, f"{kind} difference"),
    ]
    if (unsafe >= 0).any():
        groups = {"safe": values[unsafe == 0], "unsafe": values[unsafe == 1]}
        panels.insert(1, Histogram(f"{kind} by safety label", groups, kind == "cost", kind))
    return [panel for panel in panels if any(np.size(group) for group in panel.groups.values())]


# ------------------------------------------------------------------------------------------------ drawing
def histogram_svg(histogram: Histogram) -> str:
    """One panel: outlined, half-filled histograms with common bins, as shares of each group."""
    groups = {label: _finite(values) for label, values in histogram.groups.items()}
    groups = {label: values for label, values in groups.items() if values.size}
    figure, axes = panel()
    if groups:
        bins = _bins(np.concatenate(list(groups.values())), histogram.zero_line)
        for place, (label, values) in enumerate(groups.items()):
            weights = np.full(values.size, 100.0 / values.size)
            style = {"bins": bins, "weights": weights, "color": SERIES[place % len(SERIES)]}
            clipped = np.clip(values, bins[0], bins[-1])
            axes.hist(clipped, histtype="stepfilled", alpha=0.28, **style)
            line = DASHES[place % len(DASHES)]
            axes.hist(
                clipped, histtype="step", linewidth=1.4, linestyle=line, label=f"{label} ({values.size:,})", **style
            )
    if histogram.zero_line:
        axes.axvline(0.0, color=INK, linewidth=1.2)
    axes.set_xlabel(histogram.quantity)
    axes.set_ylabel("% of group")
    axes.margins(y=0.22)  # room for the legend
    legend(axes)
    return to_svg(figure, histogram.title)


def curves_svg(title: str, series: Mapping[str, Curve], step: str = "optimizer step") -> str:
    """One panel with up to four curves over steps; long noisy ones are faint with a running mean on top.

    Args:
        title: of the panel.
        series: label -> [(step, value)].
        step: what a step is, below the axis.
    """
    figure, axes = panel()
    for place, (label, curve) in enumerate(series.items()):
        points = np.asarray(list(curve), dtype=np.float64).reshape(-1, 2)
        points = points[np.isfinite(points).all(axis=1)]
        colour, dash = SERIES[place % len(SERIES)], DASHES[place % len(DASHES)]
        style: dict[str, Any] = {"color": colour, "label": label}
        if len(points) > _SMOOTH_FROM and title != "lr":
            shown = _thin(points)
            axes.plot(shown[:, 0], shown[:, 1], color=colour, linewidth=0.8, alpha=0.35)
            shown = _thin(_running_mean(points))
        else:
            shown = _thin(points)
            if len(points) <= 30:
                style |= {"marker": "o", "markersize": 3.5}
        axes.plot(shown[:, 0], shown[:, 1], linewidth=1.6, linestyle=dash, **style)
    axes.set_xlabel(step)
    legend(axes, always=True)
    return to_svg(figure, title)


def curve_panels(curves: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """Curves that share their last name (`train/loss`, `val/loss`) share a panel; losses first, the rate last."""
    panels: dict[str, dict[str, Curve]] = {}
    for name, curve in curves.items():
        if len(curve):
            area, _, quantity = name.rpartition("/")
            panels.setdefault(quantity, {})[area or name] = curve
    rank = {name: 0 if "loss" in name else 2 if name in ("lr", "learning_rate") else 1 for name in panels}
    return dict(sorted(panels.items(), key=lambda panel: rank[panel[0]]))


# ------------------------------------------------------------------------------------------------ helpers
def _bins(values: NDArray[np.float64], zero_is_edge: bool) -> NDArray[np.float64]:
    """About 40 common bins. Far outliers must not press all others into one bin: they go into the outermost."""
    low, high = (float(bound) for bound in np.quantile(values, [0.001, 0.999]))
    if zero_is_edge:
        low, high = min(low, 0.0), max(high, 0.0)
    if high <= low:
        low, high = low - 0.5, high + 0.5
    if not zero_is_edge:
        return np.linspace(low, high, 41)
    # no bin may lie across the border: its bar would count safe and unsafe together
    width = (high - low) / 40
    return np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width


def _thin(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """At most `_MOST_POINTS` points, first and last among them."""
    if len(points) <= _MOST_POINTS:
        return points
    return points[np.unique(np.linspace(0, len(points) - 1, _MOST_POINTS).round().astype(int))]


def _running_mean(points: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred mean over about a thirtieth of the curve; shorter windows at the ends."""
    half = max(1, len(points) // 60)
    sums = np.concatenate(([0.0], np.cumsum(points[:, 1])))
    index = np.arange(len(points))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(points))
    return np.stack([points[:, 0], (sums[last] - sums[first]) / (last - first)], axis=1)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]
