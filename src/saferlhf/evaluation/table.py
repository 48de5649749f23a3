"""Metrics as a table for the screen: one line per metric, with its interval, its count and the baselines beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table

_HEADLINES = (
    "pair_accuracy",
    "sign_accuracy",
    "truth_pair_accuracy",
    "truth_sign_accuracy",
    "annotator_truth_agreement",
    "truth_correlation_damaged",
    "perplexity",
    "nll",
    "truth_helpfulness",
    "best_safe_helpfulness",
    "helpful_win_rate",
    "harmless_win_rate_harmful",
    "harmless_win_rate",
    "safe_rate",
    "benign_refusal_rate",
)
"""What a reader looks for first, in this order; the rest follows as it was written."""

_HEADLINES_OF = {
    "unsafe": ("macro_f1", "accuracy", "f1", "fpr", "auroc", "auprc", "ece"),
    "severity": ("accuracy", "quadratic_kappa", "macro_f1", "undercalled_3"),
    "category": ("exact_match", "micro_f1", "macro_f1"),
}
"""The same in the areas of a moderator, whose names would mean nothing without their area."""

_BASELINES = {"constant": "const.", "length": "length", "longer": "longer", "tfidf": "TF-IDF", "policy": "baseline"}
"""Baseline -> its column."""

_SUFFIXES = ("_low", "_high", "_n")


class MetricLine(NamedTuple):
    """One metric with what belongs to it."""

    name: str
    value: float
    low: float | None
    high: float | None
    n: int | None
    baselines: Mapping[str, float] = {}  # baseline -> its value of this metric


def metric_lines(metrics: Mapping[str, float]) -> list[MetricLine]:
    """Flat metrics as lines, headlines of an area first.

    `_low`, `_high` and `_n` are folded into the metric they belong to, and `<split>/baseline_<name>/<area>/<metric>`
    into `<split>/<area>/<metric>` where that is there.
    """
    beside: dict[str, dict[str, float]] = {}
    lines = []
    for name, value in metrics.items():
        if any(name.endswith(suffix) and name.removesuffix(suffix) in metrics for suffix in _SUFFIXES):
            continue
        baseline = re.fullmatch(r"([^/]+)/baseline_([^/]+)/(.+)", name)
        if baseline and (own := f"{baseline[1]}/{baseline[3]}") in metrics:
            beside.setdefault(own, {})[baseline[2]] = value
            continue
        n = metrics.get(f"{name}_n")
        lines.append(
            MetricLine(
                name, value, metrics.get(f"{name}_low"), metrics.get(f"{name}_high"), None if n is None else int(n)
            )
        )
    lines = [line._replace(baselines=beside.get(line.name, {})) for line in lines]
    areas = list(dict.fromkeys(_area(line.name) for line in lines))
    return sorted(lines, key=lambda line: (areas.index(_area(line.name)), _rank(line.name)))


def baseline_columns(lines: Sequence[MetricLine]) -> dict[str, str]:
    """Baseline -> heading of its column, for those that these lines have."""
    there = {name for line in lines for name in line.baselines}
    return {name: _BASELINES.get(name, name) for name in sorted(there, key=lambda n: (list(_BASELINES) + [n]).index(n))}


def headline_lines(metrics: Mapping[str, float]) -> list[MetricLine]:
    """The few metrics a verdict rests on, test split first choice."""
    lines = [line for line in metric_lines(metrics) if _is_headline(line.name)]
    test = [line for line in lines if line.name.startswith("test/")]
    return test or lines


def metrics_table(
    metrics: Mapping[str, float], title: str = "", confidence: float = 0.95, headlines_only: bool = False
) -> Table:
    """A rich table: metric, value, interval, n, and a column for each baseline there is; areas apart.

    Args:
        metrics: flat, as in `metrics.json`.
        title: above the table.
        confidence: what the intervals in `metrics` were taken at, for the heading.
        headlines_only: the few metrics a verdict rests on, for the last lines of a run.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    lines = headline_lines(metrics) if headlines_only else metric_lines(metrics)
    baselines = baseline_columns(lines)
    # with baselines beside them the headlines of a moderator just fit a terminal of 80 columns
    narrow: dict[str, Any] = {"box": box.SIMPLE_HEAD, "padding": 0} if baselines else {}
    table = Table(title=title or None, title_justify="left", **narrow)
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column(f"{confidence:.0%} interval", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    for heading in baselines.values():
        table.add_column(heading, justify="right", no_wrap=True, style="dim")
    for place, line in enumerate(lines, start=1):
        last_of_area = place < len(lines) and _area(lines[place].name) != _area(line.name)
        headline = _is_headline(line.name)
        table.add_row(
            Text(line.name, style="bold" if headline else ""),
            format_value(line),
            format_interval(line).replace(" .. ", ".." if baselines else " .. "),
            "" if line.n is None else f"{line.n:,}",
            *(format_baseline(line, name) for name in baselines),
            end_section=last_of_area,
        )
    return table


def format_number(value: float) -> str:
    """Whole numbers plain, others with four decimals or four significant digits."""
    if isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.4f}" if 0.001 <= abs(value) < 1000 else f"{value:.4g}"


def format_value(line: MetricLine) -> str:
    """The metric's value; an estimate keeps its decimals, so that an accuracy of 1 does not look like a count."""
    return format_number(line.value) if line.low is None else f"{line.value:.4f}"


def format_interval(line: MetricLine) -> str:
    """`low .. high`, or nothing."""
    return "" if line.low is None or line.high is None else f"{line.low:.4f} .. {line.high:.4f}"


def format_baseline(line: MetricLine, name: str) -> str:
    """A baseline's value of this metric, or nothing."""
    return f"{line.baselines[name]:.3f}" if name in line.baselines else ""


def _area(name: str) -> str:
    parts = name.split("/")
    return parts[0] if len(parts) == 2 else "/".join(parts[:2])  # `policy/safe_rate` has no split before it


def _headlines(name: str) -> tuple[str, ...]:
    parts = name.split("/")
    return _HEADLINES_OF.get(parts[1], _HEADLINES) if len(parts) == 3 else _HEADLINES


def _is_headline(name: str) -> bool:
    last = name.rpartition("/")[2]
    return last in _headlines(name) and not name.partition("/")[2].startswith(("baseline_", "over_", "by_"))


def _rank(name: str) -> int:
    last, order = name.rpartition("/")[2], _headlines(name)
    return order.index(last) if last in order else len(order)
