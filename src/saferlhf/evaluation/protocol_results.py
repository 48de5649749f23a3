"""Results by protocol: one line each, with baselines and the numbers that others published beside it.

A result is plain data (`protocols.json` of the evaluation's folder), so that the screen, the report and the docs show
the same without measuring again. Published numbers stand under the metric that they are of; whether the authors of a
model ran it themselves, and whether we read the source or a summary of it, is said with each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from typing import TYPE_CHECKING, Any

from saferlhf.config.evaluate_schema import ProtocolConfig

if TYPE_CHECKING:
    from rich.table import Table

Result = Mapping[str, Any]

FILE = "protocols.json"
BASELINES = ("constant", "length", "longer", "tfidf")
_ALSO = ("unsafe/f1", "unsafe/macro_f1", "unsafe/accuracy", "unsafe/auroc", "unsafe/auprc", "unsafe/fpr", "unsafe/ece")
_HEADINGS = {"constant": "const.", "length": "length", "longer": "longer", "tfidf": "TF-IDF"}


def protocol_result(
    protocol: ProtocolConfig,
    metrics: Mapping[str, float],
    *,
    measure: str,
    kind: str,
    rows: int,
    marks: Sequence[str] = (),
    files: Sequence[Mapping[str, Any]] = (),
    fingerprint: str = "",
) -> dict[str, Any]:
    """What one protocol says of a model.

    Args:
        protocol: as configured.
        metrics: flat, of the whole evaluation.
        measure: which of its measures was taken.
        kind: of the model.
        rows: how many were judged.
        marks: what must be said of the way they were judged.
        files: of its data, with names and hashes.
        fingerprint: of its rows.
    """
    metric = headline(protocol, measure, kind)
    names = dict.fromkeys((metric, *(name for name in _ALSO if measure == "moderation")))
    values = {name: found for name in names if (found := _value(metrics, protocol.name, name))}
    return {
        "protocol": protocol.name,
        "about": protocol.about,
        "rule": protocol.rule,
        "unit": protocol.unit,
        "measure": measure,
        "kind": kind,
        "metric": metric,
        "rows": rows,
        "published_rows": protocol.published_rows,
        "at_home": list(protocol.at_home),
        "values": values,
        "seen_prompt_rate": metrics.get(f"{protocol.name}/seen_prompt_rate"),
        "unseen": _value(metrics, f"{protocol.name}/unseen", metric),
        "marks": list(marks),
        "note": protocol.note,
        "peers": [asdict(peer) for peer in sorted(protocol.peers, key=lambda peer: -peer.value)],
        "files": [dict(file) for file in files],
        "fingerprint": fingerprint,
    }


def headline(protocol: ProtocolConfig, measure: str, kind: str) -> str:
    """`<area>/<metric>` that a protocol is told by, for this measure of this kind of model."""
    if measure == "preference":
        return f"{kind}/{protocol.metric.rpartition('/')[2]}"
    if measure == "policy" and not protocol.metric.startswith("policy/"):
        return "policy/safe_rate"
    return protocol.metric


def _value(metrics: Mapping[str, float], prefix: str, name: str) -> dict[str, float] | None:
    """A metric with interval, count and baselines; None where it was not measured."""
    full = f"{prefix}/{name}"
    if full not in metrics:
        return None
    found = {"value": metrics[full]}
    found |= {end: metrics[f"{full}_{end}"] for end in ("low", "high", "n") if f"{full}_{end}" in metrics}
    for baseline in BASELINES:
        beside = f"{prefix}/baseline_{baseline}/{name}"
        if beside in metrics:
            found[baseline] = metrics[beside]
    return found


def best_peer(result: Result) -> Mapping[str, Any] | None:
    """The highest published number of the headline metric; None where nobody published one."""
    found = [peer for peer in result["peers"] if (peer["metric"] or result["metric"]) == result["metric"]]
    found = [peer for peer in found if peer["mark"] != "measured"]
    return max(found, key=lambda peer: peer["value"], default=None)


# ------------------------------------------------------------------------------------------------ screen
def protocols_table(results: Sequence[Result], left_out: Sequence[Sequence[str]] = ()) -> Table:
    """A line for each protocol: rows, metric, value with interval, baselines, the best published number."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(title="protocols", title_justify="left", box=box.SIMPLE_HEAD, padding=0, pad_edge=False)
    table.add_column("protocol", overflow="fold")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True, style="bold")
    table.add_column("interval", justify="right", no_wrap=True)
    shown = [b for b in BASELINES if any(b in _headline_value(result) for result in results)]
    for baseline in shown:
        table.add_column(_HEADINGS[baseline], justify="right", no_wrap=True, style="dim")
    table.add_column("best published", overflow="fold")
    for result in results:
        value, peer = _headline_value(result), best_peer(result)
        name = Text(result["protocol"])
        for mark in result["marks"]:
            name.append(f" ({mark.partition(':')[0]})", style="yellow")
        table.add_row(
            name,
            f"{result['rows']:,}",
            result["metric"],
            number(value.get("value")),
            interval(value),
            *(number(value.get(baseline)) for baseline in shown),
            Text("" if peer is None else f"{number(peer['value'])} {peer['model']}{_run_by(peer)}"),
        )
    for missing, reason in left_out:
        empty = [""] * (4 + len(shown))
        table.add_row(Text(missing, style="dim"), *empty, Text(f"left out: {reason}", style="dim"))
    return table


