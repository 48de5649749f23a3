"""`report.html`: one self-contained page about a run, readable without network, on light and on dark ground.

Top to bottom: the verdict (headline numbers with intervals), training curves, score histograms, all metrics, the data,
lineage, how to reproduce it, the whole configuration. No script, no link to elsewhere; all text is escaped.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from saferlhf.evaluation.data_section import DATA_STYLE, data_section
from saferlhf.evaluation.plots import Curve, Histogram, curve_panels, curves_svg, histogram_svg
from saferlhf.evaluation.table import (
    MetricLine,
    baseline_columns,
    format_baseline,
    format_interval,
    format_value,
    headline_lines,
    metric_lines,
)


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
    """
    plain = [h for h in histograms if not isinstance(h, tuple)]
    parts = [
        _verdict(metrics, confidence),
        *sections,
        _figures("Training", [curves_svg(name, series, step) for name, series in curve_panels(curves or {}).items()]),
        _figures("Scores", [_drawn(h) for h in plain]),
        _named_figures([h for h in histograms if isinstance(h, tuple)]),
        _metric_section(metrics, confidence),
        data_section(data_report) if data_report and "findings" in data_report else _pairs_section("Data", data_report),
        _pairs_section("Lineage", lineage),
        _commands_section(commands),
        _config_section(config),
    ]
    page = _PAGE.format(
        title=escape(title),
        subtitle=f'<p class="subtitle">{escape(subtitle)}</p>' if subtitle else "",
        style=_STYLE + DATA_STYLE,
        body="\n".join(part for part in parts if part),
    )
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    draft.write_text(page, encoding="utf-8")
    draft.replace(target)
    return target


# ------------------------------------------------------------------------------------------------ sections
def _verdict(metrics: Mapping[str, float], confidence: float) -> str:
    cards = "".join(_card(line) for line in headline_lines(metrics))
    if not cards:
        return ""
    note = f"Intervals: {confidence:.0%} percentile bootstrap over prompts."
    return f'<section><h2>Verdict</h2><div class="cards">{cards}</div><p class="note">{note}</p></section>'


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
    figures = "".join(f"<figure><figcaption>{_caption(svg)}</figcaption>{svg}</figure>" for svg in drawings)
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
    return f"<section><h2>All metrics</h2>{_table(head, rows)}</section>"


def _pairs_section(heading: str, content: Mapping[str, Any] | None) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in _flatten(content or {})
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
    return f"<section><details><summary>Configuration</summary><pre>{escape(text)}</pre></details></section>"


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


# ------------------------------------------------------------------------------------------------ page
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1>{subtitle}</header>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { color-scheme: light dark; --ground: #ffffff; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --panel: #f6f8fa;
  --series-1: #0072b2; --series-2: #c8500a; --series-3: #00805d; --series-4: #a0408f; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #0f1318; --ink: #e6eaef; --soft: #9aa5b1; --line: #39424d; --panel: #181e25;
    --series-1: #5ab4f0; --series-2: #ff9a52; --series-3: #3ccf9f; --series-4: #e08bd0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1.5rem; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
.subtitle, .note, .detail { color: var(--soft); } .subtitle { margin: .2rem 0 0; } .note { font-size: .85rem; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; background: var(--panel); }
.card .name { font-size: .85rem; color: var(--soft); overflow-wrap: anywhere; }
.card .value { font-size: 1.7rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.card .detail { font-size: .85rem; font-variant-numeric: tabular-nums; }
.strip { position: relative; height: .5rem; margin: .3rem 0 .4rem; border-radius: .25rem; background: var(--line); }
.strip i { position: absolute; top: 0; bottom: 0; }
.strip .band { background: var(--series-1); opacity: .55; border-radius: .2rem; }
.strip .tick { width: 2px; margin-left: -1px; top: -3px; bottom: -3px; background: var(--ink); }
.strip .chance { left: 50%; width: 1px; background: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem; }
figcaption { font-weight: 600; font-size: .9rem; } figure svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; } td, th { padding: .25rem .9rem .25rem 0; text-align: left;
  border-bottom: 1px solid var(--line); vertical-align: top; } td { overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { background: var(--panel); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-x: auto;
  font-size: .85rem; } summary { cursor: pointer; font-weight: 600; }
@media print { details > pre { white-space: pre-wrap; } }
"""
