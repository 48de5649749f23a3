"""Drawings as inline SVG that take their colours from the page: axes, legend, and the way from matplotlib to the page.

matplotlib is imported on first use only; no display, and equal input gives equal bytes.
"""

from __future__ import annotations

import io
import re
from html import escape
from pathlib import Path
from typing import Any

# matplotlib draws in these marker colours; the page's own take their place in the SVG text
INK, GRID = "#010101", "#020202"
SERIES = ("#0a0a01", "#0a0a02", "#0a0a03", "#0a0a04")
PAGE_COLOURS = {
    INK: "currentColor",
    GRID: "var(--line, #d0d0d0)",
    SERIES[0]: "var(--series-1, #0072b2)",
    SERIES[1]: "var(--series-2, #d55e00)",
    SERIES[2]: "var(--series-3, #009e73)",
    SERIES[3]: "var(--series-4, #aa4499)",
}
ON_WHITE = dict(
    zip((INK, GRID, *SERIES), ("#1b1f24", "#d1d9e0", "#0072b2", "#d55e00", "#009e73", "#aa4499"), strict=True)
)
"""Marker colour -> colour of a PNG, which stands on white ground."""
ON_PAGE = {mark: mark for mark in ON_WHITE}
"""The same of an SVG: the page's own colours take their place in the text."""
DASHES = ("-", "--", "-.", ":")


def panel(height: float = 3.1) -> tuple[Any, Any]:
    """A figure of the page's width, `height` inches high, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(GRID)
    axes.tick_params(colors=INK, labelcolor=INK, color=GRID)
    axes.grid(axis="y", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def legend(axes: Any, always: bool = False) -> None:
    """A legend where there is more than one thing to tell apart."""
    handles, labels = axes.get_legend_handles_labels()
    if handles and (always or len(handles) > 1):
        axes.legend(handles, labels, frameon=False, labelcolor=INK, fontsize=9)


def to_svg(figure: Any, title: str) -> str:
    """The drawing as an <svg> element for the page: its own ids, the page's colours, a text for screen readers."""
    import matplotlib

    buffer = io.StringIO()
    # the salt makes ids reproducible, and different for each panel of one page
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for marker, colour in PAGE_COLOURS.items():
        text = text.replace(marker, colour)
    # the page sets the size; the namespaces and metadata are for stand-alone files
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", text, count=2)
    # groups are named the same in every drawing, and nothing refers to them: ids must be unique in a page
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title, quote=True)}"', 1)


def save_png(figure: Any, path: Path) -> None:
    """The drawing as a PNG on white ground; equal drawings give equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=140, facecolor="white", metadata={"Software": None})
