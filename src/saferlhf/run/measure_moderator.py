"""Final measurements of a moderator: calibrated on validation rows, measured on validation and test rows.

The test rows never enter a threshold or temperature. The validation metrics are of the rows the calibration was fitted
on and flatter it a little; the test metrics do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from saferlhf.config.schema import TrainConfig
from saferlhf.config.task_schema import ModerationConfig
from saferlhf.data.encode import EncodedAnswers
from saferlhf.data.rows import QuestionAnswer, prompt_text
from saferlhf.evaluation.moderate import moderate_rows
from saferlhf.evaluation.moderation import evaluate_moderation
from saferlhf.evaluation.moderation_plots import moderation_drawings
from saferlhf.models.score_model import ScoreModel
from saferlhf.ops.calibration import Calibration, Objectives, decide, fit_calibration
from saferlhf.ops.moderation import ModerationLabels, ModerationLogits, Verdicts
from saferlhf.run.measure import measured_splits
from saferlhf.run.stages import Evaluation, PreparedRun


@dataclass(frozen=True)
class ModeratedSplit:
    """Held-out rows with their labels and what a moderator says of them, uncalibrated.

    Attributes:
        name: val | test.
        rows: N rows.
        labels, logits: of these rows.
    """

    name: str
    rows: Sequence[QuestionAnswer]
    labels: ModerationLabels
    logits: ModerationLogits


def measure_moderator(prepared: PreparedRun) -> Evaluation:
    """Calibrate on all validation rows, then measure both held-out splits."""
    config, encoded = prepared.config, prepared.encoded
    assert isinstance(prepared.task.model, ScoreModel)
    with_categories = "category" in prepared.task.model.head_widths
    calibration = Calibration.default(encoded.categories if with_categories else ())
    splits = []
    for name, data in measured_splits(prepared):
        whole = encoded.val if name == "val" else data  # `evaluation.max_rows` is for measuring, not for calibration
        assert isinstance(whole, EncodedAnswers)
        labels, logits = encoded.labels(whole), _logits(prepared, whole)
        if name == "val":
            calibration = fit_calibration(logits, labels, objectives_of(config))
        splits.append(first_of(ModeratedSplit(name, whole.rows, labels, logits), len(data)))
    return moderator_evaluation(config, splits, calibration)


def moderator_evaluation(config: TrainConfig, splits: Sequence[ModeratedSplit], calibration: Calibration) -> Evaluation:
    """Metrics of the splits under a calibration; of the test rows also drawings and verdicts."""
    metrics: dict[str, float] = {}
    drawings: list[str] = []
    samples: list[dict[str, Any]] = []
    for split in splits:
        verdicts = decide(split.logits, calibration)
        metrics |= evaluate_moderation(
            [row.id for row in split.rows],
            split.labels,
            split.logits,
            verdicts,
            clusters=[prompt_text(row.prompt) for row in split.rows],
            prefix=split.name,
            draws=config.evaluation.bootstrap_draws,
            confidence=config.evaluation.confidence,
            seed=config.seed,
        )
        if split.name == "test":
            drawings = moderation_drawings(split.labels, verdicts, split.logits)
            samples = verdict_samples(split.rows, verdicts, calibration.categories)
    return Evaluation(metrics, drawings, samples, calibration)


def objectives_of(config: TrainConfig) -> Objectives:
    """What the config wants its thresholds to maximise."""
    assert isinstance(config.task, ModerationConfig)
    return Objectives(**vars(config.task.objectives))


def first_of(split: ModeratedSplit, limit: int) -> ModeratedSplit:
    """The first rows of a split."""
    if limit >= len(split.rows):
        return split
    labels, logits = split.labels, split.logits
    return ModeratedSplit(
        split.name,
        split.rows[:limit],
        replace(
            labels,
            unsafe=labels.unsafe[:limit],
            severity=labels.severity[:limit],
            category=labels.category[:limit],
        ),
        replace(
            logits,
            unsafe=logits.unsafe[:limit],
            severity=None if logits.severity is None else logits.severity[:limit],
            category=None if logits.category is None else logits.category[:limit],
        ),
    )


def verdict_samples(
    rows: Sequence[QuestionAnswer], verdicts: Verdicts, categories: Sequence[str]
) -> list[dict[str, Any]]:
    """One record per row: its id and its verdict, never its text."""
    samples = []
    for i, row in enumerate(rows):
        sample: dict[str, Any] = {
            "row_id": row.id,
            "unsafe": bool(verdicts.unsafe[i]),
            "p_unsafe": float(verdicts.p_unsafe[i]),
        }
        if verdicts.severity is not None:
            sample["severity"] = int(verdicts.severity[i])
        if verdicts.category is not None:
            sample["categories"] = [name for name, has in zip(categories, verdicts.category[i], strict=True) if has]
        samples.append(sample)
    return samples


def _logits(prepared: PreparedRun, data: EncodedAnswers) -> ModerationLogits:
    trainer = prepared.config.trainer
    assert prepared.task.model is not None
    return moderate_rows(
        prepared.task.model, data, batch_size=trainer.eval_batch_size, autocast=trainer.precision != "32-true"
    )
