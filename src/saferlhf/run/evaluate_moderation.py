"""The protocol `moderation`: are verdicts on single answers what people said, and what do baselines reach?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from saferlhf.config.schema import EvaluateConfig
from saferlhf.data.build import build_data
from saferlhf.data.labels import labels_of, prompts_of
from saferlhf.data.rows import QuestionAnswer, prompt_text
from saferlhf.evaluation.baselines import answer_baselines
from saferlhf.evaluation.comparison import baseline_metrics, compare_verdicts
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.evaluation.moderation_plots import moderation_drawings
from saferlhf.ops.moderation import ModerationLabels, ModerationLogits, Verdicts
from saferlhf.run.judged_model import JudgedModel
from saferlhf.run.measured import Measured, baseline_rows, judged_rows
from saferlhf.run.row_judge import RowJudge
from saferlhf.run.row_progress import RowProgress
from saferlhf.run.screen import say


def measure_moderation(config: EvaluateConfig, model: JudgedModel) -> Measured:
    """Judge the answers of a split and hold the verdicts against their labels.

    A moderator of prompts is held against prompts, each labelled by all of its answers (`data/labels.py`).

    Raises:
        UserError: rows without safety labels, or none.
    """
    rows = build_data(config.data, QuestionAnswer, ("is_safe",))
    split, part = judged_rows(config, rows)
    judge = RowJudge(model, config)
    encoded = judge.encode(prompts_of(part) if judge.prompt_only else part, split, rows.report)
    answers = list(encoded.rows)
    say(f"judging {len(answers):,} {'prompts' if judge.prompt_only else 'answers'} with {config.model}")
    with RowProgress("judging", len(answers), config.trainer.progress) as progress:
        logits = judge.logits(encoded, progress)
    verdicts = judge.decide(logits)
    labels, logits, verdicts = _comparable(answers, judge.categories, logits, verdicts)
    options: dict[str, Any] = {
        "clusters": [prompt_text(row.prompt) for row in answers],
        "draws": config.evaluation.bootstrap_draws,
        "confidence": config.evaluation.confidence,
        "seed": config.seed,
    }
    ids = [row.id for row in answers]
    metrics = evaluate_moderation(ids, labels, logits, verdicts, prefix=split, **options)
    train = baseline_rows(config, rows)
    train = prompts_of(train) if judge.prompt_only else train
    if train:
        say(f"training baselines on {len(train):,} {'prompts' if judge.prompt_only else 'answers'}")
        heads = _heads(verdicts)
        known = labels_of(train, labels.categories)
        baselines = answer_baselines(train, known, answers, prompt_only=judge.prompt_only, heads=heads)
        metrics |= baseline_metrics(ids, labels, baselines, prefix=split, **options)
        metrics |= compare_verdicts(labels, verdicts, baselines["tfidf"], prefix=f"{split}/over_tfidf", **options)
    drawings = moderation_drawings(labels, verdicts, logits)
    return Measured(metrics, rows.report.to_dict(), rows.fingerprint, list(drawings))


def _comparable(
    rows: Sequence[QuestionAnswer], categories: tuple[str, ...], logits: ModerationLogits, verdicts: Verdicts
) -> tuple[ModerationLabels, ModerationLogits, Verdicts]:
    """Labels in the model's categories; where the rows have others, categories are left out, and it is said."""
    named = {name for row in rows for name in row.harm_category or ()}
    foreign = sorted(named - set(categories))
    if verdicts.category is None or not foreign:
        return labels_of(rows, categories if verdicts.category is not None else ()), logits, verdicts
    say(f"categories are not measured: the rows have '{foreign[0]}' and {len(foreign) - 1} more that the model has not")
    logits = replace(logits, category=None)
    return labels_of(rows, ()), logits, replace(verdicts, category=None, p_category=None)


def _heads(verdicts: Verdicts) -> tuple[str, ...]:
    there = {"unsafe": True, "severity": verdicts.severity is not None, "category": verdicts.category is not None}
    return tuple(name for name, has in there.items() if has)
