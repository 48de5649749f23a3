"""What a comparison of models leaves: tables on the screen, and its files in one folder (`run/compare_models.py`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saferlhf.config.files import write_json, write_text
from saferlhf.run.screen import output_width

if TYPE_CHECKING:
    from rich.table import Table

    from saferlhf.evaluation.arena_of_answers import PolicyArena

COMPARISON, TABLE, REPORT = "comparison.json", "comparison.md", "report.html"
POLICY = "policy"
"""Protocol of samples on the rows of `data=`, and name of a run's own policy in them."""

Models = Mapping[str, Sequence[Path]]
"""Heading -> folders of its evaluations, one for each run."""


def show(
    comparisons: Sequence[Any],
    in_pairs: Mapping[str, Mapping[str, Any]],
    arenas: Mapping[str, PolicyArena],
    notes: Sequence[str],
    confidence: float,
) -> None:
    """Print tables, then the notes."""
    from rich.console import Console
    from rich.text import Text

    from saferlhf.evaluation.comparison_table import comparison_notes, comparison_table
    from saferlhf.evaluation.policy_table import differences_table

    console = Console(width=output_width())
    console.print(comparison_table(comparisons, confidence))
    for name, pairs in in_pairs.items():
        console.print(differences_table(pairs, title=f"{name}: win rates, and differences prompt by prompt"))
    for table in _arena_tables(arenas):
        console.print(table)
    for note in [*notes, *comparison_notes(comparisons, confidence)]:
        console.print(Text(note, style="dim"))


def _arena_tables(arenas: Mapping[str, PolicyArena]) -> list[Table]:
    return [table for name, arena in arenas.items() for table in arena.tables(f"{name}: arena, ")]


def write(
    out: Path,
    models: Models,
    comparisons: Sequence[Any],
    arenas: Mapping[str, PolicyArena],
    metrics: Mapping[str, float],
    notes: Sequence[str],
    options: Mapping[str, Any],
    config: Mapping[str, Any] | None,
) -> None:
    """Write everything into `out`."""
    from saferlhf.evaluation.comparison_plots import DOTS, FOREST, dots_png, figures_html, forest_png
    from saferlhf.evaluation.comparison_table import comparison_html, comparison_markdown
    from saferlhf.evaluation.policy_table import markdown
    from saferlhf.evaluation.report import write_report

    confidence = options["confidence"]
    sources = {heading: [str(folder) for folder in folders] for heading, folders in models.items()}
    text = comparison_markdown(comparisons, confidence) + "".join(f"- {note}\n" for note in notes)
    write_text(out / TABLE, text + "".join(f"\n{markdown(table)}\n" for table in _arena_tables(arenas)))
    forest_png(out / FOREST, comparisons, confidence)
    dots_png(out / DOTS, comparisons, confidence)
    for name, arena in arenas.items():
        arena.draw(out, "" if name == POLICY else f"_{name}")
    write_report(
        out / REPORT,
        title=f"{', '.join(models)} beside each other",
        subtitle=f"{len(comparisons)} protocols, paired by row",
        metrics=metrics,
        config=config or {"models": sources, **options},
        sections=[
            comparison_html(comparisons, confidence),
            figures_html(comparisons, confidence),
            *(arena.html(f"Arena: {name}") for name, arena in arenas.items()),
        ],
        lineage=sources,
        confidence=confidence,
    )
    content = {"models": sources, **options, "notes": list(notes), "protocols": [_plain(c) for c in comparisons]}
    write_json(out / COMPARISON, content)
    write_json(out / "metrics.json", dict(metrics))


def _plain(value: Any) -> Any:
    """Dataclasses, tuples and mappings as JSON has them; what is not a number is null."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: _plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if hasattr(value, "_asdict"):
        return {name: _plain(part) for name, part in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
