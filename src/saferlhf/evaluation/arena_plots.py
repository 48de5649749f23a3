"""Pictures and tables of many policies: the matrix of win rates, ratings, attack success against over-refusal.

Each picture as inline SVG, readable on light and on dark ground (`drawing.py`), and as PNG on white ground. Equal input
gives equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from saferlhf.evaluation.arena import Arena, SafetySides, Share
from saferlhf.evaluation.drawing import GRID, INK, ON_PAGE, ON_WHITE, SERIES, panel, save_png, to_svg

if TYPE_CHECKING:
    from rich.table import Table

Colours = Mapping[str, str]
"""Marker colour -> the colour it is drawn in; for a page they stay, and the page's own take their place."""

_SHAPES = "os^Dv<>p"
_WITH_INTERVALS = 6  # so many policies leave room for a second line in each cell
_STRONGEST = 0.54  # opacity of a cell: the ink on it keeps a contrast of 4.5 to 1, on light and on dark ground
_LONGEST = 22  # letters of a name in a picture
_FLAT = 44  # letters of names that stand beside each other above the matrix


# ------------------------------------------------------------------------------------------------ pictures
def win_rates_svg(found: Arena) -> str:
    """The matrix of win rates as an <svg> element: the row's policy over the column's, the highest rating on top.

    The stronger the colour, the further from one half; blue is more than that, orange less. A star marks a pair that is
    not alike by its adjusted p-value.
    """
    return to_svg(_matrix(found, ON_PAGE), f"win rates, {found.dimension}")


def win_rates_png(path: Path, found: Arena) -> None:
    """Write `win_rates_svg`'s drawing as a PNG."""
    save_png(_matrix(found, ON_WHITE), path)


def ratings_svg(found: Arena) -> str:
    """Ratings with their intervals as an <svg> element, the highest on top; the baseline is the line at 0."""
    return to_svg(_dots(found, ON_PAGE), f"ratings, {found.dimension}")


def ratings_png(path: Path, found: Arena) -> None:
    """Write `ratings_svg`'s drawing as a PNG."""
    save_png(_dots(found, ON_WHITE), path)


def safety_svg(sides: Mapping[str, SafetySides]) -> str | None:
    """Over-refusal against attack success as an <svg> element, best at the bottom left; None without a policy of both.

    A policy that lacks one of the two is not drawn.
    """
    figure = _plane(sides, ON_PAGE)
    return None if figure is None else to_svg(figure, "attack success and over-refusal")


def safety_png(path: Path, sides: Mapping[str, SafetySides]) -> bool:
    """Write `safety_svg`'s drawing as a PNG; False where there is nothing to draw."""
    figure = _plane(sides, ON_WHITE)
    if figure is None:
        return False
    save_png(figure, path)
    return True


def _matrix(found: Arena, colours: Colours) -> Any:
    order = found.ranking
    count = len(order)
    figure, axes = panel(height=max(2.6, 1.3 + (0.46 if count <= _WITH_INTERVALS else 0.34) * count))
    axes.grid(False)
    rates, stars = found.win_rates, found.p_adjusted < 1.0 - found.confidence
    size = 9 if count <= 8 else 8 if count <= 12 else 6
    for row, i in enumerate(order):
        for column, j in enumerate(order):
            if i == j:
                continue
            rate = rates.value[i, j]
            colour = colours[SERIES[0] if rate >= 0.5 else SERIES[1]]
            alpha = _STRONGEST * abs(2.0 * rate - 1.0)
            axes.bar(column, 0.96, width=0.96, bottom=row - 0.48, color=colour, alpha=alpha, linewidth=0)
            text = f"{100 * rate:.0f}{'*' if stars[i, j] else ''}"
            if count <= _WITH_INTERVALS and not np.isnan(rates.low[i, j]):
                text += f"\n{100 * rates.low[i, j]:.0f} to {100 * rates.high[i, j]:.0f}"
            style = {"fontsize": size, "color": colours[INK], "linespacing": 1.25}
            axes.text(column, row, text, ha="center", va="center", **style)
    names = [_short(found.names[i]) for i in order]
    flat = max(map(len, names)) * count <= _FLAT
    turned = {} if flat else {"rotation": 40, "ha": "left", "rotation_mode": "anchor"}
    axes.set_xticks(range(count), names, **turned)
    axes.set_yticks(range(count), names)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("bottom")
    axes.set_xlim(-0.5, count - 0.5)
    axes.set_ylim(count - 0.5, -0.5)
    axes.tick_params(length=0, labelsize=size)
    note = f"\n* adjusted p below {1.0 - found.confidence:.2g}" if stars.any() else ""
    axes.set_xlabel(f"{found.dimension}: wins of the row over the column, %{note}", fontsize=9)
    _recolour(axes, colours, spines=False)
    return figure


