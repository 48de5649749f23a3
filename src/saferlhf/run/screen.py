"""What a person reads: one line per event on the error stream, plans and results on the output stream."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saferlhf.config.files import read_json
from saferlhf.config.run_folder import RunFolder
from saferlhf.training.display import duration

if TYPE_CHECKING:
    from saferlhf.data.report_tables import ReportTable


_silent = False


def silence() -> None:
    """Of several processes one speaks: this one no more."""
    global _silent
    _silent = True


def say(text: str) -> None:
    """One line of progress."""
    if _silent:
        return
    print(text, file=sys.stderr, flush=True)


def output_width() -> int | None:
    """Columns of what is printed: the terminal's own (None); in a file, enough for the tables."""
    return None if sys.stdout.isatty() else 120


def show_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Two columns: what, and how much. In a file a value is one line, however long: paths are there to be copied."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    width = output_width()
    if width is not None:
        longest = [max(len(row[column]) for row in rows) for column in (0, 1)]
        width = max(width, sum(longest) + 4)
    Console(width=width).print(table)


def show_data(report: Mapping[str, Any]) -> None:
    """The data report: rows, what was wrong with them, labels, biases and lengths, a column for each split."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from saferlhf.data.report_tables import data_facts, data_tables

    console = Console(width=output_width())
    tables = data_tables(report, short=True)
    gap = 2 if console.width >= 60 else 1
    console.print(Text(f"data: {data_facts(report)}", style="italic"))
    if console.width >= 100:  # side by side, so that rows and plan are one screen
        right = [table for table in tables if table.title in ("labels", "biases")]
        both = Table.grid(padding=(0, 6, 0, 0))
        both.add_row(*(_data_panel(part, gap) for part in ([t for t in tables if t not in right], right) if part))
        console.print(both)
    else:
        console.print(_data_panel(tables, gap))
    for note in (table.note for table in tables if table.note):
        console.print(Text(note, style="dim"))
    console.print()


def _data_panel(tables: Sequence[ReportTable], gap: int) -> Any:
    """Tables of the data report below each other, with common columns."""
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    panel = Table(box=None, padding=(0, gap, 0, 0))
    panel.add_column(overflow="fold")
    for split in tables[0].columns if tables else ():
        panel.add_column(split, justify="right", no_wrap=True)
    for table in tables:
        if table.lines:
            panel.add_row(Text(table.title, style="bold"))
        for line in table.lines:
            style = "dim" if line.level else ""
            name = Padding(Text(line.name, style=style), (0, 0, 0, gap * (line.level + 1)))
            panel.add_row(name, *(Text(cell, style=style) for cell in line.cells))
    return panel


def say_finished(folder: RunFolder, metrics: Mapping[str, float], confidence: float) -> None:
    """The run was finished before: its numbers, and where it is."""
    say(f"finished before: {folder.path} (resume=never for a fresh run)")
    _print_metrics(metrics, confidence)
    _print_places(folder, None)


def say_result(folder: RunFolder, metrics: Mapping[str, float], ui: str | None, confidence: float) -> None:
    """The numbers of a run that just ended, and how to look at it."""
    _print_metrics(metrics, confidence)
    _print_places(folder, ui)


def say_evaluation(folder: RunFolder, metrics: Mapping[str, float], confidence: float) -> None:
    """The numbers of an evaluation, and where they are."""
    _print_metrics(metrics, confidence)
    print(f"report:  {folder.path / 'report.html'}")
    print(f"metrics: {folder.metrics}")


def say_protocols(
    folder: RunFolder,
    results: Sequence[Mapping[str, Any]],
    left_out: Sequence[Sequence[str]],
    drift: Mapping[str, Any] | None = None,
) -> None:
    """A line for each protocol, how far they are from in-domain, and where the rest is."""
    from rich.console import Console

    from saferlhf.evaluation.drift import Drift
    from saferlhf.evaluation.drift_report import drift_table
    from saferlhf.evaluation.protocol_results import protocols_table

    width = output_width()
    console = Console(width=None if width is None else max(width, 150))
    console.print(protocols_table(results, left_out))
    found = Drift.read(drift)
    if found is not None and found.shown:
        console.print(drift_table(found))
    print(f"report:  {folder.path / 'report.html'}")
    print(f"metrics: {folder.metrics}")


def metrics_overview(folders: Mapping[str, Path], seconds: float) -> str:
    """Headline metrics of several runs in one table, with where each is."""
    from rich.console import Console
    from rich.table import Table

    from saferlhf.evaluation.table import format_interval, format_value, headline_lines

    table = Table(title=f"{len(folders)} stages, {duration(seconds)}", title_justify="left")
    for column in ("stage", "metric"):
        table.add_column(column, no_wrap=column == "stage")
    for column in ("value", "95% interval", "n"):
        table.add_column(column, justify="right", no_wrap=True)
    for stage, folder in folders.items():
        lines = headline_lines(read_json(folder / "metrics.json") or {})
        for number, line in enumerate(lines):
            count = "" if line.n is None else f"{line.n:,}"
            name = line.name.removeprefix("test/")
            last = number == len(lines) - 1
            table.add_row(
                "" if number else stage, name, format_value(line), format_interval(line), count, end_section=last
            )
    console = Console(width=output_width())
    with console.capture() as capture:
        console.print(table)
    places = "\n".join(f"{stage}: {folder}" for stage, folder in folders.items())
    return f"{capture.get()}{places}"


def _print_metrics(metrics: Mapping[str, float], confidence: float) -> None:
    from rich.console import Console

    from saferlhf.evaluation.table import metrics_table

    if metrics:
        Console(width=output_width()).print(metrics_table(metrics, confidence=confidence, headlines_only=True))


def _print_places(folder: RunFolder, ui: str | None) -> None:
    print(f"model:   {folder.export}")
    print(f"report:  {folder.path / 'report.html'}")
    print(f"metrics: {folder.metrics}")
    if ui:
        print(f"compare: {ui}")