def _headline_value(result: Result) -> Mapping[str, float]:
    found: Mapping[str, float] = result["values"].get(result["metric"], {})
    return found


def number(value: float | None) -> str:
    """Three decimals; a dash where there is none."""
    return "-" if value is None else f"{value:.3f}"


def interval(value: Mapping[str, float]) -> str:
    """`low .. high`, or nothing."""
    return f"{value['low']:.3f}..{value['high']:.3f}" if "low" in value and "high" in value else ""


def _run_by(peer: Mapping[str, Any]) -> str:
    by = "own run" if peer["ran_by"] == "own" else f"run by {peer['ran_by']}"
    return f" ({by}, {peer['mark']})"


# ------------------------------------------------------------------------------------------------ report
def protocols_html(results: Sequence[Result], left_out: Sequence[Sequence[str]] = ()) -> str:
    """A section for the report: the table of all protocols, and each with its label rule and the published numbers."""
    head = "".join(f"<th>{name}</th>" for name in ("protocol", "unit", "rows", "metric"))
    shown = [b for b in BASELINES if any(b in _headline_value(result) for result in results)]
    columns = ("value", "interval", *(_HEADINGS[b] for b in shown), "best published")
    head += "".join(f"<th class=number>{escape(name)}</th>" for name in columns)
    lines = "".join(_line(result, shown) for result in results)
    lines += "".join(
        f'<tr><td>{escape(name)}</td><td colspan="{3 + len(columns)}" class="note">left out: {escape(reason)}</td></tr>'
        for name, reason in left_out
    )
    table = f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'
    details = "".join(_details(result) for result in results)
    return f"<section><h2>Protocols</h2>{table}{details}</section>"


def _line(result: Result, shown: Sequence[str]) -> str:
    value, peer = _headline_value(result), best_peer(result)
    marks = "".join(f'<br><span class="note">{escape(mark)}</span>' for mark in result["marks"])
    rows = f"{result['rows']:,}"
    if result["published_rows"] and result["published_rows"] != result["rows"]:
        rows += f" of {result['published_rows']:,}"
    cells = [f"<td>{escape(result['protocol'])}{marks}</td><td>{escape(result['unit'])}</td><td>{rows}</td>"]
    cells.append(f"<td>{escape(result['metric'])}</td>")
    published = "" if peer is None else f"{number(peer['value'])} {peer['model']}{_run_by(peer)}"
    numbers = [f"<strong>{number(value.get('value'))}</strong>", interval(value)]
    numbers += [number(value.get(baseline)) for baseline in shown]
    cells += [f"<td class=number>{text}</td>" for text in numbers]
    return f"<tr>{''.join(cells)}<td>{escape(published)}</td></tr>"


def _details(result: Result) -> str:
    """What the rows and labels are, our numbers, and those of others, behind a click."""
    facts = [f"{result['about']}; {result['rule']}."]
    if result["note"]:
        facts.append(f"{result['note']}.")
    if result["seen_prompt_rate"]:
        alone = result["unseen"]
        facts.append(
            f"{result['seen_prompt_rate']:.1%} of the rows have a prompt that the baselines' training rows have too"
            + (f"; without them {result['metric']} is {number(alone['value'])} ({interval(alone)})." if alone else ".")
        )
    rows = "".join(
        f"<tr><td><strong>this model</strong></td><td>{escape(name)}</td>"
        f"<td class=number>{number(value['value'])}</td><td>{interval(value)}</td><td>measured here</td></tr>"
        for name, value in result["values"].items()
    )
    rows += "".join(
        f"<tr><td>{escape(peer['model'])}</td><td>{escape(peer['metric'] or result['metric'])}</td>"
        f"<td class=number>{number(peer['value'])}</td><td>{escape(peer['note'] or '')}</td>"
        f"<td>{escape(_run_by(peer).strip(' ()'))}: {escape(peer['source'])}</td></tr>"
        for peer in result["peers"]
    )
    text = "".join(f'<p class="note">{escape(fact)}</p>' for fact in facts)
    table = f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'
    return f"<details><summary>{escape(result['protocol'])}</summary>{text}{table}</details>"


__all__ = ["FILE", "best_peer", "headline", "protocol_result", "protocols_html", "protocols_table"]
