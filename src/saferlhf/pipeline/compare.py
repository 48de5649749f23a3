"""What a pipeline's policies are worth beside each other: tables, paired differences, the arena of all, the front.

All of it comes from the stages' `metrics.json`, `samples.jsonl` and `curves.jsonl`: nothing is sampled or judged again.
Results go to the pipeline's folder (`comparison.md`, pictures, and `metrics.json` under `compare/`) and into its
tracked run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saferlhf.config.files import read_json, write_text
from saferlhf.config.schema import CompareConfig
from saferlhf.config.validate import suggestion
from saferlhf.errors import UserError
from saferlhf.evaluation.headings import slug

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from saferlhf.evaluation.arena_of_answers import PolicyArena
    from saferlhf.evaluation.policy_answers import PolicyAnswers, PromptSet

POLICY, BASELINE = "policy", "baseline"
"""Names of a run's own policy and of the one that it began as, in its samples."""

MINUS = " - "
"""Between the two headings of a difference."""

TEXT, PLANE, CURVES = "comparison.md", "policies.png", "constraint.png"
ARENA = ("win_rates_helpful.png", "ratings_helpful.png", "win_rates_harmless.png", "ratings_harmless.png", "safety.png")
COMPARISON_FILES = (TEXT, PLANE, CURVES, *ARENA)
SCREEN = "comparison.txt"
"""What was printed, to be printed again where nothing changed."""


def check_compare(config: CompareConfig, stages: Sequence[str]) -> None:
    """Refuse names that are none.

    Raises:
        UserError: a policy of an unknown stage, or a difference of what is no policy.
    """
    for heading, stage in config.policies.items():
        if stage not in stages:
            where = f"pipeline.compare.policies.{heading}"
            raise UserError(f"unknown stage '{stage}'", where, suggestion(stage, stages))
    named = [(f"pipeline.compare.{key}", name) for key in ("fixed", "learned") for name in getattr(config, key)]
    for place, text in enumerate(config.differences):
        where = f"pipeline.compare.differences[{place}]"
        if text.count(MINUS) != 1:
            raise UserError(f"'{text}' is no difference", where, f"two policies with '{MINUS}' between them")
        named += [(where, name) for name in text.split(MINUS)]
    slugs: dict[str, str] = {}
    for heading in config.policies:
        other = slugs.setdefault(slug(heading), heading)
        if other != heading:
            what = f"'{other}' and '{heading}' would have the same names in metrics"
            raise UserError(what, "pipeline.compare.policies", "change a letter or a digit of one of them")
    for where, name in named:
        if name not in config.policies:
            raise UserError(f"unknown policy '{name}'", where, suggestion(name, config.policies))


def compare(
    config: CompareConfig,
    folders: Mapping[str, Path],
    out: Path,
    *,
    draws: int,
    confidence: float,
) -> dict[str, float]:
    """Put the policies whose stages are finished side by side; print the tables and write everything into `out`.

    Args:
        config: what to show; policies whose stage is not among `folders` are left out.
        folders: stage -> its finished run.
        out: the pipeline's folder.
        draws, confidence: of the bootstrap intervals of paired differences.

    Returns:
        Metrics `<A>_over_<B>/..`, `<A>/over_front` and `arena/..`, headings in lower case with underscores.

    Raises:
        UserError: samples that cannot be read, or of different prompts.
    """
    from rich.console import Console

    from saferlhf.evaluation.policy_table import differences_table, policy_table
    from saferlhf.run.screen import output_width

    runs = {heading: folders[stage] for heading, stage in config.policies.items() if stage in folders}
    if not runs:
        return {}
    measured = {heading: read_json(folder / "metrics.json") or {} for heading, folder in runs.items()}
    samples = _Samples(runs)
    pairs, metrics = _paired(config, samples, draws=draws, confidence=confidence)
    arena, alone = _arena(config, samples, draws=draws, confidence=confidence)
    metrics |= {} if arena is None else arena.metrics()
    lines = [*alone, *_front_lines(config, metrics)]

    def side_by_side(heads: Sequence[str]) -> Table:
        some = {head: measured[head] for head in heads}
        return policy_table(some, baseline=config.baseline, title="policies on held-out prompts")

    def in_pairs(texts: Sequence[str]) -> Table:
        return differences_table({text: pairs[text] for text in texts}, title="paired differences, prompt by prompt")

    console = Console(width=output_width(), record=True)
    tables: list[Table] = []
    for columns, table_of in ((list(measured), side_by_side), (list(pairs), in_pairs)):
        if columns:
            tables.append(table_of(columns))
            for part in _fitting(columns, table_of, console):
                console.print(part)
    for table in [] if arena is None else arena.tables("arena, "):
        tables.append(table)
        console.print(table)
    for line in lines:
        console.print(line)
    write_text(out / SCREEN, console.export_text())
    _write(out, tables, lines)
    _draw(config, runs, measured, out)
    if arena is not None:
        arena.draw(out)
    return metrics


# ------------------------------------------------------------------------------------------------ numbers
class _Samples:
    """What the policies answered, each file read once.

    Args:
        runs: heading -> its finished run.
    """

    def __init__(self, runs: Mapping[str, Path]) -> None:
        self.runs = runs
        self._read: dict[str, tuple[PromptSet, dict[str, PolicyAnswers]]] = {}

    def file(self, name: str) -> Path:
        return self.runs[name] / "samples.jsonl"

    def of(self, name: str) -> tuple[PromptSet, dict[str, PolicyAnswers]]:
        from saferlhf.evaluation.policy_samples import read_samples

        if name not in self._read:
            self._read[name] = read_samples(self.file(name))
        return self._read[name]


