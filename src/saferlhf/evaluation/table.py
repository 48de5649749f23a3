"""Metrics as a table for the screen: one line per metric, its interval and count beside it."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import TYPE_CHECKING, NamedTuple

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
    "safe_rate",
    "benign_refusal_rate",
)
"""What a reader looks for first, in this order; the rest follows as it was written."""

_SUFFIXES = ("_low", "_high", "_n")


class MetricLine(NamedTuple):
    """One metric with what belongs to it."""

    name: str
    value: float
    low: float | None
    high: float | None
    n: int | None


def metric_lines(metrics: Mapping[str, float]) -> list[MetricLine]:
    """Flat metrics with `_low`, `_high` and `_n` folded into the metric they belong to, headlines of an area first."""
    lines = []
    for name, value in metrics.items():
        if any(name.endswith(suffix) and name.removesuffix(suffix) in metrics for suffix in _SUFFIXES):
            continue
        n = metrics.get(f"{name}_n")
        lines.append(
            MetricLine(
                name, value, metrics.get(f"{name}_low"), metrics.get(f"{name}_high"), None if n is None else int(n)
            )
        )
    areas = list(dict.fromkeys(_area(line.name) for line in lines))
    return sorted(lines, key=lambda line: (areas.index(_area(line.name)), _rank(line.name)))


def headline_lines(metrics: Mapping[str, float]) -> list[MetricLine]:
    """The few metrics a verdict rests on, test split first choice."""
    lines = [line for line in metric_lines(metrics) if line.name.rpartition("/")[2] in _HEADLINES]
    test = [line for line in lines if line.name.startswith("test/")]
    return test or lines


def metrics_table(
    metrics: Mapping[str, float], title: str = "", confidence: float = 0.95, headlines_only: bool = False
) -> Table:
    """A rich table: metric, value, interval, n; areas apart.

    Args:
        metrics: flat, as in `metrics.json`.
        title: above the table.
        confidence: what the intervals in `metrics` were taken at, for the heading.
        headlines_only: the few metrics a verdict rests on, for the last lines of a run.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    table.add_column("metric", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column(f"{confidence:.0%} interval", justify="right", no_wrap=True)
    table.add_column("n", justify="right", no_wrap=True)
    lines = headline_lines(metrics) if headlines_only else metric_lines(metrics)
    for place, line in enumerate(lines, start=1):
        last_of_area = place < len(lines) and _area(lines[place].name) != _area(line.name)
        headline = line.name.rpartition("/")[2] in _HEADLINES
        table.add_row(
            Text(line.name, style="bold" if headline else ""),
            format_value(line),
            format_interval(line),
            "" if line.n is None else f"{line.n:,}",
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


def _area(name: str) -> str:
    return name.partition("/")[0] + "/" + name.partition("/")[2].partition("/")[0]


def _rank(name: str) -> int:
    last = name.rpartition("/")[2]
    return _HEADLINES.index(last) if last in _HEADLINES else len(_HEADLINES)
