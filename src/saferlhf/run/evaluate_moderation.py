"""The measure `moderation`: are verdicts on single answers what people said, and what do baselines reach?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from saferlhf.data.build import build_data
from saferlhf.data.labels import prompts_of
from saferlhf.data.rows import QuestionAnswer, Turn, prompt_text
from saferlhf.evaluation.by_group import group_metrics
from saferlhf.evaluation.common_categories import CommonCategories, common_categories
from saferlhf.evaluation.comparison import baseline_metrics, compare_verdicts
from saferlhf.evaluation.judgements import HEADLINE, of_verdicts
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.evaluation.moderation_plots import moderation_drawings
from saferlhf.evaluation.sheet import MetricSheet
from saferlhf.ops.moderation import ModerationLabels, ModerationLogits, Verdicts
from saferlhf.run.judged_model import JudgedModel
from saferlhf.run.measured import Measured
from saferlhf.run.measurements import Measurement, seen_prompts
from saferlhf.run.row_judge import OutsideJudge, RowJudge, judge_of
from saferlhf.run.row_progress import RowProgress
from saferlhf.run.screen import say

NEEDS = ("is_safe",)


def measure_moderation(asked: Measurement, model: JudgedModel) -> Measured:
    """Judge answers and hold the verdicts against their labels.

    A moderator of prompts is held against prompts, each labelled by all of its answers (`data/labels.py`). Rows that a
    guard or a remote judge gave no verdict on are counted and left out.

    Raises:
        UserError: rows without safety labels, or none.
    """
    config, prefix = asked.config, asked.name
    splits = build_data(config.data, QuestionAnswer, NEEDS)
    rows = asked.rows(splits)
    judge: Any = judge_of(model, config)
    read, marks = _as_judged(asked, judge, rows)
    encoded = judge.encode(read, prefix, splits.report)
    answers = list(encoded.rows)
    unit = "prompts" if judge.prompt_only else "texts" if _texts_alone(asked) else "answers"
    say(f"{prefix}: judging {len(answers):,} {unit} with {model.locator}")
    with RowProgress(f"judging {prefix}", len(answers), config.trainer.progress) as progress:
        logits = judge.logits(encoded, progress, kept=asked.protocol is not None)
    verdicts, parsed = judge.decide(logits), judge.parsed(logits)
    common = common_categories(answers, judge.categories)
    labels, verdicts = common.labels(answers), common.verdicts(verdicts)
    _say_categories(prefix, common)
    stored = _as_stored(rows, answers)
    judgements = of_verdicts(asked.key, stored, labels, verdicts, metric=_metric(asked), parsed=parsed)
    heads: ModerationLogits | None = logits
    metrics: dict[str, float] = {}
    if parsed is not None:  # of a judge that knows no calibration
        metrics, heads = _unparsed(answers, parsed, prefix, asked), None
        marks += [f"{(~parsed).sum():,} rows without a verdict are left out"] * bool((~parsed).any())
        kept = np.flatnonzero(parsed)
        answers, stored = [answers[i] for i in kept], [stored[i] for i in kept]
        labels, verdicts = labels.take(kept), verdicts.take(kept)
    elif common.measured != judge.categories:
        heads = replace(logits, category=None)
    options: dict[str, Any] = {
        "clusters": _clusters(answers),
        "draws": config.evaluation.bootstrap_draws,
        "confidence": config.evaluation.confidence,
        "seed": config.seed,
    }
    ids = [row.id for row in answers]
    metrics |= evaluate_moderation(ids, labels, heads, verdicts, prefix=prefix, **options)
    if asked.protocol is not None and asked.protocol.groups:
        groups = [splits.groups.get(name, "") for name in ids]
        metrics |= group_metrics(groups, asked.protocol.groups, labels.unsafe, verdicts, prefix=prefix, **options)
    train = asked.training_rows(splits, QuestionAnswer, NEEDS)
    if train:
        train = prompts_of(train) if judge.prompt_only else train
        say(f"{prefix}: training baselines on {len(train):,} {'prompts' if judge.prompt_only else 'answers'}")
        learnt = asked.training.baselines(train, prompt_only=judge.prompt_only)
        baselines = learnt.verdicts(common.labels(train), answers, heads=_heads(verdicts))
        metrics |= baseline_metrics(ids, labels, baselines, prefix=prefix, **options)
        over = {"prefix": f"{prefix}/over_tfidf", **options}
        metrics |= compare_verdicts(labels, verdicts, baselines["tfidf"], **over)
        if asked.protocol is not None:
            metrics |= _unseen(seen_prompts(stored, train), labels, verdicts, prefix, options)
    drawings = moderation_drawings(labels, verdicts, heads)
    found = (metrics, splits.report.to_dict(), splits.fingerprint, list(drawings), len(answers), marks)
    return Measured(*found, judgements=judgements)


def _metric(asked: Measurement) -> str:
    return HEADLINE["moderation"] if asked.protocol is None else asked.protocol.metric


# ------------------------------------------------------------------------------------------------ rows
def _as_stored(rows: Sequence[QuestionAnswer], judged: Sequence[QuestionAnswer]) -> list[QuestionAnswer]:
    """The judged rows with the prompts that they have in the data."""
    stored = {row.id: row for row in rows}
    return [stored.get(row.id, row) for row in judged]


def _clusters(rows: Sequence[QuestionAnswer]) -> list[str]:
    return [prompt_text(row.prompt) or row.response for row in rows]


def _unparsed(
    rows: Sequence[QuestionAnswer], parsed: NDArray[np.bool_], prefix: str, asked: Measurement
) -> dict[str, float]:
    """`<prefix>/unparsed_rate`: the share of rows that the judge gave no verdict on."""
    config = asked.config
    sheet = MetricSheet(
        prefix,
        _clusters(rows),
        draws=config.evaluation.bootstrap_draws,
        confidence=config.evaluation.confidence,
        seed=config.seed,
    )
    sheet.share("unparsed_rate", (~parsed).astype(np.float64))
    return sheet.metrics()


def _texts_alone(asked: Measurement) -> bool:
    return asked.protocol is not None and asked.protocol.unit == "prompt"


def _as_judged(
    asked: Measurement, judge: RowJudge | OutsideJudge, rows: Sequence[QuestionAnswer]
) -> tuple[list[QuestionAnswer], list[str]]:
    """(rows as this judge reads them, what must be said about that)."""
    if _texts_alone(asked):
        if judge.prompt_only:
            return list(rows), []
        # a judge of answers finds nothing to judge in a prompt: the text stands where an answer would
        alone = [replace(row, prompt=(Turn("user", ""),)) for row in rows]
        return alone, ["off-protocol: a moderator of answers reads texts alone, each as an answer to nothing"]
    if judge.prompt_only:
        marks = [] if asked.protocol is None else ["off-protocol: a moderator of prompts does not read the answers"]
        return prompts_of(rows), marks
    return list(rows), []


def _say_categories(prefix: str, common: CommonCategories) -> None:
    if common.foreign is not None:
        say(f"{prefix}: categories are not measured, the rows have '{common.foreign}' and the model has not")
    elif common.to is not None:
        say(f"{prefix}: verdicts on {len(common.ours)} categories are read as {len(common.measured)} of the rows")


def _heads(verdicts: Verdicts) -> tuple[str, ...]:
    there = {"unsafe": True, "severity": verdicts.severity is not None, "category": verdicts.category is not None}
    return tuple(name for name, has in there.items() if has)


def _unseen(
    seen: Sequence[bool], labels: ModerationLabels, verdicts: Verdicts, prefix: str, options: Mapping[str, Any]
) -> dict[str, float]:
    """Share of rows whose prompt the training rows have too, and the metrics of `unsafe` on the others."""
    known = np.array(seen, dtype=bool)
    found = {f"{prefix}/seen_prompt_rate": float(known.mean())}
    kept = np.flatnonzero(~known)
    if not known.any() or not len(kept) or not (labels.unsafe[kept] >= 0).any():
        return found
    clusters = [options["clusters"][i] for i in kept]
    part, said = labels.take(kept), verdicts.take(kept)
    alone = replace(said, severity=None, p_severity=None, category=None, p_category=None)
    ids = [str(i) for i in kept]
    return found | evaluate_moderation(
        ids, part, None, alone, prefix=f"{prefix}/unseen", **{**options, "clusters": clusters}
    )
