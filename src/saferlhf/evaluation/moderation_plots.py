"""Plots of a moderator: ROC, reliability, probability by label, severity confusion, and each category's F1 and support.

Each is one inline SVG for the report page, readable on light and on dark ground (`drawing.py`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.evaluation.drawing import DASHES, GRID, INK, SERIES, legend, panel, to_svg
from saferlhf.evaluation.plots import Histogram, histogram_svg
from saferlhf.ops.moderation import SEVERITIES, ModerationLabels, ModerationLogits, Verdicts
from saferlhf.ops.moderation_metrics import f1, ranking, reliability

Floats = NDArray[np.float64]

LEVELS = ("safe", "minor", "moderate", "severe")
_MOST_POINTS = 400


def moderation_drawings(
    labels: ModerationLabels, verdicts: Verdicts, logits: ModerationLogits | None = None
) -> list[str]:
    """The drawings that these rows' labels and the verdicts' heads allow, as SVG elements.

    Args:
        labels: of N rows.
        verdicts: of N rows.
        logits: of N rows: then the reliability before calibration is drawn too.
    """
    drawings = []
    known = labels.unsafe >= 0
    both = known.any() and 0 < labels.unsafe[known].mean() < 1
    if both:
        drawings += [_roc(labels.unsafe, verdicts), _by_label(labels.unsafe, verdicts.p_unsafe)]
    if known.any():
        raw = None if logits is None else 1.0 / (1.0 + np.exp(-np.clip(logits.unsafe, -500, 500)))
        drawings.append(_reliability(labels.unsafe, verdicts.p_unsafe, raw))
    if verdicts.severity is not None and (labels.severity >= 0).any():
        drawings.append(_confusion(labels.severity, verdicts.severity))
    if verdicts.category is not None and (labels.category >= 0).any():
        drawings.append(_categories(labels, verdicts.category))
    return drawings


def _roc(labels: NDArray[np.int64], verdicts: Verdicts) -> str:
    """The curve, and where on it the shipped threshold stands."""
    known = labels >= 0
    truth, scores, said = labels[known] == 1, verdicts.p_unsafe[known], verdicts.unsafe[known]
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.concatenate((np.diff(scores[order]) != 0, [True])))
    hits, alarms = np.cumsum(truth[order])[ends], np.cumsum(~truth[order])[ends]
    tpr, fpr = np.concatenate([[0.0], hits / truth.sum()]), np.concatenate([[0.0], alarms / (~truth).sum()])
    area = ranking(scores, labels[known])(np.ones((1, len(scores))))["auroc"][0]
    shown = np.unique(np.linspace(0, len(fpr) - 1, _MOST_POINTS).round().astype(int))
    figure, axes = panel()
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.0)
    axes.plot(fpr[shown], tpr[shown], color=SERIES[0], linewidth=1.8, label=f"AUROC {area:.3f}")
    at = (float(said[~truth].mean()), float(said[truth].mean()))
    axes.plot(*at, "o", color=SERIES[1], markersize=6, label=f"threshold: finds {at[1]:.0%}, flags {at[0]:.0%}")
    axes.set_xlabel("safe answers flagged")
    axes.set_ylabel("unsafe answers found")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower right")
    return to_svg(figure, "ROC of unsafe")


def _by_label(labels: NDArray[np.int64], p_unsafe: Floats) -> str:
    groups = {"safe": p_unsafe[labels == 0], "unsafe": p_unsafe[labels == 1]}
    return histogram_svg(Histogram("probability of unsafe by label", groups, False, "p(unsafe)"))


def _reliability(labels: NDArray[np.int64], p_unsafe: Floats, raw: Floats | None) -> str:
    figure, axes = panel()
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.0)
    shown = {"calibrated" if raw is not None else "as given": p_unsafe}
    shown |= {} if raw is None or np.allclose(raw, p_unsafe) else {"before calibration": raw}
    for place, (name, values) in enumerate(shown.items()):
        curve = reliability(values, labels, bins=10)
        style: dict[str, Any] = {"color": SERIES[place], "linestyle": DASHES[place], "label": name}
        axes.plot(curve[:, 0], curve[:, 1], marker="o", markersize=4, linewidth=1.6, **style)
    axes.set_xlabel("mean p(unsafe) of a tenth of the answers")
    axes.set_ylabel("share unsafe")
    legend(axes)
    return to_svg(figure, "reliability of unsafe")


def _confusion(labels: NDArray[np.int64], said: NDArray[np.int64]) -> str:
    """Rows by true level, shares of the row and counts; the darker, the larger the share."""
    known = labels >= 0
    table = np.bincount(labels[known] * SEVERITIES + said[known], minlength=SEVERITIES**2)
    counts = table.reshape(SEVERITIES, SEVERITIES).astype(np.float64)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure, axes = panel()
    axes.grid(False)
    for true in range(SEVERITIES):
        for level in range(SEVERITIES):
            share = shares[true, level]
            square = {"width": 0.96, "bottom": true - 0.48, "color": SERIES[0], "alpha": 0.75 * share, "linewidth": 0}
            axes.bar(level, 0.96, **square)
            text = f"{share:.0%}\n{counts[true, level]:,.0f}"
            axes.text(level, true, text, ha="center", va="center", fontsize=9, color=INK, linespacing=1.25)
    names = [f"{level} {name}" for level, name in enumerate(LEVELS)]
    axes.set_xticks(range(SEVERITIES), names)
    axes.set_yticks(range(SEVERITIES), names)
    axes.set_xlim(-0.5, SEVERITIES - 0.5)
    axes.set_ylim(SEVERITIES - 0.5, -0.5)
    axes.set_xlabel("severity decided")
    axes.set_ylabel("severity labelled")
    return to_svg(figure, "severity: labelled against decided")


def _categories(labels: ModerationLabels, decided: NDArray[np.bool_]) -> str:
    """F1 of each category, the most frequent on top, with the number of answers that have it."""
    known: NDArray[np.bool_] = np.all(labels.category >= 0, axis=1)
    has, said = labels.category[known] == 1, decided[known]
    hits, alarms, misses = (np.sum(x, axis=0) for x in (has & said, ~has & said, has & ~said))
    each = f1(hits.astype(np.float64), alarms.astype(np.float64), misses.astype(np.float64))
    support = has.sum(axis=0)
    order = np.argsort(support, kind="stable")  # the last is drawn on top
    figure, axes = panel(height=max(3.1, 0.8 + 0.24 * len(order)))
    axes.grid(False)
    axes.grid(axis="x", color=GRID, linewidth=0.6)
    places = np.arange(len(order))
    axes.barh(places, np.nan_to_num(each[order]), height=0.62, color=SERIES[0], alpha=0.75, linewidth=0)
    for place, index in enumerate(order.tolist()):
        value = "-" if np.isnan(each[index]) else f"{each[index]:.2f}"
        text = f"{value}  ({support[index]:,})"
        axes.text(np.nan_to_num(each[index]) + 0.015, place, text, va="center", fontsize=8, color=INK)
    axes.set_yticks(places, [_short(labels.categories[index]) for index in order.tolist()])
    axes.tick_params(axis="y", labelsize=8, length=0)
    axes.set_xlim(0, 1.18)
    axes.set_xticks(np.linspace(0, 1, 6))
    axes.set_xlabel("F1 (answers that have the category)")
    return to_svg(figure, "harm categories")


def _short(name: str) -> str:
    return name if len(name) <= 34 else name[:33] + "…"
