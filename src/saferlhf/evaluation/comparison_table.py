"""Models beside each other as a table: what they reach on each protocol, and below it what they differ by.

One list of lines serves the screen, `comparison.md` and the report. Headlines only; the rest is in `metrics.json`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from math import isnan
from typing import TYPE_CHECKING, NamedTuple

from saferlhf.evaluation.model_comparison import Difference, ProtocolComparison
from saferlhf.evaluation.paired_intervals import Estimate

if TYPE_CHECKING:
    from rich.table import Table

_COLUMNS = ("p", "Holm", "McNemar", "detectable")


class TableLine(NamedTuple):
    """One line.

    Attributes:
        kind: "protocol" (a heading), "model" or "difference".
        name: of the protocol and its metric, the model, or `a − b`.
        cells: value with interval, then for differences p, adjusted p, McNemar's p and what could have been found.
        sure: a difference that stays more than chance when all questions are counted.
    """

    kind: str
    name: str
    cells: tuple[str, ...]
    sure: bool = False


def comparison_lines(comparisons: Sequence[ProtocolComparison], confidence: float = 0.95) -> Iterator[TableLine]:
    """Protocol by protocol: all models, then all differences."""
    for comparison in comparisons:
        for metric in comparison.metrics:
            if not metric.headline:
                continue
            size = f"{comparison.rows:,} rows, {comparison.prompts:,} prompts"
            yield TableLine("protocol", f"{comparison.protocol}  {metric.metric}", (size,))
            for heading, estimate in metric.values.items():
                runs = comparison.runs[heading]
                name = heading if runs == 1 else f"{heading} (mean of {runs} runs)"
                yield TableLine("model", name, (_estimate(estimate, ""),))
            for d in metric.differences:
                cells = (_estimate(d.estimate, "+"), *_tests(d))
                yield TableLine("difference", f"{d.first} − {d.second}", cells, bool(d.p_holm <= 1 - confidence))


def comparison_notes(comparisons: Sequence[ProtocolComparison], confidence: float = 0.95) -> list[str]:
    """What must be said below the table: rows left out, what intervals cover, what the columns are."""
    notes = []
    for comparison in comparisons:
        for counts, words in ((comparison.left_out, "that another lacks"), (comparison.unjudged, "without a verdict")):
            notes += [
                f"{comparison.protocol}: {heading} has {count:,} rows {words}; they are left out for all"
                for heading, count in counts.items()
                if count
            ]
        notes += [f"{comparison.protocol}: {note}" for note in comparison.notes]
    single = list(dict.fromkeys(h for c in comparisons for h, runs in c.runs.items() if runs == 1))
    if single:
        notes.append(f"one run of {', '.join(single)}: what another seed would give is not in the intervals")
    notes.append(
        f"intervals: {confidence:.0%} over prompts; p: randomisation by prompt, or Student's where a side has several "
        "runs; Holm: adjusted over all differences here; McNemar: of the decisions, rows taken as independent; "
        "detectable: the smallest true difference found with a probability of 80%"
    )
    return notes


def comparison_table(comparisons: Sequence[ProtocolComparison], confidence: float = 0.95, title: str = "") -> Table:
    """The lines as a rich table; sure differences in bold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", overflow="fold")
    table.add_column(f"value {confidence:.0%} interval", justify="right", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    lines = list(comparison_lines(comparisons, confidence))
    for place, line in enumerate(lines):
        last = place + 1 < len(lines) and lines[place + 1].kind == "protocol"
        name = Text(line.name if line.kind == "protocol" else f"  {line.name}")
        name.stylize("bold" if line.sure or line.kind == "protocol" else "")
        rest = [""] * (1 + len(_COLUMNS) - len(line.cells))
        table.add_row(name, *line.cells, *rest, end_section=last)
    return table


def comparison_markdown(comparisons: Sequence[ProtocolComparison], confidence: float = 0.95) -> str:
    """The lines as Markdown, the notes below; sure differences in bold."""
    head = ["", f"value, {confidence:.0%} interval", *_COLUMNS]
    rows = [head, ["---"] * len(head)]
    for line in comparison_lines(comparisons, confidence):
        name = f"**{line.name}**" if line.sure or line.kind == "protocol" else line.name
        rows.append([name, *line.cells, *[""] * (1 + len(_COLUMNS) - len(line.cells))])
    text = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)
    return "\n".join([text, "", *(f"- {note}" for note in comparison_notes(comparisons, confidence))]) + "\n"


def comparison_html(comparisons: Sequence[ProtocolComparison], confidence: float = 0.95) -> str:
    """The lines as a section of the report, the notes below."""
    columns = ["", f"value, {confidence:.0%} interval", *_COLUMNS]
    head = "".join(f"<th{' class=number' if name else ''}>{escape(name)}</th>" for name in columns)
    rows = []
    for line in comparison_lines(comparisons, confidence):
        tag = "th" if line.kind == "protocol" or line.sure else "td"
        cells = [*line.cells, *[""] * (1 + len(_COLUMNS) - len(line.cells))]
        numbers = "".join(f"<td class=number>{escape(cell)}</td>" for cell in cells)
        rows.append(f"<tr><{tag}>{escape(line.name)}</{tag}>{numbers}</tr>")
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in comparison_notes(comparisons, confidence))
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    return f"<section><h2>Models beside each other</h2>{table}{notes}</section>"


# ------------------------------------------------------------------------------------------------ cells
def _estimate(estimate: Estimate, sign: str) -> str:
    """`0.912 [0.901, 0.922]`."""
    if isnan(estimate.value):
        return "-"
    text = f"{estimate.value:{sign}.3f}"
    if estimate.interval is None:
        return text
    return f"{text} [{estimate.interval.low:{sign}.3f}, {estimate.interval.high:{sign}.3f}]"


def _tests(d: Difference) -> tuple[str, ...]:
    return (*(_p(value) for value in (d.p, d.p_holm, d.p_mcnemar)), "-" if isnan(d.mde) else f"{d.mde:.3f}")


def _p(value: float) -> str:
    if isnan(value):
        return "-"
    return "<0.001" if value < 0.001 else f"{value:.3f}"