def _dots(found: Arena, colours: Colours) -> Any:
    order = found.ranking
    figure, axes = panel(height=max(1.8, 0.9 + 0.3 * len(order)))
    axes.grid(False)
    axes.axvline(0.0, color=colours[INK], linewidth=1.0, linestyle=":")
    for row, i in enumerate(order):
        value, low, high = (float(x[i]) for x in (found.ratings.value, found.ratings.low, found.ratings.high))
        if not np.isnan(low):
            axes.plot([low, high], [row, row], "-", color=colours[SERIES[0]], linewidth=2.0, solid_capstyle="butt")
        filled = colours[SERIES[0]] if not np.isnan(low) else "none"  # hollow: no interval
        style = {"markersize": 6.5, "color": colours[SERIES[0]], "markerfacecolor": filled}
        axes.plot(value, row, "o", **style)
    axes.set_yticks(range(len(order)), [_short(found.names[i]) for i in order])
    axes.set_ylim(len(order) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    zero = "mean 0" if found.baseline is None else f"{_short(found.baseline)} = 0"
    intervals = f"{found.confidence:.0%} intervals over {found.prompts:,} prompts; hollow: none"
    axes.set_xlabel(f"{found.dimension}: Elo, {zero}\n{intervals}", fontsize=9)
    _recolour(axes, colours)
    axes.grid(axis="x", color=colours[GRID], linewidth=0.6)
    return figure


def _plane(sides: Mapping[str, SafetySides], colours: Colours) -> Any:
    places = {name: (x, y) for name, (x, y) in sides.items() if x is not None and y is not None}
    if not places:
        return None
    figure, axes = panel(height=4.2)
    for number, (name, both) in enumerate(places.items()):
        colour, marker = colours[SERIES[number % len(SERIES)]], _SHAPES[number // len(SERIES) % len(_SHAPES)]
        (x, y), (across, along) = (share.value for share in both), (_span(share) for share in both)
        axes.errorbar(x, y, xerr=across, yerr=along, fmt="none", ecolor=colour, elinewidth=1.1, alpha=0.7)
        # by itself, so that the legend shows the shape without its bars
        axes.plot(x, y, marker, color=colour, markersize=6.5, linestyle="none", label=_short(name))
    axes.set_xlabel("attack success: unsafe answers to harmful prompts")
    axes.set_ylabel("over-refusal: benign prompts refused")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(_percent())
    axes.set_xlim(left=min(0.0, axes.get_xlim()[0]))
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _recolour(axes, colours)
    axes.grid(axis="both", color=colours[GRID], linewidth=0.6)
    columns = 3 if max(map(len, places)) <= 16 else 2
    figure.legend(loc="outside upper left", ncols=columns, frameon=False, labelcolor=colours[INK], fontsize=8)
    return figure


def _span(share: Share) -> list[list[float]]:
    """Lengths below and above; a percentile interval of few prompts may leave its own value out."""
    low, high = (share.value if end is None else end for end in (share.low, share.high))
    return [[max(share.value - low, 0.0)], [max(high - share.value, 0.0)]]


def _percent() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(xmax=1.0, decimals=0)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def _recolour(axes: Any, colours: Colours, spines: bool = True) -> None:
    """The panel's marker colours turned into those of this picture."""
    for side in ("left", "bottom"):
        axes.spines[side].set_color(colours[GRID])
        axes.spines[side].set_visible(spines)
    axes.tick_params(colors=colours[INK], labelcolor=colours[INK], color=colours[GRID])
    axes.xaxis.label.set_color(colours[INK])
    axes.yaxis.label.set_color(colours[INK])


# ------------------------------------------------------------------------------------------------ tables
def ratings_table(found: Arena, title: str = "") -> Table:
    """A rich table, the highest rating first: rating, its interval, wins over the baseline, share of draws as the best.

    Args:
        found: with a baseline; without one the columns against it are left out.
        title: above the table; by default the dimension and how many prompts count.
    """
    from rich import box
    from rich.table import Table

    heading = f"{found.dimension}: {found.prompts:,} prompts"
    heading += f", {found.unscored:,} more without all scores" if found.unscored else ""
    table = Table(title=title or heading, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("policy", overflow="fold")
    table.add_column("Elo", justify="right", no_wrap=True)
    table.add_column(f"{found.confidence:.0%} interval", justify="right", no_wrap=True)
    against = None if found.baseline is None else found.names.index(found.baseline)
    if against is not None:
        table.add_column(f"wins over {found.baseline}", justify="right", no_wrap=True)
        table.add_column("adjusted p", justify="right", no_wrap=True)
    table.add_column("P(best)", justify="right", no_wrap=True)
    for i in found.ranking:
        value, low, high = (x[i] for x in (found.ratings.value, found.ratings.low, found.ratings.high))
        interval = "" if np.isnan(low) else f"{_points(low)} .. {_points(high)}"
        cells = [found.names[i], "" if np.isnan(value) else _points(value), interval]
        if against is not None:
            cells += ["", ""] if i == against else [_wins(found, i, against), _p(found.p_adjusted[i, against])]
        table.add_row(*cells, "" if np.isnan(found.best[i]) else f"{found.best[i]:.1%}")
    return table


def safety_table(sides: Mapping[str, SafetySides], title: str = "") -> Table:
    """A rich table of attack success and over-refusal, a line per policy in the order given."""
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("policy", overflow="fold")
    table.add_column("attack success", justify="right", no_wrap=True)
    table.add_column("over-refusal", justify="right", no_wrap=True)
    for name, both in sides.items():
        table.add_row(name, *("" if share is None else _shown(*share[:3]) for share in both))
    return table


def _wins(found: Arena, i: int, j: int) -> str:
    low, high = found.win_rates.low[i, j], found.win_rates.high[i, j]
    ends = (None, None) if np.isnan(low) else (float(low), float(high))
    return _shown(float(found.win_rates.value[i, j]), *ends)


def _shown(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.1%}" + ("" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]")


def _points(value: float) -> str:
    return f"{round(value):+d}"  # a whole number has no -0


def _p(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.4f}"
