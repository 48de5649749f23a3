"""Drift on the screen, in the report and in the docs: one table and one plot over protocols and languages.

What the numbers are: `drift.py`. All three show the same lines in the same order, in words of one place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saferlhf.evaluation.drawing import GRID, INK, ON_PAGE, ON_WHITE, SERIES, save_png, to_svg
from saferlhf.evaluation.drift import ENGLISH, HOME, OFF, OTHER, Drift, Line, Value
from saferlhf.evaluation.protocol_results import interval, number

if TYPE_CHECKING:
    from rich.table import Table

_LINE = 0.27  # inches a line of the plot takes
_UNBROKEN = 'style="white-space:nowrap"'

# ------------------------------------------------------------------------------------------------ table
_COLUMNS = (
    ("unsafe", "prevalence", False),
    ("AUROC", "auroc", False),
    ("drop", "auroc", True),
    ("macro-F1", "macro_f1", False),
    ("drop", "macro_f1", True),
    ("accuracy", "accuracy", False),
    ("drop", "accuracy", True),
    ("called unsafe", "predicted_rate", False),
)
"""Heading, metric, whether it is its drop."""


def _name(line: Line) -> str:
    return f"{line.language} ({line.note})" if line.note else line.language or line.protocol


def _is_home(line: Line, drift: Drift) -> bool:
    """Whether drops are counted from this line."""
    return line.protocol == drift.home and not line.language


def _cells(line: Line) -> list[Value]:
    """As `_COLUMNS`; empty where there is no such value."""
    return [(line.drops if drop else line.values).get(metric, {}) for _, metric, drop in _COLUMNS]


def _lead(drift: Drift) -> str:
    """What the numbers are, in a few sentences."""
    parts = [drift.remark[:1].upper() + drift.remark[1:]] if drift.remark else []
    if drift.home is not None:
        parts.append(
            f"Drop: the value on {drift.home}, which is in-domain for a model trained on {drift.trained_on}, minus the"
            " value here; a negative drop is a gain"
        )
    if any(line.drops for line in drift.languages):
        parts.append("Of a language the drop is the accuracy in English minus that in the language")
    if any(line.note for line in drift.lines):
        parts.append("Rows of one label have no drop from rows of both")
    if any(line.drops for line in drift.lines):
        parts.append(f"{drift.confidence:.0%} intervals; those of drops by MOVER, from the intervals of both sides")
    parts.append(
        "AUROC depends neither on the share of unsafe rows nor on the threshold, macro-F1 and accuracy on both"
    )
    return ". ".join(parts) + "."


def drift_table(drift: Drift) -> Table:
    """For the screen: values, and drops with their intervals; languages stand below their protocol."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    caption = drift.remark or f"drop: {drift.home} (in-domain) minus here"
    if any(line.drops for line in drift.languages):
        caption += "; of a language: English minus here"
    table = Table(title="drift", title_justify="left", caption=caption, caption_justify="left", box=box.SIMPLE_HEAD)
    table.padding, table.pad_edge = (0, 0), False
    table.add_column("protocol, language", overflow="fold")
    table.add_column("domain", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    columns = [at for at, (_, metric, drop) in enumerate(_COLUMNS) if not drop or _any_drop(drift, metric)]
    for at in columns:
        heading, _, drop = _COLUMNS[at]
        table.add_column(heading, justify="right", no_wrap=True, style="" if drop else "bold")
        if drop:
            table.add_column("interval", justify="right", no_wrap=True)
    for line in drift.lines:
        cells = _cells(line)
        texts = [Text(f"  {_name(line)}" if line.language else _name(line))]
        texts += [Text("" if line.language else line.domain), Text(f"{line.rows:,}")]
        for at in columns:
            texts.append(Text(_number(cells[at])))
            if _COLUMNS[at][2]:
                texts.append(Text(interval(cells[at])))
        table.add_row(*texts)
    return table


def _any_drop(drift: Drift, metric: str) -> bool:
    return any(metric in line.drops for line in drift.lines)


def _number(value: Value) -> str:
    return number(value["value"]) if value else ""


def drift_html(drift: Drift) -> str:
    """A section for the report: the table with all intervals, and the plot."""
    head = "<th>protocol, language</th><th>domain</th><th class=number>rows</th>"
    head += "".join(f"<th class=number>{heading}</th>" for heading, _, _ in _COLUMNS)
    rows = ""
    for line in drift.lines:
        name = f"&emsp;{escape(_name(line))}" if line.language else escape(_name(line))
        name = f"<strong>{name}</strong>" if _is_home(line, drift) else name
        cells = "".join(
            f'<td class=number>{_number(value)}<br><span class="note">{interval(value)}</span></td>'
            for value in _cells(line)
        )
        domain = "" if line.language else escape(line.domain)
        rows += f"<tr><td>{name}</td><td {_UNBROKEN}>{domain}</td><td class=number>{line.rows:,}</td>{cells}</tr>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
    table = f'<div class="wide" style="margin-top:1rem">{table}</div>'
    note = f'<p class="note">{escape(_lead(drift))}</p>'
    return f"<section><h2>Drift</h2>{note}{_drawn(drift)}{table}</section>"


def _drawn(drift: Drift) -> str:
    svg = drift_svg(drift)
    if svg is None:
        return ""
    breadth = " class=broad" if drift.languages else ""
    return f'<div class="figures"><figure{breadth}><figcaption>{_title(drift)}</figcaption>{svg}</figure></div>'


def drift_markdown(drift: Drift) -> list[str]:
    """Lines of a page: what the numbers are, and the table with all intervals, narrow enough for a page of docs."""
    headings = ["protocol, language", "rows", *(heading for heading, _, _ in _COLUMNS)]
    lines = [_lead(drift), "", _row(headings), "|" + " --- |" * len(headings)]
    for line in drift.lines:
        name = f"{line.protocol}: {_name(line)}" if line.language else _name(line)
        name = f"**{name}**" if _is_home(line, drift) else name
        name += "" if line.language else _below(line.domain)
        # an interval may be broken in its middle
        cells = [_number(value) + _below(interval(value).replace("..", "..<wbr>")) for value in _cells(line)]
        lines.append(_row([name, f"{line.rows:,}", *cells]))
    return lines


def _below(text: str) -> str:
    return f"<br><small>{text}</small>" if text else ""


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ------------------------------------------------------------------------------------------------ plot
def drift_svg(drift: Drift) -> str | None:
    """The plot as an <svg> element for the report; None without any AUROC."""
    figure = _figure(drift, ON_PAGE)
    return None if figure is None else to_svg(figure, _title(drift))


def drift_png(path: Path, drift: Drift) -> bool:
    """Write the same as a PNG; False without any AUROC."""
    figure = _figure(drift, ON_WHITE)
    if figure is not None:
        save_png(figure, path)
    return figure is not None


def _title(drift: Drift) -> str:
    return "AUROC by protocol" + (", accuracy by language" if drift.languages else "")


def _figure(drift: Drift, colours: Mapping[str, str]) -> Any:
    """AUROC of protocols on the left, accuracy of languages on the right; both fall from top to bottom."""
    from matplotlib.figure import Figure

    protocols = [line for line in drift.protocols if "auroc" in line.values]
    # one with a note is not to be compared with the others
    languages = sorted(
        (line for line in drift.languages if not line.note), key=lambda line: -line.values["accuracy"]["value"]
    )
    if not protocols:
        return None
    height = 1.2 + _LINE * max(len(protocols), len(languages))
    figure = Figure(figsize=(9.6 if languages else 5.6, height), layout="constrained")
    left, *right = figure.subplots(1, 2 if languages else 1, squeeze=False)[0]
    home = next((line.values["auroc"]["value"] for line in protocols if line.protocol == drift.home), None)
    _panel(left, protocols, "auroc", home, "in-domain", colours)
    left.axvline(0.5, color=colours[INK], linewidth=0.9, linestyle=":")
    left.set_xlabel(left.get_xlabel() + ("; " if home is None else ", ") + "dotted: chance")
    for axes in right:
        english = [line.values["accuracy"]["value"] for line in languages if line.language == ENGLISH]
        _panel(axes, languages, "accuracy", english[0] if len(english) == 1 else None, "English", colours)
    handles, labels = left.get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(
            handles,
            labels,
            loc="outside upper left",
            ncols=len(labels),
            frameon=False,
            labelcolor=colours[INK],
            fontsize=9,
        )
    return figure


_MARKS = {HOME: (SERIES[0], "o"), OTHER: (SERIES[1], "s"), OFF: (SERIES[3], "D"), "": (INK, "o")}
"""Domain -> colour and shape."""


def _panel(
    axes: Any, lines: Sequence[Line], metric: str, mark: float | None, of: str, colours: Mapping[str, str]
) -> None:
    """Dots with whiskers, the first line on top, and a dashed line at `mark`, the value of `of`."""
    if mark is not None:
        axes.axvline(mark, color=colours[INK], linewidth=1.0, linestyle="--")
    labelled: set[str] = set()
    several = len({line.protocol for line in lines}) > 1
    names = []
    for place, line in enumerate(lines):
        colour, shape = (SERIES[2], "o") if line.language else _MARKS[line.domain]
        value = line.values[metric]
        if "low" in value:
            ends = [value["low"], value["high"]]
            axes.plot(ends, [place, place], "-", color=colours[colour], linewidth=1.8, solid_capstyle="butt")
        label = line.domain if not line.language and line.domain not in labelled else None
        labelled.add(line.domain)
        axes.plot([value["value"]], [place], shape, color=colours[colour], markersize=5.5, label=label, clip_on=False)
        names.append(f"{line.protocol}: {_name(line)}" if line.language and several else _name(line))
    _frame(axes, names, colours)
    axes.set_xlabel(("AUROC" if metric == "auroc" else metric) + (f"; dashed: {of}" if mark is not None else ""))


def _frame(axes: Any, names: Sequence[str], colours: Mapping[str, str]) -> None:
    axes.set_facecolor("none")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(colours[GRID])
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="both", labelcolor=colours[INK], color=colours[GRID])
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=6)
    axes.grid(axis="x", color=colours[GRID], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.label.set_color(colours[INK])


__all__ = ["drift_html", "drift_markdown", "drift_png", "drift_svg", "drift_table"]
