"""Grids: tables of the docs that put the parts of one pipeline side by side, a line for each part.

An entry of `results.yaml` with `lines` is a grid: heading of a line -> prefix in the pipeline's `metrics.json`, and
`columns`: heading -> metric below that prefix. `run` is the pipeline's folder; its seed is that of its first stage.
Several seeds stand below each other in a cell.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class Grid:
    """One grid of one page.

    Attributes:
        name: of the entry and of the marks in the page.
        page: file of the docs.
        command: what runs the pipeline with one seed; holds {seed}.
        seeds: runs that are shown.
        run: folder of the pipeline's runs below the output root.
        lines: heading -> prefix of its metrics.
        columns: heading -> metric below a line's prefix.
    """

    name: str
    page: str
    command: str
    seeds: tuple[int, ...]
    run: str
    lines: Mapping[str, str]
    columns: Mapping[str, str]


def find_pipeline(grid: Grid, seed: int, outputs: Path) -> dict[str, float] | None:
    """Metrics of the newest finished run of the pipeline with that seed; None where there is none."""
    found = []
    for status_file in (outputs / grid.run).glob("*/status.json"):
        status = json.loads(status_file.read_text())
        if status.get("status") == "finished" and _seed(status, outputs) == seed:
            found.append((status.get("updated", 0.0), status_file.parent))
    if not found:
        return None
    metrics: dict[str, float] = json.loads((max(found)[1] / "metrics.json").read_text())
    return metrics


def _seed(status: Mapping[str, Any], outputs: Path) -> Any:
    first = Path(next(iter(status.get("stages", {}).values()), "none"))
    config = outputs / first.parent.name / first.name / "config.yaml"
    return yaml.safe_load(config.read_text()).get("seed") if config.is_file() else None


def render_grid(grid: Grid, by_seed: Mapping[int, Mapping[str, float]]) -> str:
    """The grid as Markdown, below the command that made it."""
    seeds = ", ".join(map(str, by_seed))
    lines = [f"`{grid.command.replace('{seed}', 'S')}` for S = {seeds}", ""]
    lines += ["| " + " | ".join(["", *grid.columns]) + " |", "|" + " --- |" * (1 + len(grid.columns))]
    for heading, prefix in grid.lines.items():
        cells = [[_cell(found, f"{prefix}/{metric}") for found in by_seed.values()] for metric in grid.columns.values()]
        lines.append("| " + " | ".join([heading, *("<br>".join(cell) for cell in cells)]) + " |")
    return "\n".join(lines)


def _cell(metrics: Mapping[str, float], name: str) -> str:
    if name not in metrics:
        return ""
    value, low, high = metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} ({low:.3f} .. {high:.3f})"


def read_grids(entries: Mapping[str, Mapping[str, Any]]) -> dict[str, Grid]:
    """The grids among the entries of `results.yaml`."""
    return {
        name: Grid(
            name, entry["page"], entry["command"], tuple(entry["seeds"]), entry["run"], entry["lines"], entry["columns"]
        )
        for name, entry in entries.items()
        if "lines" in entry
    }