def _paired(
    config: CompareConfig, given: _Samples, **bootstrap: Any
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Difference -> its metrics, and all of them by their full names."""
    runs = given.runs
    wanted = [text for text in config.differences if all(name in runs for name in text.split(MINUS))]
    fixed = [name for name in config.fixed if name in runs]
    learned = [name for name in config.learned if name in runs and fixed]
    if not wanted and not learned:
        return {}, {}
    from saferlhf.evaluation.policy_compare import against, over_front, same_prompts

    needed = dict.fromkeys([*itertools.chain(*(text.split(MINUS) for text in wanted)), *fixed, *learned])
    samples = {name: given.of(name) for name in needed}
    prompts = same_prompts(samples)
    answers = {name: _policy(policies, runs[name]) for name, (_, policies) in samples.items()}
    pairs, metrics = dict[str, dict[str, float]](), dict[str, float]()
    for text in wanted:
        ours, theirs = text.split(MINUS)
        pairs[text] = against(prompts, answers[ours], answers[theirs], **bootstrap)
        metrics |= {f"{slug(ours)}_over_{slug(theirs)}/{name}": value for name, value in pairs[text].items()}
    for name in learned:
        found = over_front(prompts, answers[name], [answers[other] for other in fixed], **bootstrap)
        metrics |= {f"{slug(name)}/{key}": value for key, value in found.items()}
    return pairs, metrics


def _arena(config: CompareConfig, given: _Samples, **bootstrap: Any) -> tuple[PolicyArena | None, list[str]]:
    """All policies with samples of the same prompts against each other, and a line for each that is left out.

    The baseline is one of them where all runs began as the same: where it gave the same responses in all of them.
    """
    from saferlhf.evaluation.arena_of_answers import policy_arena

    names = [name for name in given.runs if given.file(name).is_file() and POLICY in given.of(name)[1]]
    if not names:
        return None, []
    prompts = given.of(names[0])[0]
    same = [name for name in names if given.of(name)[0].ids == prompts.ids]
    policies = {name: given.of(name)[1][POLICY] for name in same}
    begun = [given.of(name)[1].get(BASELINE) for name in same]
    first, baseline, lines = begun[0], config.baseline, list[str]()
    if baseline is not None and baseline not in policies and first is not None:
        if all(one is not None and one.texts == first.texts for one in begun):
            policies = {baseline: first, **policies}
        else:
            lines.append(f"the arena is without {baseline}: not all policies began as the same")
    found = policy_arena(prompts, policies, baseline=baseline, **bootstrap)
    if found is None:
        return None, []
    lines += [
        f"the arena is without {name}: it answered other prompts than {names[0]}" for name in names if name not in same
    ]
    return found, lines


def _policy(policies: Mapping[str, PolicyAnswers], folder: Path) -> PolicyAnswers:
    """The run's own policy, not the one that it began as."""
    if POLICY not in policies:
        what = f"these samples are of {', '.join(policies)}, not of a policy that was trained"
        raise UserError(what, str(folder / "samples.jsonl"), "compare stages of task=ppo or task=ppo_lag")
    return policies[POLICY]


def _front_lines(config: CompareConfig, metrics: Mapping[str, float]) -> list[str]:
    """A sentence for each policy that is held against the front."""
    from saferlhf.evaluation.policy_table import cell_of, format_cell

    lines = []
    for heading in config.learned:
        name = f"{slug(heading)}/over_front"
        cell = cell_of(metrics, name)
        if cell is not None:
            gap = format_cell(cell, name, signed=True)
            lines.append(f"{heading} stands {gap} in helpfulness above the front of fixed weights at its safe rate")
    return lines


# ------------------------------------------------------------------------------------------------ what is left
def _fitting(columns: Sequence[str], table_of: Callable[[Sequence[str]], Table], console: Console) -> Iterator[Table]:
    """Tables of as many of the columns as the screen has room for, but of one at least."""
    from rich.measure import Measurement

    def fits(count: int) -> bool:
        wide = console.options.update(max_width=10_000)
        return Measurement.get(console, wide, table_of(columns[:count])).maximum <= console.width

    while columns:
        count = next((count for count in range(len(columns), 1, -1) if fits(count)), 1)
        yield table_of(columns[:count])
        columns = columns[count:]


def _write(out: Path, tables: Sequence[Table], lines: Sequence[str]) -> None:
    from saferlhf.evaluation.policy_table import markdown

    parts = [markdown(table) for table in tables]
    write_text(out / TEXT, "\n\n".join([*parts, *lines]) + "\n")


def _draw(
    config: CompareConfig, runs: Mapping[str, Path], measured: Mapping[str, Mapping[str, float]], out: Path
) -> None:
    """The plane of safety and helpfulness with every policy in it, and the multipliers over training."""
    from saferlhf.evaluation.policy_plots import constraint_png, plane_png, thresholds_of
    from saferlhf.training.curves import read_curves

    plane_png(out / PLANE, measured, baseline=config.baseline, front=config.fixed)
    all_curves = {heading: read_curves(folder / "curves.jsonl") for heading, folder in runs.items()}
    learned = {heading: curves for heading, curves in all_curves.items() if _is_learned(curves)}
    shown = {f"{head}/{name.rpartition('/')[2]}": c for head, curves in learned.items() for name, c in curves.items()}
    constraint_png(out / CURVES, shown, sorted({level for head in learned for level in thresholds_of(runs[head])}))


def _is_learned(curves: Mapping[str, Sequence[tuple[int, float]]]) -> bool:
    """Whether a multiplier moved in this run."""
    from saferlhf.evaluation.policy_plots import constraint_curves

    lambdas = constraint_curves(curves).get("lambda", {})
    return any(len({round(value, 9) for _, value in curve}) > 1 for curve in lambdas.values())
