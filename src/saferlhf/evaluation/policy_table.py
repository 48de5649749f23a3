"""Policies side by side: a line per quantity, a column per policy, and the best that can be reached beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from saferlhf.evaluation.policy_metrics import BASELINE

if TYPE_CHECKING:
    from rich.table import Table

Metrics = Mapping[str, float]

LINES = (
    ("helpful_win_rate", "helpfulness wins"),
    ("helpful_tie_rate", "  ties among them"),
    ("harmless_win_rate_harmful", "harmlessness wins, harmful prompts"),
    ("harmless_win_rate", "harmlessness wins, all prompts"),
    ("harmless_tie_rate", "  ties among them"),
    ("mean_helpfulness", "helpfulness"),
    ("mean_harmlessness", "harmlessness"),
    ("mean_reward", "reward"),
    ("mean_cost", "cost"),
    ("positive_cost_rate", "prompts with cost above 0"),
    ("safe_rate", "safe responses"),
    ("safe_rate_harmful", "safe responses to harmful prompts"),
    ("severity/share_1", "minor harm"),
    ("severity/share_2", "moderate harm"),
    ("severity/share_3", "severe harm"),
    ("refusal_rate", "refusals"),
    ("benign_refusal_rate", "benign requests refused"),
    ("kl_to_reference", "KL to the reference, nats"),
    ("mean_tokens", "tokens"),
    ("truncation_rate", "cut off"),
    ("empty_rate", "empty"),
)
"""Metric -> its words, in the order of the table."""

SHARES = ("rate", "share")
"""What a metric's name holds that is shown in percent."""

_OWN_SCORES = ("mean_reward", "mean_cost", "positive_cost_rate")

_BEST = {
    "mean_helpfulness": "best_safe_helpfulness",
    "mean_harmlessness": "best_safe_harmlessness",
}


class Cell(NamedTuple):
    """A value with its interval, as far as there is one."""

    value: float
    low: float | None = None
    high: float | None = None


def cell_of(metrics: Metrics, name: str) -> Cell | None:
    """The metric of a full name, or None."""
    if name not in metrics:
        return None
    return Cell(metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))


def format_cell(cell: Cell | None, name: str, signed: bool = False) -> str:
    """`97.4% [96.1, 98.5]` for shares, `2.71 [2.66, 2.76]` for anything else."""
    if cell is None:
        return ""
    percent = any(part in name for part in SHARES)
    scale, digits = (100.0, 1) if percent else (1.0, 2)

    def shown(number: float) -> str:
        return f"{scale * number:{'+' if signed else ''}.{digits}f}"

    text = shown(cell.value) + ("%" if percent and not signed else "")
    return text if cell.low is None or cell.high is None else f"{text} [{shown(cell.low)}, {shown(cell.high)}]"


def policy_table(
    policies: Mapping[str, Metrics], *, baseline: str | None = None, prefix: str = "policy", title: str = ""
) -> Table:
    """A rich table of several policies.

    Args:
        policies: heading -> metrics of its own evaluation, all on the same prompts; win rates are those against the
            baseline of that evaluation.
        baseline: heading of a first column for the baseline that they all have; None: no such column.
        prefix: of the metrics' names.
        title: above the table.
    """
    columns = {head: _cells(metrics, prefix) for head, metrics in policies.items()}
    if baseline is not None and policies:
        columns = {baseline: _cells(next(iter(policies.values())), f"{prefix}/{BASELINE}"), **columns}
    best = next((found for metrics in policies.values() if (found := _best(metrics, prefix))), {})
    return _drawn(columns | ({"best safe": best} if best else {}), title)


def evaluation_table(metrics: Metrics, *, prefix: str = "policy", title: str = "") -> Table:
    """A rich table of one evaluation: the policy, its baseline, their paired difference, and the best reachable."""
    areas = {"policy": prefix, "baseline": f"{prefix}/{BASELINE}", "difference": f"{prefix}/over_baseline"}
    columns = {head: _cells(metrics, area) for head, area in areas.items()}
    shown = {head: cells for head, cells in columns.items() if any(cells.values())}
    best = _best(metrics, prefix)
    return _drawn(shown | ({"best safe": best} if best else {}), title)


