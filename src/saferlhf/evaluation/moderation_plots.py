"""Plots of a moderator: ROC and precision-recall, reliability, probability by label, severity confusion, the F1 and the
support of each category, and which categories are taken for which.

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
_STRONGEST = 0.54  # opacity of a square: the ink on it keeps a contrast of 4.5 to 1, on light and on dark ground
_NONE_LABELLED, _NONE_DECIDED = "no category labelled", "no category decided"


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
        drawings += [_roc(labels.unsafe, verdicts), _precision_recall(labels.unsafe, verdicts)]
        drawings += [_by_label(labels.unsafe, verdicts.p_unsafe)]
    if known.any():
        raw = None if logits is None else 1.0 / (1.0 + np.exp(-np.clip(logits.unsafe, -500, 500)))
        drawings.append(_reliability(labels.unsafe, verdicts.p_unsafe, raw))
    if verdicts.severity is not None and (labels.severity >= 0).any():
        drawings.append(_confusion(labels.severity, verdicts.severity))
    if verdicts.category is not None and (labels.category >= 0).any():
        drawings.append(_categories(labels, verdicts.category))
        if len(labels.categories) > 1:
            drawings.append(_mixed_up(labels, verdicts.category))
    return drawings


def _roc(labels: NDArray[np.int64], verdicts: Verdicts) -> str:
    """The curve, and where on it the shipped threshold stands."""
    truth, said, scores = _ranked(labels, verdicts)
    hits, alarms = _counts(truth, scores)
    tpr, fpr = np.concatenate([[0.0], hits / truth.sum()]), np.concatenate([[0.0], alarms / (~truth).sum()])
    area = ranking(scores, truth.astype(np.int64))(np.ones((1, len(scores))))["auroc"][0]
    shown = _thinned(len(fpr))
    figure, axes = panel()
    axes.plot([0, 1], [0, 1], color=GRID, linewidth=1.0)
    axes.plot(fpr[shown], tpr[shown], color=SERIES[0], linewidth=1.8, label=f"AUROC {area:.3f}")
    at = (float(said[~truth].mean()), float(said[truth].mean()))
    axes.plot(*at, "o", color=SERIES[1], markersize=6, label=f"threshold: finds {at[1]:.0%}, flags {at[0]:.0%}")
    axes.set_xlabel("safe answers flagged")
    axes.set_ylabel("unsafe answers found")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower right")
    return to_svg(figure, "ROC of unsafe")


def _precision_recall(labels: NDArray[np.int64], verdicts: Verdicts) -> str:
    """The step function whose area is the average precision, the threshold's place, and the share that is unsafe."""
    truth, said, scores = _ranked(labels, verdicts)
    hits, alarms = _counts(truth, scores)
    recall, precision = hits / truth.sum(), hits / (hits + alarms)
    area = ranking(scores, truth.astype(np.int64))(np.ones((1, len(scores))))["auprc"][0]
    shown = _thinned(len(recall))
    x, y = np.concatenate([[0.0], recall[shown]]), np.concatenate([precision[:1], precision[shown]])
    figure, axes = panel()
    axes.axhline(float(truth.mean()), color=GRID, linewidth=1.0)
    axes.step(x, y, where="pre", color=SERIES[0], linewidth=1.8, label=f"average precision {area:.3f}")
    if said.any():
        at = (float(said[truth].mean()), float(truth[said].mean()))
        axes.plot(*at, "o", color=SERIES[1], markersize=6, label=f"threshold: finds {at[0]:.0%}, right {at[1]:.0%}")
    axes.set_ylim(0, 1.03)
    axes.set_xlabel("unsafe answers found (recall)")
    axes.set_ylabel("flagged ones that are unsafe")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9, loc="lower left")
    return to_svg(figure, "precision and recall of unsafe")


def _ranked(labels: NDArray[np.int64], verdicts: Verdicts) -> tuple[NDArray[np.bool_], NDArray[np.bool_], Floats]:
    """(unsafe or not, what was decided, what ranks them) of the labelled rows, as the metrics take it."""
    known = labels >= 0
    scores = verdicts.p_unsafe if verdicts.unsafe_logit is None else verdicts.unsafe_logit
    return labels[known] == 1, verdicts.unsafe[known], scores[known]


