"""The arena of policies that were judged already: what their answers are graded by, its numbers, tables and pictures.

Grades are those of win rates (`policy_metrics.py`): helpfulness, else a reward; harmlessness, else minus a cost. The
first judge counts that graded **all** of the policies, so that nobody is measured by a scale of its own. Two judges of
one name in different runs are taken for one: where each policy was judged by another reward model under the name
`reward`, the table compares scales, and the truth or a common judge belongs before them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.evaluation.arena import (
    Arena,
    SafetySides,
    arena_metrics,
    judged_scores,
    measure_arena,
    safety_metrics,
    safety_sides,
    slug,
)
from saferlhf.evaluation.policy_answers import PolicyAnswers, PromptSet
from saferlhf.evaluation.policy_metrics import safe_of
from saferlhf.ops.intervals import CONFIDENCE, DRAWS

if TYPE_CHECKING:
    from rich.table import Table

Floats = NDArray[np.float64]

GRADES = {
    "helpful": (("helpfulness", True), ("reward", True)),
    "harmless": (("harmlessness", True), ("cost", False)),
}
"""What is compared -> outputs that grade it, and whether more is better."""


@dataclass(frozen=True)
class PolicyArena:
    """Policies beside each other, as far as judges graded all of them.

    Attributes:
        arenas: one for helpfulness and one for harmlessness, or fewer.
        judges: dimension -> who graded it, in the order of `arenas`.
        safety: policy -> attack success and over-refusal; empty where nobody judged them.
    """

    arenas: tuple[Arena, ...]
    judges: Mapping[str, str]
    safety: Mapping[str, SafetySides]

    def metrics(self, prefix: str = "arena") -> dict[str, float]:
        """`<prefix>/<helpful|harmless>/..` (`arena_metrics`) and `<prefix>/safety/..` (`safety_metrics`)."""
        flat: dict[str, float] = {}
        for arena in self.arenas:
            flat |= arena_metrics(arena, prefix)
        return flat | safety_metrics(self.safety, f"{prefix}/safety")

    def tables(self, before: str = "") -> list[Table]:
        """Ratings, and the two ways to fail; `before` stands at the head of each title."""
        from saferlhf.evaluation.arena_plots import ratings_table, safety_table

        tables = [ratings_table(arena, f"{before}{self._title(arena)}") for arena in self.arenas]
        if self.safety:
            tables.append(safety_table(self.safety, f"{before}the two ways to fail"))
        return tables

    def _title(self, arena: Arena) -> str:
        more = f", {arena.unscored:,} more without all grades" if arena.unscored else ""
        return f"{arena.dimension} by {self.judges[arena.dimension]}: Elo over {arena.prompts:,} prompts{more}"

    def html(self, heading: str) -> str:
        """Tables and pictures as a section of a report."""
        from saferlhf.evaluation.arena_plots import ratings_svg, safety_svg, win_rates_svg

        drawn = {
            f"{arena.dimension}: {what}": svg(arena)
            for arena in self.arenas
            for what, svg in (("win rates", win_rates_svg), ("ratings", ratings_svg))
        }
        if (plane := safety_svg(self.safety)) is not None:
            drawn["attack success and over-refusal"] = plane
        figures = "".join(
            f"<figure><figcaption>{escape(name)}</figcaption>{svg}</figure>" for name, svg in drawn.items()
        )
        tables = "".join(_table_html(table) for table in self.tables())
        pictures = f'<div class="figures">{figures}</div>' if figures else ""
        return f"<section><h2>{escape(heading)}</h2>{tables}{pictures}</section>"

    def draw(self, folder: Path, ending: str = "") -> list[Path]:
        """Write `win_rates_<dimension>.png`, `ratings_<dimension>.png` and `safety.png`; returns those that there are.

        Args:
            folder: where to.
            ending: stands before the dot.
        """
        from saferlhf.evaluation.arena_plots import ratings_png, safety_png, win_rates_png

        written = []
        for arena in self.arenas:
            for kind, png in (("win_rates", win_rates_png), ("ratings", ratings_png)):
                written.append(folder / f"{kind}_{arena.dimension}{ending}.png")
                png(written[-1], arena)
        plane = folder / f"safety{ending}.png"
        return [*written, plane] if safety_png(plane, self.safety) else written


def _table_html(table: Table) -> str:
    """A rich table as one of a page; its first column is words, the others are numbers."""
    columns = [[str(column.header), *(str(cell) for cell in column.cells)] for column in table.columns]
    kinds = ["", *[" class=number"] * (len(columns) - 1)]
    head, *rows = (
        [(kind, escape(cell)) for kind, cell in zip(kinds, line, strict=True)] for line in zip(*columns, strict=True)
    )
    top = "".join(f"<th{kind}>{cell}</th>" for kind, cell in head)
    body = "".join(f"<tr>{''.join(f'<td{kind}>{cell}</td>' for kind, cell in row)}</tr>" for row in rows)
    title = f'<p class="note">{escape(str(table.title))}</p>' if table.title else ""
    return f'{title}<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def policy_arena(
    prompts: PromptSet,
    policies: Mapping[str, PolicyAnswers],
    *,
    baseline: str | None = None,
    draws: int = DRAWS,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> PolicyArena | None:
    """All pairs of policies, by whoever graded all of them.

    Args:
        prompts: n prompts that all policies answered.
        policies: heading -> answers.
        baseline: heading that ratings are measured from; one that is not among the policies is none.
        draws, confidence, seed: of the bootstrap and the permutation tests.

    Returns:
        None for fewer than two policies, headings that are one in metrics' names, or nothing that all were judged on.
    """
    if len({slug(name) for name in policies}) < max(2, len(policies)):
        return None
    options: dict[str, Any] = {"draws": draws, "confidence": confidence, "seed": seed}
    anchor = baseline if baseline in policies else None
    arenas, judges = [], dict[str, str]()
    for dimension in GRADES:
        found = _graded(policies, dimension)
        if found is not None:
            judges[dimension], scores, more = found
            arenas.append(
                measure_arena(
                    scores, prompts.texts, dimension=dimension, higher_is_better=more, baseline=anchor, **options
                )
            )
    safety = _safety(prompts, policies, options)
    return PolicyArena(tuple(arenas), judges, safety) if arenas or safety else None


def _graded(policies: Mapping[str, PolicyAnswers], dimension: str) -> tuple[str, dict[str, Floats], bool] | None:
    """(judge, policy -> (n, k) grades, more is better) of the first judge that graded all, on one prompt at least."""
    for judge in _common(policies):
        for output, more in GRADES[dimension]:
            if all(output in answers.judged[judge].values for answers in policies.values()):
                scores = judged_scores(policies, output, judge)
                if np.isfinite(np.concatenate(list(scores.values()), axis=1)).all(axis=1).any():
                    return judge, scores, more
    return None


def _common(policies: Mapping[str, PolicyAnswers]) -> list[str]:
    """Judges of all policies, in the order of the first one's."""
    first = next(iter(policies.values()))
    return [name for name in first.judged if all(name in answers.judged for answers in policies.values())]


def _safety(
    prompts: PromptSet, policies: Mapping[str, PolicyAnswers], options: Mapping[str, Any]
) -> dict[str, SafetySides]:
    """Both sides of all policies, each by the first judge that tells it of all; nothing where no side counts any."""
    safe, refused = dict[str, Floats](), dict[str, Floats]()
    for judge in _common(policies):
        said = {name: answers.judged[judge] for name, answers in policies.items()}
        flags = {name: found for name, one in said.items() if (found := safe_of(one)) is not None}
        if not safe and len(flags) == len(policies):
            safe = flags
        if not refused and all("is_refusal" in one.values for one in said.values()):
            refused = {name: one.values["is_refusal"] for name, one in said.items()}
    sides = safety_sides(safe, refused, prompts.harmful, prompts.texts, **options)
    return {name: both for name, both in sides.items() if any(side is not None for side in both)}