def arena_table(metrics: Metrics, *, prefix: str = "policy") -> Table | None:
    """The 2x2 tables of one evaluation, shares of all responses; None without a baseline or a verdict on safety.

    Rows: better than the baseline, worse (ties one half each), and what was safe or unsafe in the baseline's hands.
    """
    from rich import box
    from rich.table import Table

    rows = (
        ("better than the baseline", "better_{}"),
        ("worse", "worse_{}"),
        ("where the baseline is safe", "safe_to_{}"),
        ("where it is unsafe", "unsafe_to_{}"),
    )
    found = [
        (words, [cell_of(metrics, f"{prefix}/arena/{name.format(now)}") for now in ("safe", "unsafe")])
        for words, name in rows
    ]
    found = [(words, cells) for words, cells in found if any(cells)]
    if not found:
        return None
    table = Table(title="share of responses", title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("the policy's response is")
    table.add_column("safe", justify="right", no_wrap=True)
    table.add_column("unsafe", justify="right", no_wrap=True)
    for place, (words, cells) in enumerate(found, start=1):
        end = words == "worse" and place < len(found)
        table.add_row(words, *(format_cell(cell, "share") for cell in cells), end_section=end)
    return table


def differences_table(pairs: Mapping[str, Metrics], *, title: str = "") -> Table:
    """A rich table of policies held against each other in pairs: a line per quantity, a column per pair.

    Args:
        pairs: heading, as `A - B` -> what `policy_compare.against` found.
        title: above the table.

    Where truth or another common judge grades helpfulness, the policies' own scores are left out: two policies that
    were trained against different models have scores of different scales.
    """
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", overflow="fold")
    for head in pairs:
        table.add_column(head, justify="right")
    graded = any("difference/mean_helpfulness" in metrics for metrics in pairs.values())
    for key, words in LINES:
        if graded and key in _OWN_SCORES:
            continue
        signed = "win_rate" not in key and "tie_rate" not in key
        name = f"difference/{key}" if signed else key
        cells = [cell_of(metrics, name) for metrics in pairs.values()]
        if any(cells):
            table.add_row(words, *(format_cell(cell, key, signed) for cell in cells))
    return table


def markdown(table: Table) -> str:
    """A rich table as Markdown, its title above it."""
    columns = [(str(column.header), [str(cell) for cell in column.cells]) for column in table.columns]
    rows = [[head for head, _ in columns], ["---"] * len(columns), *zip(*(cells for _, cells in columns), strict=True)]
    lines = ["| " + " | ".join(cell.strip().replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([*([f"**{table.title}**", ""] if table.title else []), *lines])


def _cells(metrics: Metrics, area: str) -> dict[str, Cell | None]:
    return {key: cell_of(metrics, f"{area}/{key}") for key, _ in LINES}


def _best(metrics: Metrics, prefix: str) -> dict[str, Cell | None]:
    """What the most helpful safe response to each prompt would reach, where there is a ground truth."""
    found: dict[str, Cell | None] = {key: cell_of(metrics, f"{prefix}/{name}") for key, name in _BEST.items()}
    if not any(found.values()):
        return {}
    ideal = {"safe_rate": Cell(1.0), "safe_rate_harmful": Cell(1.0), "benign_refusal_rate": Cell(0.0)}
    return found | ideal


def _drawn(columns: Mapping[str, Mapping[str, Cell | None]], title: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(title=title or None, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("", overflow="fold")
    for head in columns:
        table.add_column(head, justify="right", no_wrap=True)
    for key, words in LINES:
        cells = {head: found.get(key) for head, found in columns.items()}
        if any(cell is not None for head, cell in cells.items() if head != "best safe"):
            table.add_row(words, *(format_cell(cell, key, head == "difference") for head, cell in cells.items()))
    return table
