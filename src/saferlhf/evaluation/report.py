"""`report.html`: one self-contained page about a run, readable without network, on light and on dark ground.

Top to bottom: the verdict (headline numbers with intervals), training curves, score histograms, samples behind a click,
all metrics, the data, lineage and provenance, how to reproduce it, the whole configuration. No script, no link to
elsewhere; all text is escaped, for what a model wrote is hostile until proven otherwise (`report_style.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from saferlhf.evaluation.data_section import DATA_STYLE, data_section
from saferlhf.evaluation.plots import Curve, Histogram, curve_panels, curves_svg, histogram_svg
from saferlhf.evaluation.provenance import PROVENANCE_STYLE, Provenance, provenance_section, without_user
from saferlhf.evaluation.report_samples import SAMPLES_STYLE
from saferlhf.evaluation.report_style import PAGE, POLICY, STYLE, visible
from saferlhf.evaluation.table import (
    MetricLine,
    baseline_columns,
    format_baseline,
    format_interval,
    format_value,
    headline_lines,
    metric_lines,
)

_PANEL = 420.0  # points; `drawing.panel` draws a little less
_CARDS = 16  # one model on one set of rows has 14
_LONG = 120  # lines of a table that stands open; a moderator on one set of rows has about 100


def write_report(
    path: str | Path,
    *,
    title: str,
    metrics: Mapping[str, float],
    config: Mapping[str, Any] | str,
    subtitle: str = "",
    data_report: Mapping[str, Any] | None = None,
    curves: Mapping[str, Curve] | None = None,
    step: str = "optimizer step",
    histograms: Sequence[Histogram | str | tuple[str, Histogram | str]] = (),
    lineage: Mapping[str, Any] | None = None,
    commands: Sequence[str] = (),
    confidence: float = 0.95,
    sections: Sequence[str] = (),
    figures: Mapping[str, Sequence[str]] | None = None,
    samples: Sequence[str] = (),
    provenance: Provenance | None = None,
) -> Path:
    """Write the page and return its path; an older page is replaced in one step.

    Args:
        path: the file, usually `report.html` of the run folder.
        title: first heading, such as `reward: tiny on toyworld`.
        metrics: flat, as in `metrics.json`.
        config: the resolved configuration, nested or as YAML text.
        subtitle: one line under the title.
        data_report: as in `data_report.json`, nested.
        curves: name -> [(step, value)]; names that end alike share a panel.
        step: what a step of the curves is.
        histograms: `plots.score_histograms(...)` or any others; a text is a finished drawing, as
            `moderation_plots.moderation_drawings(...)` makes them; with a name before it, it stands under that name,
            behind a click.
        lineage: where the run comes from: run identity, parent models, commit, seeds, versions.
        commands: what to type to get this run again, one command each.
        confidence: what the intervals in `metrics` were taken at.
        sections: finished HTML that stands below the headlines, all text in it escaped.
        figures: heading -> finished drawings, a section each.
        samples: sections of `report_samples.samples_section(...)`.
        provenance: of an evaluation: data, judges, thresholds, code.
    """
    plain = [h for h in histograms if not isinstance(h, tuple)]
    parts = [
        _verdict(metrics, confidence),
        *sections,
        _figures("Training", [curves_svg(name, series, step) for name, series in curve_panels(curves or {}).items()]),
        *(_figures(heading, drawings) for heading, drawings in (figures or {}).items()),
        _figures("Scores", [_drawn(h) for h in plain]),
        _named_figures([h for h in histograms if isinstance(h, tuple)]),
        *samples,
        _metric_section(metrics, confidence),
        data_section(data_report) if data_report and "findings" in data_report else _pairs_section("Data", data_report),
        _pairs_section("Lineage", lineage),
        "" if provenance is None else provenance_section(provenance),
        _commands_section(commands),
        _config_section(config),
    ]
    page = PAGE.format(
        policy=POLICY,
        title=escape(title),
        subtitle=f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else "",
        style=STYLE + DATA_STYLE + SAMPLES_STYLE + PROVENANCE_STYLE,
        body="\n".join(part for part in parts if part),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    draft.write_text(visible(page), encoding="utf-8")
    draft.replace(target)
    return target


# ------------------------------------------------------------------------------------------------ sections
def _verdict(metrics: Mapping[str, float], confidence: float) -> str:
    cards = "".join(_card(line) for line in _few(headline_lines(metrics)))
    if not cards:
        return ""
    note = f"Intervals: {confidence:.0%} percentile bootstrap over prompts."
    return f'<section><h2>Verdict</h2><div class="cards">{cards}</div><p class="note">{note}</p></section>'


def _few(lines: Sequence[MetricLine]) -> Sequence[MetricLine]:
    """All headlines; of many the first of each area; of too many none, for then they are a table's, not a glance's."""
    if len(lines) > _CARDS:
        lines = list({line.name.rpartition("/")[0]: line for line in reversed(lines)}.values())[::-1]
    return lines if len(lines) <= _CARDS else []


def _card(line: MetricLine) -> str:
    interval = format_interval(line)
    count = f"n = {line.n:,}" if line.n is not None else ""
    detail = " · ".join(part for part in (interval, count) if part)
    baselines = baseline_columns([line]).items()
    beside = " · ".join(f"{name}\u00a0{format_baseline(line, key)}" for key, name in baselines)
    return (
        f'<div class="card"><div class="name">{escape(line.name)}</div>'
        f'<div class="value">{format_value(line)}</div>{_interval_bar(line)}'
        f'<div class="detail">{escape(detail)}</div>'
        + (f'<div class="detail">{escape(beside)}</div>' if beside else "")
        + "</div>"
    )


def _interval_bar(line: MetricLine) -> str:
    """A strip from 0 to 1 with the interval as a band, the value as a tick and chance (one half) as a fine line."""
    if line.low is None or line.high is None or not (0 <= line.low <= line.high <= 1):
        return ""
    left, width = 100 * line.low, max(100 * (line.high - line.low), 0.8)
    return (
        '<div class="strip" aria-hidden="true"><i class="chance"></i>'
        f'<i class="band" style="left:{left:.2f}%;width:{width:.2f}%"></i>'
        f'<i class="tick" style="left:{100 * line.value:.2f}%"></i></div>'
    )


def _figures(heading: str, drawings: Sequence[str]) -> str:
    if not drawings:
        return ""
    return f"<section><h2>{escape(heading)}</h2>{_figure_grid(drawings)}</section>"


def _figure_grid(drawings: Sequence[str]) -> str:
    figures = "".join(
        f"<figure{_breadth(svg)}><figcaption>{_caption(svg)}</figcaption>{svg}</figure>" for svg in drawings
    )
    return f'<div class="figures">{figures}</div>'


def _named_figures(named: Sequence[tuple[str, Histogram | str]]) -> str:
    """Drawings under their names, each name behind a click."""
    under: dict[str, list[str]] = {}
    for name, drawing in named:
        under.setdefault(name, []).append(_drawn(drawing))
    if not under:
        return ""
    blocks = "".join(
        f"<details><summary>{escape(name)}</summary>{_figure_grid(drawings)}</details>"
        for name, drawings in under.items()
    )
    return f"<section><h2>Plots</h2>{blocks}</section>"


def _drawn(drawing: Histogram | str) -> str:
    return drawing if isinstance(drawing, str) else histogram_svg(drawing)


def _breadth(svg: str) -> str:
    """A drawing broader than a panel takes the whole row."""
    width = re.search(r'viewBox="\S+ \S+ ([\d.]+)', svg)
    return " class=broad" if width is not None and float(width[1]) > _PANEL else ""


def _caption(svg: str) -> str:
    return svg.split('aria-label="', 1)[1].split('"', 1)[0]  # already escaped


def _metric_section(metrics: Mapping[str, float], confidence: float) -> str:
    if not metrics:
        return ""
    lines = metric_lines(metrics)
    baselines = baseline_columns(lines)
    rows = "".join(
        f"<tr><td>{escape(line.name)}</td><td class=number>{format_value(line)}</td>"
        f"<td class=number>{format_interval(line)}</td>"
        f"<td class=number>{'' if line.n is None else f'{line.n:,}'}</td>"
        + "".join(f"<td class=number>{format_baseline(line, name)}</td>" for name in baselines)
        + "</tr>"
        for line in lines
    )
    head = f"<tr><th>metric</th><th>value</th><th>{confidence:.0%} interval</th><th>n</th>"
    head += "".join(f"<th class=number>{escape(name)}</th>" for name in baselines.values()) + "</tr>"
    table = _table(head, rows)
    if len(lines) > _LONG:
        table = f"<details><summary>{len(lines):,} metrics</summary>{table}</details>"
    return f"<section><h2>All metrics</h2>{table}</section>"


def _pairs_section(heading: str, content: Mapping[str, Any] | None) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(without_user(value))}</td></tr>"
        for name, value in _flatten(content or {})
    )
    return f"<section><h2>{escape(heading)}</h2>{_table('', rows)}</section>" if rows else ""


def _commands_section(commands: Sequence[str]) -> str:
    if not commands:
        return ""
    return f"<section><h2>How to reproduce</h2><pre>{escape(chr(10).join(commands))}</pre></section>"


def _config_section(config: Mapping[str, Any] | str) -> str:
    text = config if isinstance(config, str) else yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    if not text.strip():
        return ""
    text = escape(without_user(text))
    return f"<section><details><summary>Configuration</summary><pre>{text}</pre></details></section>"


def _table(head: str, rows: str) -> str:
    return f'<div class="wide"><table>{f"<thead>{head}</thead>" if head else ""}<tbody>{rows}</tbody></table></div>'


def _flatten(content: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """Nested content as lines of dotted name and text."""
    for key, value in content.items():
        name = f"{above}.{key}" if above else str(key)
        if isinstance(value, Mapping):
            yield from _flatten(value, name)
        elif isinstance(value, list | tuple):
            yield name, ", ".join(str(item) for item in value)
        elif isinstance(value, float):
            yield name, f"{value:.6g}"
        elif isinstance(value, int) and not isinstance(value, bool):
            yield name, f"{value:,}"
        else:
            yield name, "" if value is None else str(value)