def _counts(truth: NDArray[np.bool_], scores: Floats) -> tuple[Floats, Floats]:
    """(unsafe rows found, safe rows flagged) by every threshold that tells rows apart, the highest first."""
    order = np.argsort(-scores, kind="stable")
    ends = np.flatnonzero(np.concatenate((np.diff(scores[order]) != 0, [True])))
    return np.cumsum(truth[order])[ends].astype(np.float64), np.cumsum(~truth[order])[ends].astype(np.float64)


def _thinned(points: int) -> NDArray[np.int64]:
    """Numbers of at most `_MOST_POINTS` of so many points, first and last among them."""
    return np.unique(np.linspace(0, points - 1, _MOST_POINTS).round().astype(np.int64))


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
            square = {
                "width": 0.96,
                "bottom": true - 0.48,
                "color": SERIES[0],
                "alpha": _STRONGEST * share,
                "linewidth": 0,
            }
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


def _mixed_up(labels: ModerationLabels, decided: NDArray[np.bool_]) -> str:
    """Which categories are called where which are labelled, the most frequent first.

    A row is a labelled category, a column a decided one. On the diagonal stands the share that was found (recall).
    Elsewhere, of the answers that have the row's category and not the column's, the share on which the column's was
    called all the same: categories that go together in truth are no mistake and do not count as one.
    """
    known: NDArray[np.bool_] = np.all(labels.category >= 0, axis=1)
    shares, counts = mixed_up_shares(labels.category[known] == 1, decided[known])
    order = [*np.argsort(-counts[:-1], kind="stable").tolist(), len(counts) - 1]
    shares = shares[np.ix_(order, order)]
    size = len(order)
    figure, axes = panel()
    figure.set_size_inches(9.0, 2.4 + 0.27 * size)
    axes.grid(False)
    for row, column in np.argwhere(np.round(100 * np.nan_to_num(shares)) >= 1):
        share = shares[row, column]
        right = row == column
        style = {"color": SERIES[0] if right else SERIES[1], "alpha": _STRONGEST * share, "linewidth": 0}
        axes.bar(column, 0.94, width=0.94, bottom=row - 0.47, **style)
        axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=INK)
    names = [_short(labels.categories[index], 28) for index in order[:-1]]
    rows = [f"{name} ({counts[index]:,.0f})" for name, index in zip([*names, _NONE_LABELLED], order, strict=True)]
    axes.set_yticks(range(size), rows)
    axes.set_xticks(range(size), [*names, _NONE_DECIDED], rotation=90)
    axes.tick_params(labelsize=8, length=0)
    axes.set_xlim(-0.5, size - 0.5)
    axes.set_ylim(size - 0.5, -0.5)
    axes.set_xlabel("category decided, % of the answers of the row that are not labelled with it; blue: % found")
    axes.set_ylabel("category labelled (answers)")
    return to_svg(figure, "harm categories taken for others")


def mixed_up_shares(has: NDArray[np.bool_], said: NDArray[np.bool_]) -> tuple[Floats, Floats]:
    """Shares behind the map of mix-ups; "none of the categories" is the last row and the last column.

    Args:
        has: (N, C) True where the category is labelled.
        said: (N, C) True where it was decided.

    Returns:
        (C + 1, C + 1) share of the answers with the row's category, and without the column's where these differ, on
        which the column's was decided; NaN where there is no such answer. (C + 1,) answers with the row's category.
    """
    has = np.column_stack([has, ~has.any(axis=1)]).astype(np.float64)
    said = np.column_stack([said, ~said.any(axis=1)]).astype(np.float64)
    there = has.T @ (1.0 - has)  # (C + 1, C + 1)
    called = has.T @ (said * (1.0 - has))
    counts = has.sum(axis=0)
    np.fill_diagonal(there, counts)
    np.fill_diagonal(called, (has * said).sum(axis=0))
    return np.divide(called, there, out=np.full_like(called, np.nan), where=there > 0), counts


def _short(name: str, longest: int = 34) -> str:
    """The name as a label: cut, on one line, and a `$` in it is no formula."""
    name = " ".join(name.split())
    name = name if len(name) <= longest else name[: longest - 1] + "…"
    return name.replace("$", r"\$")
