"""What a sweep found: a table of its runs, the best of them, and the files in the sweep's folder.

`sweep.json` for programs, `sweep.md` for people, `sweep.png` where one or two keys with numbers were swept. An
objective is shown with its interval where `metrics.json` has one: the best of many runs is in part the luckiest (the
maximum of noisy numbers is biased upwards), so runs whose intervals overlap the best one's are not told apart by this
sweep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saferlhf.config.files import write_json, write_text
from saferlhf.config.run_folder import FINISHED
from saferlhf.config.sweep_schema import SweepConfig
from saferlhf.config.validate import suggestion
from saferlhf.errors import UserError
from saferlhf.sweep.child import Child
from saferlhf.sweep.space import Space, shortened

JSON, MARKDOWN, PICTURE = "sweep.json", "sweep.md", "sweep.png"


@dataclass(frozen=True)
class SweepReport:
    """All runs of a sweep, in order.

    Attributes:
        config: the sweep's.
        space: what was swept.
        children: its runs.
    """

    config: SweepConfig
    space: Space
    children: tuple[Child, ...]

    @property
    def best(self) -> Child | None:
        """The finished run whose objective is the best; the first of equal ones."""
        return best_child(self.children, self.config)

    def bad(self) -> list[Child]:
        """Runs that are not finished."""
        return [child for child in self.children if child.status != FINISHED]

    def to_dict(self) -> dict[str, Any]:
        """The content of `sweep.json`."""
        objective, best = self.config.objective, self.best
        return {
            "kind": self.config.name,
            "objective": objective,
            "direction": self.config.direction,
            "fixed": list(self.space.fixed),
            "swept": [dimension.name for dimension in self.space.dimensions],
            "runs": [child.to_dict(objective) for child in self.children],
            "best": None if best is None else best.to_dict(objective),
        }

    def write(self, folder: Path) -> list[Path]:
        """Write the files; their paths."""
        write_json(folder / JSON, self.to_dict())
        write_text(folder / MARKDOWN, self.markdown())
        files = [folder / JSON, folder / MARKDOWN]
        if self._draw(folder / PICTURE):
            files.append(folder / PICTURE)
        return files

    def markdown(self) -> str:
        """The table as a page."""
        head, rows = self._head(), [self._row(child) for child in self.children]
        lines = ["# Sweep", "", f"Fixed: `{' '.join(self.space.fixed)}`", ""]
        if (best := self.best) is not None:
            lines += [f"{self._best_line(best)}", ""]
        lines += [_md_row(head), _md_row(["---"] * len(head)), *map(_md_row, rows)]
        return "\n".join([*lines, ""])

    def print(self) -> None:
        """The table and the best run, on the output stream."""
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        from saferlhf.run.screen import output_width

        table = Table(title=self._title(), title_justify="left")
        for column in self._head():
            table.add_column(
                Text(column), justify="left" if column in ("status", "folder") else "right", overflow="fold"
            )
        best = self.best
        for child in self.children:
            table.add_row(*map(Text, self._row(child)), style="bold" if child is best else "")
        width = output_width()
        Console(width=None if width is None else max(width, 160)).print(table)
        if best is not None:
            print(self._best_line(best))

    # -------------------------------------------------------------------------------------------- inside
    def _title(self) -> str:
        done = sum(child.status == FINISHED for child in self.children)
        return f"sweep: {done} of {len(self.children)} runs finished"

    def _head(self) -> list[str]:
        keys = [dimension.name for dimension in self.space.dimensions]
        ends = [key.rpartition(".")[2] for key in keys]
        short = [end if ends.count(end) == 1 else key for key, end in zip(keys, ends, strict=True)]
        objective = [self.config.objective, "interval"] if self.config.objective else []
        return ["run", *short, *objective, "status", "folder"]

    def _row(self, child: Child) -> list[str]:
        values = [shortened(child.values[dimension.name]) for dimension in self.space.dimensions]
        folder = "" if child.run is None else str(child.folder.path)
        return [str(child.number), *values, *self._objective(child), child.status, folder]

    def _objective(self, child: Child) -> list[str]:
        if self.config.objective is None:
            return []
        value = child.objective(self.config.objective)
        return ["" if value is None else f"{value:.4g}", _interval(child, self.config.objective)]

    def _best_line(self, best: Child) -> str:
        interval = _interval(best, str(self.config.objective))
        number = f"{self.config.objective} = {best.objective(self.config.objective):.4g}"
        return f"best: {best.name}, {number}{f' {interval}' if interval else ''}, {best.folder.path}"

    def _draw(self, path: Path) -> bool:
        if self.config.objective is None or sum(child.finished for child in self.children) < 2:
            return False
        from saferlhf.sweep.picture import draw_sweep

        return draw_sweep(path, self.space, self.children, self.config.objective)


def best_child(children: Sequence[Child], config: SweepConfig) -> Child | None:
    """The finished run whose objective is the best; the first of equal ones, None without an objective."""
    found = [(value, child) for child in children if (value := child.objective(config.objective)) is not None]
    if not found:
        return None
    sign = 1 if config.direction == "maximize" else -1
    return max(found, key=lambda pair: sign * pair[0])[1]


def check_objective(child: Child, config: SweepConfig) -> None:
    """A finished run must have the objective among its metrics.

    Raises:
        UserError: it has not; says which names are near.
    """
    metrics = child.metrics()
    if config.objective is None or not child.finished or config.objective in metrics:
        return
    what = f"no metric '{config.objective}' in {child.folder.metrics}"
    raise UserError(what, "sweep.objective", suggestion(config.objective, sorted(metrics)))


def _interval(child: Child, objective: str) -> str:
    metrics = child.metrics()
    low, high = metrics.get(f"{objective}_low"), metrics.get(f"{objective}_high")
    return "" if low is None or high is None else f"[{low:.4g}, {high:.4g}]"


def _md_row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
