"""Result tables of the docs: run the commands of `results.yaml`, and write what they measured into the pages.

    python benchmarks/results.py run toy            trains what is not trained yet (finished runs are found by identity)
    python benchmarks/results.py write toy          fills the tables; without a name all that have finished runs

An entry of `results.yaml` names a page, the command (with {seed}), the seeds, the folder of the runs and the metrics.
In the page the table stands between `<!-- results: NAME -->` and `<!-- end -->`; everything between is replaced. Seeds
are columns, each value with its 95% interval over rows; the last column is the mean over seeds and, from three seeds
on, the standard deviation between them. Entries with `lines` put the parts of a pipeline side by side (`grids.py`).
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from grids import Grid, find_pipeline, read_grids, render_grid

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Table:
    """One table of one page.

    Attributes:
        name: of the entry and of the marks in the page.
        page: file of the docs.
        command: what trains one seed; holds {seed}.
        seeds: columns.
        run: folder of the runs below the output root; its runs are told apart by their seed.
        where: further config keys a run must have, dotted, as {data.name: pku_saferlhf}.
        metrics: rows, names of metrics.json.
    """

    name: str
    page: str
    command: str
    seeds: tuple[int, ...]
    run: str
    metrics: tuple[str, ...]
    where: Mapping[str, Any]


def read_tables(file: Path) -> dict[str, Table | Grid]:
    """The entries of `results.yaml`, by name."""
    entries = yaml.safe_load(file.read_text())
    tables: dict[str, Table | Grid] = {
        name: Table(
            name=name,
            page=entry["page"],
            command=entry["command"],
            seeds=tuple(entry["seeds"]),
            run=entry["run"],
            metrics=tuple(entry["metrics"]),
            where=entry.get("where", {}),
        )
        for name, entry in entries.items()
        if "lines" not in entry
    }
    return tables | read_grids(entries)


def find_run(table: Table, seed: int, outputs: Path) -> dict[str, float] | None:
    """Metrics of the newest finished run of that seed; None where there is none."""
    found = []
    for status_file in (outputs / table.run).glob("*/status.json"):
        status = json.loads(status_file.read_text())
        config = yaml.safe_load((status_file.parent / "config.yaml").read_text())
        wanted = {"seed": seed, **table.where}
        if status.get("status") == "finished" and all(lookup(config, key) == value for key, value in wanted.items()):
            found.append((status.get("finished", 0.0), status_file.parent))
    if not found:
        return None
    metrics: dict[str, float] = json.loads((max(found)[1] / "metrics.json").read_text())
    return metrics


def lookup(config: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def render(table: Table, by_seed: Mapping[int, Mapping[str, float]]) -> str:
    """The table as Markdown, below the command that made it."""
    seeds = list(by_seed)
    head = ["metric", *(f"seed {seed}" for seed in seeds), *(["mean"] if len(seeds) > 1 else [])]
    lines = [f"`{table.command.replace('{seed}', 'S')}` for S = {', '.join(map(str, seeds))}", ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for metric in table.metrics:
        values = [by_seed[seed].get(metric) for seed in seeds]
        if all(value is None for value in values):
            continue
        cells = [cell(by_seed[seed], metric) for seed in seeds]
        known = [value for value in values if value is not None]
        if len(seeds) > 1:
            spread = f" ± {statistics.stdev(known):.4f}" if len(known) > 2 else ""
            cells.append(f"**{number(statistics.fmean(known))}**{spread}")
        lines.append("| `" + metric + "` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(metrics: Mapping[str, float], metric: str) -> str:
    """A value, with its interval where there is one."""
    value = metrics.get(metric)
    if value is None:
        return ""
    low, high = metrics.get(f"{metric}_low"), metrics.get(f"{metric}_high")
    return number(value) if low is None or high is None else f"{number(value)} ({low:.3f} .. {high:.3f})"


def number(value: float) -> str:
    """Four digits after the point, or none for counts and seconds."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.4f}"


def replace_block(text: str, name: str, body: str) -> str:
    """The page with the block of that name replaced.

    Raises:
        ValueError: the page has no such marks.
    """
    pattern = re.compile(rf"(<!-- results: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    new, count = pattern.subn(lambda match: f"{match[1]}{body}\n{match[2]}", text)
    if count != 1:
        raise ValueError(f"{count} blocks '<!-- results: {name} -->' .. '<!-- end -->', one is needed")
    return new


def write(tables: Sequence[Table | Grid], outputs: Path) -> bool:
    """Fill the tables of which all seeds are finished; says what is missing of the others."""
    complete = True
    for table in tables:
        find = find_pipeline if isinstance(table, Grid) else find_run
        found = {seed: find(table, seed, outputs) for seed in table.seeds}  # type: ignore[arg-type]
        missing = [seed for seed, metrics in found.items() if metrics is None]
        if missing:
            complete = False
            print(f"{table.name}: no finished run of seed {', '.join(map(str, missing))} in {outputs / table.run}")
            continue
        page = ROOT / table.page
        known = {seed: metrics for seed, metrics in found.items() if metrics}
        body = render_grid(table, known) if isinstance(table, Grid) else render(table, known)
        page.write_text(replace_block(page.read_text(), table.name, body))
        print(f"{table.name}: written to {table.page}")
    return complete


def run(tables: Sequence[Table | Grid], outputs: Path) -> None:
    """Run each command once for every seed; finished runs answer at once."""
    commands = dict.fromkeys(table.command.format(seed=seed) for table in tables for seed in table.seeds)
    for command in commands:
        words = shlex.split(command)
        words[0] = sys.executable if words[0] == "python" else words[0]
        print(f"$ {command}", flush=True)
        subprocess.run([*words, f"output_root={outputs}"], cwd=ROOT, check=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("run", "write"))
    parser.add_argument("names", nargs="*", help="entries of results.yaml, or how they begin; all without")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="where the run folders lie")
    arguments = parser.parse_args()
    tables = read_tables(Path(__file__).with_name("results.yaml"))
    chosen = [
        table
        for name, table in tables.items()
        if not arguments.names or any(name.startswith(begin) for begin in arguments.names)
    ]
    if not chosen:
        parser.error(f"no entry begins with {', '.join(arguments.names)}; there are {', '.join(tables)}")
    if arguments.action == "run":
        run(chosen, arguments.outputs)
        return 0
    return 0 if write(chosen, arguments.outputs) else 1


if __name__ == "__main__":
    sys.exit(main())
