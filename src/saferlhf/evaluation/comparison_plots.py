"""Pictures of models beside each other: differences with their intervals (a forest plot), and values by protocol.

As SVG for the report page and as PNG for MLflow and for slides; the PNGs stand on white ground. Equal input gives equal
bytes. Only headlines are drawn: what the protocols rest on. A filled mark is a difference that stays more than chance
when all questions are counted (Holm), an open one is not; a line that crosses 0 says the same of that question alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from saferlhf.evaluation.drawing import GRID, INK, ON_PAGE, ON_WHITE, SERIES, panel, save_png, to_svg
from saferlhf.evaluation.model_comparison import MetricComparison, ProtocolComparison
from saferlhf.evaluation.paired_intervals import Estimate

FOREST, DOTS = "differences.png", "models.png"
"""Names of the pictures in the folder of a comparison."""

_SHAPES = "os^Dv<>p"
_LINE = 0.27  # inches a line of a plot takes
_WIDEST, _STEP = 0.7, 0.3  # of the room between two protocols: what all models share, and the most between two


class _Line(NamedTuple):
    """A line of the forest: a heading where there is no estimate."""

    text: str
    estimate: Estimate | None
    sure: bool = False
    colour: str = INK


def forest_svg(
    comparisons: Sequence[ProtocolComparison], confidence: float = 0.95, title: str = "differences between models"
) -> str | None:
    """Differences as an <svg> element for the report; None without any.

    Args:
        comparisons: adjusted by `with_holm`.
        confidence: of the intervals; 1 minus it is the level of a filled mark.
        title: of the figure.
    """
    figure = _forest(comparisons, confidence, ON_PAGE)
    return None if figure is None else to_svg(figure, title)


def forest_png(path: Path, comparisons: Sequence[ProtocolComparison], confidence: float = 0.95) -> bool:
    """Write the same as a PNG; False without any difference."""
    return _saved(_forest(comparisons, confidence, ON_WHITE), path)


def dots_svg(
    comparisons: Sequence[ProtocolComparison], confidence: float = 0.95, title: str = "models by protocol"
) -> str | None:
    """Values of all models by protocol as an <svg> element for the report; None without any."""
    figure = _dots(comparisons, confidence, ON_PAGE)
    return None if figure is None else to_svg(figure, title)


def dots_png(path: Path, comparisons: Sequence[ProtocolComparison], confidence: float = 0.95) -> bool:
    """Write the same as a PNG; False without any value."""
    return _saved(_dots(comparisons, confidence, ON_WHITE), path)


def figures_html(comparisons: Sequence[ProtocolComparison], confidence: float = 0.95) -> str:
    """Both drawings as a section of the report; nothing without any."""
    drawn = {
        f"differences, filled where Holm's p is at most {1 - confidence:.2g}": forest_svg(comparisons, confidence),
        "models by protocol": dots_svg(comparisons, confidence),
    }
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
        for caption, svg in drawn.items()
        if svg is not None
    )
    return f'<section><h2>Pictures</h2><div class="figures">{figures}</div></section>' if figures else ""


# ------------------------------------------------------------------------------------------------ differences
def _forest(comparisons: Sequence[ProtocolComparison], confidence: float, colours: Mapping[str, str]) -> Any:
    lines = list(_lines(comparisons, confidence))
    if not any(line.estimate for line in lines):
        return None
    figure, axes = panel(height=0.9 + _LINE * len(lines))
    for place, line in enumerate(lines):
        if line.estimate is not None:
            face = colours[line.colour] if line.sure else "none"
            _point(axes, line.estimate, place, colours[line.colour], "o", face)
    axes.axvline(0.0, color=colours[INK], linewidth=1.0)
    pairs = _pairs(comparisons)
    what = f"{pairs[0][0]} − {pairs[0][1]}" if len(pairs) == 1 else "first − second"
    axes.set_xlabel(f"{_common(comparisons)}{what}, {confidence:.0%} intervals")
    labels = [line.text for line in lines]
    _lay_out(axes, labels, colours, bold=[place for place, line in enumerate(lines) if line.estimate is None])
    return figure


def _lines(comparisons: Sequence[ProtocolComparison], confidence: float) -> Iterator[_Line]:
    """A line per difference; with several pairs, below a heading for the protocol."""
    pairs = _pairs(comparisons)
    for comparison in comparisons:
        for metric in comparison.metrics:
            if not metric.headline:
                continue
            name = _name(comparisons, comparison.protocol, metric)
            if len(pairs) > 1:
                yield _Line(name, None)
            for d in metric.differences:
                colour = SERIES[pairs.index((d.first, d.second)) % len(SERIES)]
                text = name if len(pairs) == 1 else f"{d.first} − {d.second}"
                yield _Line(text, d.estimate, bool(d.p_holm <= 1 - confidence), colour)


def _pairs(comparisons: Sequence[ProtocolComparison]) -> list[tuple[str, str]]:
    found = [(d.first, d.second) for c in comparisons for metric in c.metrics for d in metric.differences]
    return list(dict.fromkeys(found))


# ------------------------------------------------------------------------------------------------ values
def _dots(comparisons: Sequence[ProtocolComparison], confidence: float, colours: Mapping[str, str]) -> Any:
    shown = [(c.protocol, metric) for c in comparisons for metric in c.metrics if metric.headline]
    headings = list(dict.fromkeys(heading for _, metric in shown for heading in metric.values))
    if not shown:
        return None
    lane = max(1.0, len(headings) * 0.45)
    figure, axes = panel(height=1.2 + _LINE * lane * len(shown))
    step = min(_STEP, _WIDEST / max(1, len(headings) - 1))
    offsets = step * (np.arange(len(headings)) - (len(headings) - 1) / 2)
    for number, heading in enumerate(headings):
        colour, shape = colours[SERIES[number % len(SERIES)]], _SHAPES[number // len(SERIES) % len(_SHAPES)]
        for place, (_, metric) in enumerate(shown):
            if heading in metric.values:
                _point(axes, metric.values[heading], place + offsets[number], colour, shape, colour)
        axes.plot([], [], shape, color=colour, label=heading)
    axes.set_xlabel(f"{_common(comparisons).rstrip(': ') or 'value'}, {confidence:.0%} intervals")
    for place in range(1, len(shown)):
        axes.axhline(place - 0.5, color=colours[GRID], linewidth=0.6)
    _lay_out(axes, [_name(comparisons, protocol, metric) for protocol, metric in shown], colours)
    # above the values: anywhere among them it would hide some
    figure.legend(
        loc="outside upper left", ncols=min(3, len(headings)), frameon=False, labelcolor=colours[INK], fontsize=9
    )
    return figure


# ------------------------------------------------------------------------------------------------ parts
def _metrics(comparisons: Sequence[ProtocolComparison]) -> list[str]:
    return list(dict.fromkeys(m.metric for c in comparisons for m in c.metrics if m.headline))


def _common(comparisons: Sequence[ProtocolComparison]) -> str:
    """`<metric>: ` for the axis where all protocols rest on the same one."""
    found = _metrics(comparisons)
    return f"{found[0]}: " if len(found) == 1 else ""


def _name(comparisons: Sequence[ProtocolComparison], protocol: str, metric: MetricComparison) -> str:
    return protocol if _common(comparisons) else f"{protocol}  {metric.metric}"


def _point(axes: Any, estimate: Estimate, place: float, colour: str, shape: str, face: str) -> None:
    """A value and its interval; one is drawn beside the other, for an interval of few prompts may leave it out."""
    if estimate.interval is not None:
        axes.plot(list(estimate.interval), [place, place], "-", color=colour, linewidth=1.8, solid_capstyle="butt")
    ground = {"markerfacecolor": face} if face != "none" else {"fillstyle": "none"}
    axes.plot(
        [estimate.value], [place], shape, color=colour, markersize=5.5, markeredgewidth=1.4, clip_on=False, **ground
    )


def _lay_out(axes: Any, labels: Sequence[str], colours: Mapping[str, str], bold: Sequence[int] = ()) -> None:
    """Lines from top to bottom, the first on top."""
    axes.set_yticks(range(len(labels)), labels, fontsize=8.5)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="both", colors=colours[INK], labelcolor=colours[INK], color=colours[GRID])
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=6)
    for place in bold:
        axes.get_yticklabels()[place].set_fontweight("bold")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color=colours[GRID], linewidth=0.6)
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(colours[GRID])
    axes.xaxis.label.set_color(colours[INK])


def _saved(figure: Any, path: Path) -> bool:
    if figure is None:
        return False
    save_png(figure, path)
    return True
