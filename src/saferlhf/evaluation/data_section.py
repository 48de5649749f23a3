"""The data of a run as a section of its report page: a table each for rows, bad rows, labels, biases, lengths, ..."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from saferlhf.data.report_tables import ReportTable, data_facts, data_tables

DATA_STYLE = """
.tables { columns: 26rem; column-gap: 2.5rem; } .tables > div { break-inside: avoid; padding-bottom: 1.2rem; }
.tables table { width: 100%; } h3 { font-size: .95rem; margin: 0 0 .3rem; }
.tables .note { margin: .3rem 0 0; } tr.part td { color: var(--soft); } tr.part td:first-child { padding-left: 1rem; }
"""


def data_section(report: Mapping[str, Any]) -> str:
    """HTML of the section; all text is escaped.

    Args:
        report: as in `data_report.json`.
    """
    tables = "".join(_table(table) for table in data_tables(report))
    facts = escape(data_facts(report))
    return f'<section><h2>Data</h2><p class="note">{facts}</p><div class="tables">{tables}</div></section>'


def _table(table: ReportTable) -> str:
    head = "".join(f"<th class=number>{escape(column)}</th>" for column in table.columns)
    rows = "".join(
        f"<tr{' class=part' if line.level else ''}><td>{escape(line.name)}</td>"
        + "".join(f"<td class=number>{escape(cell)}</td>" for cell in line.cells)
        + "</tr>"
        for line in table.lines
    )
    body = f"<table><thead><tr><th></th>{head}</tr></thead><tbody>{rows}</tbody></table>" if rows else ""
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    return f'<div><h3>{escape(table.title.capitalize())}</h3><div class="wide">{body}</div>{note}</div>'
